"""A tiny model and tokenizer whose Python code lies in their folder, as on the Hub."""

import json
from pathlib import Path

from refreshkv.data.tokenizer import train_tokenizer
from tests.helpers.models import tiny_model

CONFIGURATION = """\
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL = """\
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig
from .scale import SCALE


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda module, inputs, output: output * SCALE)
"""
TOKENIZER = """\
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def write_model_with_code(folder: Path, scale: float = 2.0, texts: list[str] | None = None, **settings) -> Path:
    """A model whose last hidden states its own code multiplies by `scale`, and a tokenizer of a class of its own."""
    vocabulary = 300
    model = tiny_model(vocab_size=vocabulary, max_position_embeddings=128, **settings)
    model.float().save_pretrained(folder)
    train_tokenizer(texts or ["some words of a text"], vocabulary).save_pretrained(folder)
    files = {"configuration_own": CONFIGURATION, "modeling_own": MODEL, "tokenization_own": TOKENIZER}
    for name, code in {**files, "scale": f"SCALE = {scale}\n"}.items():
        (folder / f"{name}.py").write_text(code)
    _change(folder / "config.json", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map={
        "AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    })  # fmt: skip
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    _change(folder / "tokenizer_config.json", **own)
    return folder


def _change(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
