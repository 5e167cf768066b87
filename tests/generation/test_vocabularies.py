"""Vocabularies that are padded, as to a multiple of 64, and embeddings that are the output layer's weights too."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refreshkv import RefreshCache, RefreshConfig, enable
from refreshkv.parity import decoding_difference
from tests.generation.test_generate import letters_tokenizer
from tests.helpers.models import random_ids, tiny_enabled
from tests.helpers.scripts import load_script

CONFIG = RefreshConfig(budget=8, stride=4)


@pytest.fixture
def folder(tmp_path):
    """A model of 64 more tokens than its tokenizer has, with tied weights."""
    tokenizer = letters_tokenizer()
    size = len(tokenizer) + 64
    tiny_enabled(CONFIG, dtype=torch.float32, vocab_size=size, tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_tokens_without_text_are_decoded_and_shown(folder, capsys):
    """A random model draws padded tokens too: they are tokens of the text, and no letters."""
    (folder / "prompt.txt").write_text("a prompt of a few words")
    given = ["--model", str(folder), "--prompt-file", str(folder / "prompt.txt"), "--max-new-tokens", "40"]
    load_script("generate").main([*given, "--sample", "--seed", "3", "--device", "cpu"])
    text, table = capsys.readouterr().out.split("\n\n")
    assert re.search(r"tokens generated +40\b|new tokens +40\b", table), table
    assert len(text) < 40


def test_a_tied_model_is_the_same_after_reloading(folder):
    model = enable(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), CONFIG)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = random_ids(2, 30) % len(AutoTokenizer.from_pretrained(folder))
    assert decoding_difference(model, ids, 20, CONFIG)[0].max() < 1e-10
    cache = RefreshCache(config=model.config, max_cache_len=50)
    tokens = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert tokens.shape == (2, 50)
