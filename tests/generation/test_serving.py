"""`transformers serve` over a model's folder with custom_generate/, asked by the client of OpenAI."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.generation.custom_generate import write_custom_generate
from tests.generation.test_generate import letters_tokenizer
from tests.helpers.hub_server import HubServer
from tests.helpers.models import tiny_enabled

TOKEN, REPOSITORY = "hf_secret", "someone/tiny.model-1"
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
NEW = 24
SERVER = """
import sys
sys.modules["refreshkv"] = None  # an import raises ModuleNotFoundError
from transformers.cli.transformers import main
main()
"""


@pytest.fixture(scope="module")
def model():
    return tiny_enabled(RefreshConfig(budget=8, stride=4), dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = letters_tokenizer(size=100)  # with the letters that stop strings are looked up with
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    write_custom_generate(path)
    return path


@contextmanager
def serving(name, home, **environment):
    """The address of a server of the model with this name, in an environment without refreshkv."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("PYTHONPATH", None)
    options = ["serve", "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), name]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER, *options], cwd=home, env=environment, stdout=log, stderr=log
        )
        try:
            wait_for(server, port, home / "log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)


def wait_for(server, port, log):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
    raise AssertionError(f"no server after two minutes: {log.read_text()}")


def answer(model, tokenizer, text, **settings):
    """What the package answers, and what the model's own generate would."""
    messages = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = {"do_sample": False, "max_new_tokens": NEW, **settings}
    length = inputs.input_ids.shape[1]
    calls = (partial(refreshkv.generate, model), model.generate)
    found = [call(**inputs, tokenizer=tokenizer, **settings) for call in calls]
    return tuple(tokenizer.decode(ids[0, length:], skip_special_tokens=True) for ids in found)


def completed(client, text):
    """What the server streams behind a text, without a chat template."""
    chunks = client.completions.create(model=REPOSITORY, prompt=text, temperature=0, max_tokens=NEW, stream=True)
    return "".join(chunk.choices[0].text or "" for chunk in chunks)


def completion(model, tokenizer, text):
    """What the package writes behind a text."""
    inputs = tokenizer(text, return_tensors="pt")
    ids = refreshkv.generate(model, **inputs, do_sample=False, max_new_tokens=NEW)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_a_server_of_the_hub_alone_answers_as_the_package_does(model, tokenizer, folder, tmp_path):
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    texts = [
        "".join(chr(35 + (7 * place + 11 * number) % 55) for place in range(30 + 5 * number)) for number in range(8)
    ]
    with HubServer(TOKEN) as hub:
        hub.add(REPOSITORY, folder)
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        with serving(REPOSITORY, tmp_path, **environment) as address:
            client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=120)

            def ask(text, **settings):
                messages = [{"role": "user", "content": text}]
                settings = {"model": REPOSITORY, "temperature": 0, "max_tokens": NEW, **settings}
                return client.chat.completions.create(messages=messages, **settings)

            def streamed(text, **settings):
                chunks = list(ask(text, stream=True, **settings))
                assert chunks[-1].choices[0].finish_reason in ("stop", "length")
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), len(chunks)

            text, chunks = streamed(texts[0])
            small, full = answer(model, tokenizer, texts[0])
            assert text == small and text != full and chunks > 5
            assert ask(texts[0]).choices[0].message.content == small
            assert [listed.id for listed in client.models.list()] == [REPOSITORY]
            with ThreadPoolExecutor(8) as threads:
                found = [text for text, _ in threads.map(streamed, texts)]
            assert found == [answer(model, tokenizer, text)[0] for text in texts]
            assert completed(client, texts[0]) == completion(model, tokenizer, texts[0])
            stop = small[5]
            expected, _ = answer(model, tokenizer, texts[0], stop_strings=[stop])
            assert streamed(texts[0], stop=[stop])[0] == expected != small
