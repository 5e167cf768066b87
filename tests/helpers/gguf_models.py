"""Tiny GGUF files, written as llama.cpp writes them, and wheels that hold one."""

import zipfile
from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzĠ", "ab", "cd"]
HEADS, KEY_VALUE_HEADS = 4, 2


def tiny_llama() -> LlamaForCausalLM:
    """A random Llama of one layer whose vocabulary is `TOKENS`, with the embedding as its head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, file: Path) -> Path:
    """Writes the model of `tiny_llama` with its weights in float32 and a byte-level BPE of `TOKENS`."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(_gguf_name(name), _as_llama_cpp(name, weight).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_wheel(folder: Path, file: Path, package: str = "tiny-gguf", version: str = "1.0") -> Path:
    """Writes a wheel that pip can download and that holds `file` in a folder of the package's name."""
    name = package.replace("-", "_")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, f"{name}/{file.name}")
        metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        archive.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
        archive.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return wheel


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, module = name.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def _as_llama_cpp(name: str, weight: torch.Tensor) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels together, transformers channel i and i + D/2: rows of queries and keys
    move."""
    for projection, heads in (("q_proj", HEADS), ("k_proj", KEY_VALUE_HEADS)):
        if projection in name:
            return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()
    return weight.contiguous()
