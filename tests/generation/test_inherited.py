"""Generation settings of a model's own files (issue 20, A5): evaluation takes none, `generate` those that it prints,
and the others are refused in one line."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from refreshkv import RefreshConfig, enable
from refreshkv.evaluation.perplexity.stepwise import decode_known
from refreshkv.evaluation.strategies import full_attention
from refreshkv.evaluation.tasks.scores import AnswerGenerator, make_examples
from refreshkv.generation.inherited import forget_own_settings, own_settings, refuse_own_settings
from refreshkv.settings import SettingsError
from tests.generation.test_generate import letters_tokenizer
from tests.helpers.models import random_ids, tiny_enabled, tiny_model
from tests.helpers.scripts import load_script

CHANGING = {
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.3,
    "use_cache": False,
    "num_beams": 3,
    "num_return_sequences": 2,
    "stop_strings": ["A"],
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "suppress_tokens": [30, 31],
    "begin_suppress_tokens": [30],
    "bad_words_ids": [[30]],
    "min_length": 5,
    "min_new_tokens": 5,
    "max_time": 0.001,
    "guidance_scale": 2.0,
    "exponential_decay_length_penalty": [1, 1.5],
    "sequence_bias": [[[30], -10.0]],
    "return_dict_in_generate": True,
    "output_attentions": True,
    "prompt_lookup_num_tokens": 3,
    "penalty_alpha": 0.5,
    "token_healing": True,
    "renormalize_logits": True,
}
WITHOUT_EFFECT = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "typical_p": 0.9,
    "max_length": 4096,
    "cache_implementation": "hybrid",
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "use_cache": True,
    "chat_format": "chatml",
}


@pytest.fixture
def folder(tmp_path):
    tiny_enabled(RefreshConfig(budget=6, stride=4), dtype=torch.float32).save_pretrained(tmp_path)
    letters_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "prompt.txt").write_text("ABCDEFGHIJKLMNOPQRST")
    return tmp_path


def set_in_files(folder, **values):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def generated(folder, capsys, *more):
    given = ["--model", str(folder), "--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens", "12"]
    load_script("generate").main([*given, "--device", "cpu", *more])
    text, table = capsys.readouterr().out.split("\n\n")
    return text, dict(re.split(r"  +", line, maxsplit=1) for line in table.strip().splitlines() if "  " in line)


@pytest.mark.parametrize("name", CHANGING)
def test_settings_that_change_the_text_are_refused_by_name(name):
    model = tiny_model()
    setattr(model.generation_config, name, CHANGING[name])
    with pytest.raises(
        SettingsError, match=rf"^--model: its generation_config\.json sets {name}=.*--ignore-gen"
    ) as error:
        refuse_own_settings(model)
    assert "\n" not in str(error.value)
    forget_own_settings(model)
    refuse_own_settings(model)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_settings_without_an_effect_on_the_likeliest_token_are_not(name):
    model = tiny_model()
    setattr(model.generation_config, name, WITHOUT_EFFECT[name])
    refuse_own_settings(model)


def test_every_setting_of_transformers_is_known_or_refused():
    """One that a later release adds is refused as soon as a model sets it."""
    model = tiny_model()
    for name in GenerationConfig().to_dict():
        model.generation_config = GenerationConfig()
        setattr(model.generation_config, name, 12345)
        if own_settings(model):
            with pytest.raises(SettingsError, match=name):
                refuse_own_settings(model, samples=True)


def test_generate_says_what_is_in_force(folder, capsys):
    set_in_files(folder, do_sample=True, temperature=0.6, top_k=20)
    text, table = generated(folder, capsys)
    assert table["decoding"] == "greedy"
    _, table = generated(folder, capsys, "--sample", "--top-p", "0.5", "--seed", "3")
    assert table["decoding"] == "sampled, temperature 0.6, top_p 0.5, top_k 20, min_p 0.0, seed 3"
    set_in_files(folder, no_repeat_ngram_size=1)
    with pytest.raises(SettingsError, match="sets no_repeat_ngram_size=1, which would change what is generated"):
        generated(folder, capsys)
    assert generated(folder, capsys, "--ignore-generation-config")[0] == text
    set_in_files(folder, no_repeat_ngram_size=0, typical_p=0.5)
    assert generated(folder, capsys)[0] == text
    with pytest.raises(SettingsError, match="sets typical_p=0.5"):
        generated(folder, capsys, "--sample")


def test_settings_in_config_json_count_too(folder, capsys):
    """transformers reads them where a model has no generation_config.json."""
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "no_repeat_ngram_size": 1}))
    with pytest.raises(SettingsError, match="no_repeat_ngram_size=1"):
        generated(folder, capsys)


@torch.no_grad()
def test_known_tokens_are_scored_without_them(folder):
    """Perplexity token by token: a penalty would change the losses."""
    set_in_files(folder, no_repeat_ngram_size=1, repetition_penalty=1.5, use_cache=False, stop_strings=["A"])
    penalised = enable(AutoModelForCausalLM.from_pretrained(folder))
    ids = random_ids(2, 30)
    losses = decode_known(penalised, ids, 20, full_attention()).losses
    assert penalised.generation_config.no_repeat_ngram_size == 1  # and it is given back
    forget_own_settings(penalised)
    assert torch.equal(losses, decode_known(penalised, ids, 20, full_attention()).losses)


def test_answers_of_tasks_take_none():
    model = tiny_model(max_position_embeddings=4096)
    model.generation_config.no_repeat_ngram_size = 3
    for start in (
        lambda: make_examples(model, letters_tokenizer(), [], 1, progress=False),
        lambda: AnswerGenerator(model, letters_tokenizer(), [], None),
    ):
        with pytest.raises(SettingsError, match="no_repeat_ngram_size=3"):
            start()


@pytest.mark.parametrize(
    ("weight", "value", "message"),
    [
        ("model.embed_tokens.weight", torch.nan, "has weights that are not finite, the first in model.embed_tokens"),
        ("lm_head.weight", torch.inf, "has weights that are not finite, the first in lm_head"),
        ("model.layers.0.self_attn.q_proj.weight", 3e38, "its logits are not numbers"),
    ],
)
def test_a_model_that_computes_no_numbers_is_refused(folder, capsys, weight, value, message):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(weight)[:35] = value
    model.save_pretrained(folder)
    for more in ([], ["--full"], ["--sample"]):
        with pytest.raises(SettingsError, match=f"--model: .*{message}"):
            generated(folder, capsys, *more)
    assert capsys.readouterr().out.strip() == ""


def test_missing_weights_are_refused(folder, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"--model: .* lacks 1 weights, the first being model\.layers\.1\."):
        generated(folder, capsys)
