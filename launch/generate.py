"""Continues a text with a small, refreshed KV cache, and says what that took.

    python launch/generate.py --model DIR_OR_HUB_ID --prompt-file FILE [--max-new-tokens 256] [--budget 0.125] ...

The schedule is the one saved with the model, or else the paper's; --budget, --stride and --threshold replace its
settings. --full decodes with ordinary full attention, to compare; --offload is for contexts that the GPU's memory
cannot hold; --tuned is for long answers: the GPU's kernels take longer to compile and are faster (docs/method.md, The
loop). The prompt is taken as it is: no chat template.

With --prefix-store DIR the keys and values of prompts are kept in that folder, and a prompt that begins like an earlier
one pays for the rest only (docs/prefix-store.md).
"""

import argparse
import dataclasses
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

import refreshkv
from refreshkv import RefreshCache, RefreshConfig, cli, decode_ahead, tuned_compilation
from refreshkv.loading import load_model, load_tokenizer, own_config
from refreshkv.prefix.prompt_cache import keep_all_tokens
from refreshkv.prefix.recycling import Reuse, put_new, recycle
from refreshkv.prefix.store import PrefixStore
from refreshkv.settings import SettingsError
from refreshkv.tables import column_table

SCHEDULE_OPTIONS = ("budget", "stride", "threshold")
REFRESH_OPTIONS = (*SCHEDULE_OPTIONS, "offload")
SAMPLING_OPTIONS = ("temperature", "top_p", "seed")
PREFIX_STORE_GB = 20.0


def main(argv: list[str]) -> None:
    options = read_options(argv)
    prompt = read_prompt(options["prompt_file"])
    tokenizer = load_tokenizer(options["model"], "--model")
    model = load_model(options["model"], "--model", dtype=options["dtype"], device_map=options["device"]).eval()
    inputs = encode(prompt, tokenizer, model, options["max_new_tokens"])
    prompt_tokens = inputs["input_ids"].shape[1]

    cache, generation = None, {}
    if not options["full"]:
        refreshkv.enable(model, chosen_config(model, options))
        capacity = prompt_tokens + options["max_new_tokens"]
        cache = RefreshCache(model.config, capacity, offload=options.get("offload", False))
        generation["past_key_values"] = cache
    store, reuse = open_store(model, options), None
    if store is not None:
        kept = keep_all_tokens(DynamicCache(config=model.config) if cache is None else cache)
        reuse = recycle(store, kept, inputs["input_ids"])
        generation["past_key_values"] = kept
    if options["tuned"]:
        if model.device.type != "cuda":
            raise SettingsError(
                f"--tuned compiles for a GPU, and the model is on the {model.device.type}: leave it out"
            )
        generation["compile_config"] = tuned_compilation()
    if options["sample"]:
        set_seed(options.get("seed", 0))
        generation |= {name: options[name] for name in ("temperature", "top_p") if name in options}
    else:
        generation |= {"temperature": None, "top_p": None, "top_k": None}

    streamer = TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs,
        **generation,
        custom_generate=decode_ahead,
        stream_to=streamer,
        do_sample=options["sample"],
        max_new_tokens=options["max_new_tokens"],
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    print(f"\n{report(prompt_tokens, streamer, cache, reuse)}")
    if store is not None:
        print(stored(store, inputs["input_ids"], kept, reuse, streamer.prompt_seconds))


def read_options(argv: list[str]) -> dict[str, Any]:
    """The command line; what was not given and has no default here is not in the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--model", required=True, help="folder or hub id of a transformers decoder")
    parser.add_argument("--prompt-file", required=True, help="text to continue; - reads standard input")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, help="most tokens to generate (default: %(default)s)"
    )
    parser.add_argument("--budget", type=number, help="small cache: tokens, or a fraction of the prompt")
    parser.add_argument("--stride", type=int, help="decoding steps between two checks")
    parser.add_argument("--threshold", type=number_or_none, help="similarity schedule; none: each check is a full step")
    parser.add_argument(
        "--offload", action="store_true", help="keep all keys and values but the small cache's on the CPU"
    )
    parser.add_argument("--tuned", action="store_true", default=False, help="compile for one sequence on a GPU")
    parser.add_argument("--full", action="store_true", default=False, help="ordinary full attention, no small cache")
    parser.add_argument("--sample", action="store_true", default=False, help="sample; without it the likeliest token")
    parser.add_argument(
        "--temperature", type=float, help="with --sample (default: the model's own generation settings)"
    )
    parser.add_argument("--top-p", type=float, help="with --sample (default: the model's own generation settings)")
    parser.add_argument("--seed", type=int, help="with --sample (default: 0)")
    parser.add_argument("--prefix-store", help="folder of prompts' keys and values, made if need be")
    parser.add_argument("--prefix-store-gb", type=float, help=f"most GB in it (default: {PREFIX_STORE_GB})")
    parser.add_argument("--dtype", default="auto", help="such as bfloat16 (default: the one the model was saved in)")
    parser.add_argument("--device", default="auto", help="such as cpu or cuda:1 (default: what there is)")
    options = vars(parser.parse_args(argv))

    if options["max_new_tokens"] < 1:
        raise SettingsError(f"--max-new-tokens must be at least 1, got {options['max_new_tokens']}")
    _refuse_unused(options, REFRESH_OPTIONS, unused=options["full"], reason="means nothing with --full")
    if options["tuned"] and (options["full"] or "offload" in options):
        other = "--full" if options["full"] else "--offload"
        raise SettingsError(f"--tuned is about compiling the step, which {other} does not do: leave one out")
    _refuse_unused(options, SAMPLING_OPTIONS, unused=not options["sample"], reason="needs --sample")
    _refuse_unused(options, ("prefix_store_gb",), unused="prefix_store" not in options, reason="needs --prefix-store")
    if not 0 < options.get("prefix_store_gb", 1.0) < float("inf"):
        raise SettingsError(f"--prefix-store-gb must be a number more than 0, got {options['prefix_store_gb']}")
    if not options.get("temperature", 1.0) > 0:
        raise SettingsError(
            f"--temperature must be more than 0, got {options['temperature']}; leave out --sample for 0"
        )
    if not 0 < options.get("top_p", 1.0) <= 1:
        raise SettingsError(f"--top-p must be more than 0 and at most 1, got {options['top_p']}")
    return options


def _refuse_unused(options: dict[str, Any], names: tuple[str, ...], unused: bool, reason: str) -> None:
    for name in names:
        if unused and name in options:
            raise SettingsError(f"--{name.replace('_', '-')} {reason}")


def number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def number_or_none(text: str) -> float | None:
    return None if text.lower() in ("none", "null") else float(text)


def read_prompt(name: str) -> str:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"--prompt-file: there is no file {name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--prompt-file: {name} is not a readable text: {error}") from None
    if not text.strip():
        raise SettingsError(f"--prompt-file: {name} is empty; there is nothing to continue")
    return text


def encode(
    prompt: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_new_tokens: int
) -> dict[str, torch.Tensor]:
    """The prompt's input_ids and attention_mask, (1, P), on the model's device; refuses what the model cannot take."""
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long().to(model.device)
    length, vocabulary = ids.shape[1], model.get_input_embeddings().num_embeddings
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if length == 0:
        raise SettingsError("--prompt-file: the prompt has no tokens")
    if int(ids.max()) >= vocabulary:
        raise SettingsError(f"--model: its tokenizer gives token {int(ids.max())}, but the model has only {vocabulary}")
    if limit is not None and length + max_new_tokens > limit:
        raise SettingsError(
            f"--max-new-tokens={max_new_tokens} and the prompt's {length} tokens are more than the model's "
            f"max_position_embeddings={limit}"
        )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def chosen_config(model: PreTrainedModel, options: dict[str, Any]) -> RefreshConfig:
    """The configuration saved with the model, or the paper's, with the options' settings in it."""
    return dataclasses.replace(
        own_config(model.config), **{name: options[name] for name in SCHEDULE_OPTIONS if name in options}
    )


class TimedStreamer(TextStreamer):
    """Prints text as it comes, and notes when the prompt and each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **settings: Any):
        super().__init__(tokenizer, **settings)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    @property
    def new_tokens(self) -> int:
        return len(self.times) - 1

    @property
    def prompt_seconds(self) -> float:
        """From the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def token_seconds(self) -> float | None:
        """Mean over the tokens after the first; None without any."""
        return (self.times[-1] - self.times[1]) / (self.new_tokens - 1) if self.new_tokens > 1 else None


def open_store(model: PreTrainedModel, options: dict[str, Any]) -> PrefixStore | None:
    if "prefix_store" not in options:
        return None
    most = int(options.get("prefix_store_gb", PREFIX_STORE_GB) * 10**9)
    return PrefixStore(options["prefix_store"], most, model, setting="--prefix-store")


def stored(store: PrefixStore, ids: torch.Tensor, cache: Cache, reuse: Reuse, seconds: float) -> str:
    """Stores the prompt if it is new to the store, and says so."""
    began = time.perf_counter()
    entry = put_new(store, ids, cache, reuse, seconds)
    if entry is None:
        return "prompt not stored: most of it was there, or it alone is more than --prefix-store-gb"
    return f"prompt stored: {entry.size / 1e6:.1f} MB in {time.perf_counter() - began:.2f} s"


def report(prompt_tokens: int, streamer: TimedStreamer, cache: RefreshCache | None, reuse: Reuse | None = None) -> str:
    rows = [
        ("prompt tokens", str(prompt_tokens)),
        ("new tokens", str(streamer.new_tokens)),
        ("seconds for the prompt", f"{streamer.prompt_seconds:.2f}"),
    ]
    rows += [("prefix store", str(reuse))] if reuse is not None else []
    if streamer.token_seconds is not None:
        rows.append(("seconds per token", f"{streamer.token_seconds:.4f}"))
        rows.append(("tokens/s", f"{1 / streamer.token_seconds:.1f}"))
    rows += [("attention", "full")] if cache is None else cache_rows(prompt_tokens, cache)
    return column_table(rows, text_columns=2)


def cache_rows(prompt_tokens: int, cache: RefreshCache) -> list[tuple[str, str]]:
    """The budget, and the full steps after the prompt; neighbouring layers with equal numbers share a row."""
    budget, length = cache.config.largest_budget(prompt_tokens), int(cache.get_seq_length())
    steps = length - prompt_tokens
    beyond = " (the context never grew beyond it: full attention)" if budget >= length else ""
    rows = [("K, tokens in the small cache", f"{budget}{beyond}")]
    counts = cache.full_steps[:, 0, prompt_tokens:].sum(-1).tolist()
    counts = [None if sliding else count for count, sliding in zip(counts, cache.is_sliding, strict=True)]
    for count, group in groupby(enumerate(counts), key=lambda entry: entry[1]):
        layers = [layer for layer, _ in group]
        name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        if count is None:
            rows.append((name, "sliding window"))
        else:
            stride = f"effective stride {steps / count:.1f}" if count else "never refreshed"
            rows.append((name, f"{count} full steps of {steps}, {stride}"))
    return rows


if __name__ == "__main__":
    cli.run(main)
