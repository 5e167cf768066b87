"""Training steps of adapters (LoRA) beside a model of random weights, by default of Llama-3.1-8B's shape in 4 bits.

    python benchmarks/adapters.py [--length 8192] [--rank 32] [--steps 3] [--quantization nf4 | none] [--output DIR]
    python benchmarks/adapters.py --tiny --quantization none                       # to try it without a GPU

One GPU, one sequence a step, bfloat16, all linear layers adapted, all layers recomputed, P = T/2, S = 10, K = T/4 at
most 2048; torch's AdamW on the adapters. Loss and layers are those of launch/train.py; DeepSpeed, which on one GPU adds
buffers of the trained weights' size, is left out. Prints seconds a step, and peak memory measured and predicted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import refreshkv
from measuring import SHAPE, add_shape
from output import save
from refreshkv.settings import settings_from_dict
from refreshkv.tables import column_table
from refreshkv.train.adapter import add_adapters
from refreshkv.train.batch import make_batch
from refreshkv.train.config import RunConfig
from refreshkv.train.job import Job, resolve
from refreshkv.train.loss import CausalLossModel, LossSums
from refreshkv.train.memory import allocated, memory_needed
from refreshkv.train.recomputation import recompute_layers
from refreshkv.train.simulation import heaviest_simulation

TINY = {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "vocabulary": 500}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser, SHAPE)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence")
    parser.add_argument("--rank", type=int, default=32, help="training.adapter.rank")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one to warm up")
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4", help="model.quantization")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, and sequences of 256")
    parser.add_argument("--output", type=Path, help="folder for the results, adapters.json")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY, length=256)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:  # a model without weights
        model_config(args).save_pretrained(folder)
        job = resolve(run_config(args, folder, device), 1, dry=True)
    result = measure(build(job, device), job, args.steps, device)
    save(args.output, "adapters.json", {**vars(args), "output": None, **result})
    print(column_table([(name, f"{value:,.3f}") for name, value in result.items()], text_columns=1))


def model_config(args: argparse.Namespace) -> LlamaConfig:
    """The model's configuration."""
    return LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocabulary,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
    )


def run_config(args: argparse.Namespace, folder: str, device: torch.device) -> RunConfig:
    """The settings of a run that would train the same."""
    training = {"deepspeed": "zero0", "dtype": "bf16" if device.type == "cuda" else "fp32", "global_batch": 1}
    values: dict[str, Any] = {"data": {"row_length": args.length}, "refresh": {"budget": min(2048, args.length // 4)}}
    values["simulation"] = {"prompt_length": args.length // 2, "stride": 10}
    values["training"] = {**training, "activation_checkpointing": True, "adapter": {"rank": args.rank}}
    values["model"] = {"path": folder, "quantization": None if args.quantization == "none" else args.quantization}
    return settings_from_dict(RunConfig, values)


def build(job: Job, device: torch.device) -> CausalLossModel:
    """The model with random weights and adapters that do something."""
    dtype = torch.bfloat16 if job.config.training.dtype == "bf16" else torch.float32
    adapter = job.config.training.adapter
    assert adapter is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(job.model_config, dtype=dtype)
    fill(model, job.config.model.quantization, dtype, device)
    refreshkv.enable(model, job.config.refresh)
    add_adapters(model, adapter, seed=0)
    recompute_layers(model, 1.0)
    return CausalLossModel(model.to(device=device), "chunked").train()


def fill(model: PreTrainedModel, quantization: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a model on the device "meta" random weights on `device`, a layer at a time."""
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not output and quantization:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed(module, dtype, device))
            continue
        for key, weight in list(module.named_parameters(recurse=False)):
            values = torch.randn(weight.shape, dtype=dtype, device=device) * 0.02
            module.register_parameter(key, nn.Parameter(values if weight.dim() > 1 else torch.ones_like(values)))
    rotary: Any = model.get_decoder().rotary_emb
    with device:
        model.get_decoder().rotary_emb = type(rotary)(config=model.config)


def packed(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A layer of the same shape with random weights in 4 bits."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit  # pyright: ignore[reportMissingImports]

    shape = layer.in_features, layer.out_features
    small = Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    values = torch.randn(shape[::-1], dtype=dtype, device=device) * 0.02
    kind: Any = Params4bit
    small.weight = kind(values, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    return small


def measure(model: CausalLossModel, job: Job, steps: int, device: torch.device) -> dict[str, float]:
    """Takes the steps; their median time, and the peak memory measured and predicted."""
    length, vocabulary = job.config.data.row_length, job.shape.vocabulary
    simulation = heaviest_simulation(job.config)
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds, losses = [], []
    for step in range(1 + steps):
        ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(step))
        batch = make_batch({"input_ids": ids}, "all", device)
        wait()
        began = time.perf_counter()
        sums = LossSums(*model(**batch.model_arguments(simulation, False)))
        (sums.objective / length).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sums.total) / (length - 1))
        wait()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return {
        "trained weights, millions": sum(part.numel() for part in trained) / 1e6,
        "seconds a step": statistics.median(seconds[1:]),
        "loss of the first step": losses[0],
        "loss of the last step": losses[-1],
        "peak memory, GB": peak,
        "predicted, GB": allocated(memory_needed(job)) / 1e9,
    }


if __name__ == "__main__":
    main()
