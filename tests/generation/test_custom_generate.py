"""custom_generate/ of a model's folder: the package's tokens in an environment without the package."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers.dynamic_module_utils as dynamic_modules
from transformers import AutoModelForCausalLM, pipeline

import refreshkv
from refreshkv import RefreshConfig, SettingsError
from refreshkv.generation import custom_generate
from refreshkv.generation.custom_generate import files, is_ours, write_custom_generate
from tests.generation.test_generate import letters_tokenizer
from tests.helpers.hub_server import HubServer
from tests.helpers.models import tiny_enabled
from tests.package.sources import ROOT

REFRESH = RefreshConfig(budget=8, stride=4, select_stride=2, score_bits=4)
TEXT = "ABCDEFGHIJKLMNOPQRSTABCDEFGHIJKLMNOPQRST"
GREEDY = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 1.5}
TOKEN, REPOSITORY = "hf_secret", "someone/tiny.model-1"

STRANGER = """
import json, sys
sys.modules["refreshkv"] = None  # an import raises ModuleNotFoundError
if "without triton" in sys.argv[2:]:
    sys.modules["triton"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

name = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(name)
inputs = tokenizer({text!r}, return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
found = {{"greedy": model.generate(**inputs, **{greedy}).tolist()}}
torch.manual_seed(7)
found["seeded"] = model.generate(**inputs, **{sampled}).tolist()
plain = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
found["plain"] = plain.generate(**inputs, **{greedy}).tolist()
found["by name"] = plain.generate(**inputs, custom_generate=name, trust_remote_code=True, **{greedy}).tolist()
text = pipeline("text-generation", model=name, trust_remote_code=True)
found["pipeline"] = text({text!r}, **{greedy})[0]["generated_text"]
found["modules"] = [name for name, module in sys.modules.items() if name[:9] == "refreshkv" and module]
print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its schedule, its tokenizer and custom_generate/, as an export leaves it."""
    path = tmp_path_factory.mktemp("models") / "tiny.model-1"
    tiny_enabled(REFRESH, dtype=torch.float32, num_key_value_heads=2).save_pretrained(path)
    letters_tokenizer().save_pretrained(path)
    write_custom_generate(path)
    return path


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith(("transformers_modules", "refreshkv_"))]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "modules"


def expected(folder):
    """What the package generates, and the model's own generate."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), letters_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    found = {"plain": model.generate(ids, **GREEDY).tolist()}
    found["greedy"] = found["by name"] = refreshkv.generate(model, ids, **GREEDY).tolist()
    torch.manual_seed(7)
    found["seeded"] = refreshkv.generate(model, ids, **SAMPLED).tolist()
    found["pipeline"] = tokenizer.decode(found["greedy"][0], skip_special_tokens=True)
    assert found["plain"] != found["greedy"]
    return found


def ask_stranger(name, home, *arguments, **environment):
    """What a process without the package generates with the model of this name."""
    code = STRANGER.format(text=TEXT, greedy=GREEDY, sampled=SAMPLED)
    environment = {**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", code, str(name), *arguments],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    (shared,) = found.pop("modules")
    assert shared.startswith("refreshkv_")
    return found


@pytest.mark.slow
def test_without_the_package_a_folder_gives_the_packages_tokens(folder, tmp_path):
    assert ask_stranger(folder, tmp_path) == expected(folder)


@pytest.mark.slow
def test_from_the_hub_alone_and_without_triton(folder, tmp_path):
    with HubServer(TOKEN) as hub:
        hub.add(REPOSITORY, folder)
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        assert ask_stranger(REPOSITORY, tmp_path, "without triton", **environment) == expected(folder)


def test_its_parts_are_those_of_the_folder_and_shared(folder, modules_cache):
    models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for _ in range(2)]
    ids = letters_tokenizer()(TEXT, return_tensors="pt").input_ids
    outputs = [model.generate(ids, return_dict_in_generate=True, **GREEDY) for model in models]
    first, second = (type(output.past_key_values) for output in outputs)
    assert first is second and first.__module__.startswith("transformers_modules.")
    assert outputs[0].sequences.tolist() == outputs[1].sequences.tolist() == expected(folder)["greedy"]
    (name,) = {model.config._attn_implementation for model in models}
    assert name.startswith("refreshkv_") and hasattr(torch.ops, name)
    positional = models[0].generate(ids, **GREEDY)
    assert positional.tolist() == expected(folder)["greedy"]
    assert tiny_enabled().config._attn_implementation == "refreshkv"
    text = pipeline("text-generation", model=models[1], tokenizer=letters_tokenizer())
    assert text(TEXT, **GREEDY)[0]["generated_text"] == expected(folder)["pipeline"]


def test_without_trust_it_is_the_ordinary_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "generate" not in vars(model) and model.config._attn_implementation == "sdpa"


def test_nothing_of_the_package_is_left_in_the_files():
    found = files()
    for name, text in found.items():
        assert "from refreshkv" not in text and "import refreshkv" not in text and '"refreshkv::' not in text, name
        if name != "requirements.txt":
            compile(text, name, "exec")
            assert text.startswith(f"# Made by refreshkv {refreshkv.__version__}")
    requirements = found["requirements.txt"].split()
    assert [f'"{line}",' in (ROOT / "pyproject.toml").read_text() for line in requirements] == [True, True]
    training = [name for name in found if name.startswith(("train", "data", "evaluation", "simulation", "launch"))]
    assert training == []


def test_only_our_own_folder_is_replaced(tmp_path):
    folder = write_custom_generate(tmp_path)
    (folder / "notes.md").write_text("mine")
    (folder / "cache_of_an_earlier_release.py").write_text((folder / "config.py").read_text())
    write_custom_generate(tmp_path)
    names = {file.name for file in folder.iterdir()}
    assert names == {*files(), "notes.md"} and is_ours(folder / "generate.py")
    (folder / "generate.py").write_text("def generate(model): ...")
    with pytest.raises(SettingsError, match="is there already and not made by refreshkv"):
        write_custom_generate(tmp_path)
    assert (folder / "generate.py").read_text() == "def generate(model): ..."


def test_the_stamp_tells_sources_apart():
    sources = custom_generate.needed_modules()
    changed = {**sources, "refreshkv.config": sources["refreshkv.config"] + "\n"}
    assert custom_generate.sources_stamp(sources) != custom_generate.sources_stamp(changed)
