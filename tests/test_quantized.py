"""Quantized checkpoints: decoding equals simulation, what tells them apart, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from refreshkv import RefreshConfig, SettingsError, enable
from refreshkv.identity import fingerprint
from refreshkv.loading import load_model
from refreshkv.parity import decoding_difference
from refreshkv.quantized import quantization_method
from refreshkv.settings import settings_from_dict
from refreshkv.train.config import RunConfig
from refreshkv.train.job import resolve
from tests.helpers.models import random_ids, tiny_model

CONFIG = RefreshConfig(budget=6, stride=4)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny_model(dtype=torch.float32, **SIZES).save_pretrained(folder)
    return folder


def nf4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )


def int8():
    """With a threshold, columns of outliers are found in all tokens of a pass, so that a token depends on others."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def torchao(kind):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, kind)())


METHODS = {
    "nf4": nf4,
    "int8": int8,
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
}


def quantized(plain, folder, settings):
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, device_map="cpu")
    model.save_pretrained(folder)
    return folder


def assert_decodes(model):
    enable(model, CONFIG)
    differences, largest = decoding_difference(model, random_ids(2, 40), 24, CONFIG)
    assert differences.max() < 1e-5 * largest.max()


@pytest.mark.parametrize("name", METHODS)
def test_decoding_equals_simulation(plain, tmp_path, name):
    folder = quantized(plain, tmp_path / "quantized", METHODS[name]())
    model = load_model(str(folder), "--model", dtype=torch.float32).eval()
    assert quantization_method(model.config) == name.split(maxsplit=1)[0]
    packed = type(model.model.layers[0].mlp.up_proj.weight.data)
    assert packed is not torch.Tensor or model.model.layers[0].mlp.up_proj.weight.element_size() == 1
    before = fingerprint(model)
    assert_decodes(model)
    assert fingerprint(model) == before, "the passes left other weights behind"
    ordinary = load_model(str(plain), "--model", dtype=torch.float32).eval()
    difference = (model(random_ids(1, 9)).logits - ordinary(random_ids(1, 9)).logits).abs().max()
    assert difference > 1e-3, "the weights are not quantized"


def test_fp8_becomes_ordinary_weights_without_a_gpu(plain, tmp_path):
    """Blocks of 32 x 32 weights with a scale each, as in the files of DeepSeek and Qwen."""
    if torch.cuda.is_available():
        pytest.skip("a GPU keeps them")
    weights = load_file(plain / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(plain)
    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]
    for name in linear:
        weight = weights.pop(f"{name}.weight")
        blocks = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        weights[f"{name}.weight"] = packed.flatten(2).flatten(0, 1)
        weights[f"{name}.weight_scale_inv"] = scale
        model.get_submodule(name).weight.data = (packed.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((plain / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = load_model(str(tmp_path), "--model", dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(random_ids(1, 9)).logits, model.eval()(random_ids(1, 9)).logits)
    assert_decodes(loaded)


def test_scales_are_part_of_the_identity(plain, tmp_path):
    folder = quantized(plain, tmp_path / "quantized", nf4())
    before = fingerprint(load_model(str(folder), "--model", dtype=torch.float32))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    weights[name] = weights[name] // 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(load_model(str(folder), "--model", dtype=torch.float32)) != before


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "gptq", "bits": 4}, "optimum|gptqmodel"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
    ],
)
def test_a_missing_package_is_named(plain, tmp_path, settings, package):
    values = json.loads((plain / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": settings}))
    (tmp_path / "model.safetensors").symlink_to(plain / "model.safetensors")
    with pytest.raises(SettingsError, match=rf"^--model: no model could be loaded from [^\n]*({package})[^\n]*$"):
        load_model(str(tmp_path), "--model", dtype=torch.float32)


REFUSED = {
    "weights": ("nf4", {}, 2, "holds nf4 weights, which cannot be trained themselves: set training.adapter"),
    "twice": ("nf4", {"model": {"quantization": "nf4"}, "adapter": {}}, 2, "would quantize twice: remove it"),
    "stage 3": ("nf4", {"adapter": {}}, 3, "which ZeRO stage 3 does not divide: set training.deepspeed=zero2"),
    "others": ("gptq", {"adapter": {}}, 2, "holds gptq weights, which are not trained, nor adapters beside them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_training_is_refused(plain, tmp_path, name):
    method, changes, stage, words = REFUSED[name]
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": method}
    values = json.loads((plain / "config.json").read_text())
    values["quantization_config"] = own if method == "nf4" else {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(values))
    settings = {
        "model": {"path": str(tmp_path), **changes.get("model", {})},
        "data": {"row_length": 64},
        "training": {"deepspeed": f"zero{stage}", "adapter": changes.get("adapter")},
    }
    with pytest.raises(SettingsError, match=words):
        resolve(settings_from_dict(RunConfig, settings), 1, dry=True)
