"""Continues a text from a small, refreshed KV cache, and prints what that took.

    python launch/generate.py --model DIR_OR_HUB_ID --prompt-file FILE [--budget 0.125] [refresh.key=value ...]

The schedule and the selection are the ones saved with the model, or else the paper's; refresh.key=value changes them,
and --budget, --stride and --threshold are short for three of them. --full decodes with full attention, to compare.
--offload is for contexts that the GPU's memory cannot hold. --tuned is for long answers: the GPU's kernels take longer
to compile and are faster (docs/method.md, The loop). The prompt is taken as it is: no chat template. Tokens are the
likeliest ones, or drawn with --sample; the table says with which settings. A model whose generation_config.json sets
anything else (penalties, stop strings, ...) is refused, unless --ignore-generation-config leaves that out.

With --prefix-store DIR the keys and values of prompts are kept in that folder, and a prompt that begins like an earlier
one is computed from where they differ (docs/prefix-store.md).

With --documents FILE ... besides, these files come before the prompt, each as a chunk that was computed by itself, in
any order and in any later prompt (docs/chunks.md). --recompute-first N or --recompute-changed SHARE computes a part of
their tokens again, with all that comes before them.
"""

import argparse
import math
import time
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from refreshkv import RefreshCache, cli, decode_ahead, enable, tuned_compilation
from refreshkv.cache.keyword import as_keyword
from refreshkv.data.tokenizer import SpecialTokens
from refreshkv.generation.finite import FiniteLogits
from refreshkv.generation.inherited import forget_own_settings, refuse_own_settings, without_own_settings
from refreshkv.generation.report import TimedStreamer, generation_table
from refreshkv.loading import load_model, load_tokenizer, model_folder, own_config
from refreshkv.options import (
    add_budget,
    add_device,
    add_generation,
    add_model,
    add_overrides,
    add_schedule,
    changed_config,
    check_numbers,
    chosen_device,
    chosen_origin,
)
from refreshkv.prefix.chunks import load_chunks
from refreshkv.prefix.prompt_cache import keep_all_tokens
from refreshkv.prefix.recycling import Reuse, put_new, recycle
from refreshkv.prefix.store import PrefixStore
from refreshkv.reading import read_standard_input, read_text
from refreshkv.settings import SettingsError

PREFIX_STORE_GB = 20.0
MOST_BYTES_PER_TOKEN = 64
"""More bytes than this are in no text's tokens on average."""
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": 0.0}
"""The settings of sampling that are taken, from the options or the model's files, and their values without either."""


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    prompt = read_prompt(options.prompt_file)
    folder, origin = model_folder(options.model, "--model"), chosen_origin(options)
    tokenizer = load_tokenizer(folder, "--model", origin)
    model = load_model(folder, "--model", origin, dtype=options.dtype).eval()
    if options.ignore_generation_config:
        forget_own_settings(model)
    refuse_own_settings(model, taken=SAMPLING, samples=options.sample)
    cast(nn.Module, model).to(chosen_device(options.device))
    if options.tuned and model.device.type != "cuda":
        raise SettingsError(f"--tuned compiles for a GPU, and the model is on the {model.device.type}: leave it out")
    if options.documents:
        generate_after_documents(model, tokenizer, prompt, options)
        return
    ids = encode(prompt, tokenizer, model, options.max_new_tokens)
    cache = make_cache(model, ids.shape[1], options)
    if options.prefix_store is None:
        streamer = generate(model, tokenizer, ids, cache, options)
        print(f"\n{generation_table(ids.shape[1], streamer, cache, decoding=decoding(model, options))}")
    else:
        generate_with_store(model, tokenizer, ids, cache, options)


def generate_with_store(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    cache: RefreshCache | None,
    options: argparse.Namespace,
) -> None:
    """As without a store, but the prompt's beginning is taken from the store, and a new prompt is stored."""
    store = open_store(model, options)
    filled = keep_all_tokens(DynamicCache(config=model.config) if cache is None else cache)
    reuse = recycle(store, filled, ids)
    streamer = generate(model, tokenizer, ids, filled, options)
    print(f"\n{generation_table(ids.shape[1], streamer, cache, str(reuse), decoding(model, options))}")
    print(store_prompt(store, ids, filled, reuse, streamer.prompt_seconds))


def generate_after_documents(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, options: argparse.Namespace
) -> None:
    """Continues the documents and the prompt behind them; the store gives or gets each document as a chunk."""
    new, names = options.max_new_tokens, options.documents
    texts = [read_text(name, "--documents") for name in names]
    chunks = [
        encode(text, tokenizer, model, new, f"--documents: {name}") for name, text in zip(names, texts, strict=True)
    ]
    question = encode(prompt, tokenizer, model, new, behind_documents=True)
    ids = torch.cat([*chunks, question], dim=1)
    validate_length(ids.shape[1], model, new, "--documents")
    cache = make_cache(model, ids.shape[1], options)
    assert cache is not None  # --full is refused
    least = max(2, cache.config.observation_window)
    if question.shape[1] < least:
        raise SettingsError(
            f"--prompt-file: {question.shape[1]} tokens behind the documents, {least} are needed at least"
        )
    reuse = load_chunks(
        open_store(model, options),
        cache,
        list(chunks),
        first=options.recompute_first or 0,
        changed=options.recompute_changed or 0.0,
    )
    streamer = generate(model, tokenizer, ids, cache, options)
    print(f"\n{generation_table(ids.shape[1], streamer, cache, str(reuse), decoding(model, options))}")


def open_store(model: PreTrainedModel, options: argparse.Namespace) -> PrefixStore:
    most = int((options.prefix_store_gb or PREFIX_STORE_GB) * 10**9)
    shared = bool(options.prefix_store_shared)
    return PrefixStore(options.prefix_store, most, model, setting="--prefix-store", shared=shared)


def store_prompt(store: PrefixStore, ids: torch.Tensor, cache: Cache, reuse: Reuse, seconds: float) -> str:
    """Stores the prompt if it is new to the store; returns a line that says whether it was."""
    began = time.perf_counter()
    entry = put_new(store, ids, cache, reuse, seconds)
    if entry is None:
        return "prompt not stored: most of it was there, or it alone is more than --prefix-store-gb"
    return f"prompt stored: {entry.size / 1e6:.1f} MB in {time.perf_counter() - began:.2f} s"


def make_cache(model: PreTrainedModel, prompt_tokens: int, options: argparse.Namespace) -> RefreshCache | None:
    """The cache to decode with, and the model enabled for it; None with --full."""
    if options.full:
        return None
    flags = {"budget": options.budget, "stride": options.stride, "threshold": options.threshold}
    enable(model, changed_config(own_config(model.config), options.overrides, **flags))
    return RefreshCache(
        model.config, max_cache_len=prompt_tokens + options.max_new_tokens, offload=bool(options.offload)
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    cache: Cache | None,
    options: argparse.Namespace,
) -> TimedStreamer:
    """Prints the continuation of `ids`, (1, P), as it is decoded; returns the streamer with its times."""
    settings: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None}
    if options.sample:
        set_seed(options.seed or 0)
        settings = sampling_settings(model, options)
    if options.tuned:
        settings["compile_config"] = tuned_compilation()
    streamer, finite = TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), FiniteLogits("--model")
    with without_own_settings(model):
        cast(Any, model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **as_keyword(cache),
            custom_generate=decode_ahead,
            stream_to=streamer,
            logits_processor=[finite],
            do_sample=options.sample,
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **settings,
        )
    finite.validate()
    return streamer


def sampling_settings(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Any]:
    """The settings that --sample draws tokens with: the options', else the model's own, else those of transformers."""
    own = {name: getattr(model.generation_config, name, None) for name in SAMPLING}
    given = {"temperature": options.temperature, "top_p": options.top_p}
    chosen = {name: value for values in (SAMPLING, own, given) for name, value in values.items() if value is not None}
    if not isinstance(chosen["temperature"], (int, float)) or not 0 < chosen["temperature"] < math.inf:
        raise SettingsError(
            f"--model: its generation_config.json sets temperature={chosen['temperature']}, with which no token can be "
            "drawn: give --temperature, or leave out --sample"
        )
    return chosen


def decoding(model: PreTrainedModel, options: argparse.Namespace) -> str:
    """The settings under which tokens are chosen, as one line."""
    if not options.sample:
        return "greedy"
    chosen = {**sampling_settings(model, options), "seed": options.seed or 0}
    return "sampled, " + ", ".join(f"{name} {value}" for name, value in chosen.items())


def read_prompt(name: str) -> str:
    """The text of a file, or standard input for `-`. Raises `SettingsError` if there is none."""
    text = read_standard_input("--prompt-file") if name == "-" else read_text(name, "--prompt-file")
    if not text.strip():
        raise SettingsError(f"--prompt-file: {name} is empty; there is nothing to continue")
    return text


def encode(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_new_tokens: int,
    setting: str = "--prompt-file",
    behind_documents: bool = False,
) -> torch.Tensor:
    """The prompt's tokens, (1, P) int64 on the model's device. Raises `SettingsError` if the model cannot take them.

    Special tokens that the prompt names are special tokens. Those that the tokenizer puts behind every text are left
    out: they would end it; and so are those in front of it, if it comes behind documents.
    """
    limit = position_limit(model)
    size = len(prompt.encode())
    if limit is not None and size > limit * MOST_BYTES_PER_TOKEN:  # tokenizing it would take minutes and gigabytes
        raise SettingsError(
            f"{setting}: {size / 1e6:,.1f} MB are more than the model's max_position_embeddings={limit} tokens hold"
        )
    before, behind = (len(added) for added in SpecialTokens(tokenizer, "--model").added)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].long().to(model.device)
    ids = ids[:, before if behind_documents else 0 : ids.shape[1] - behind]
    length, vocabulary = ids.shape[1], cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    if length == 0:
        raise SettingsError(f"{setting}: the prompt has no tokens")
    if int(ids.max()) >= vocabulary:
        raise SettingsError(f"--model: its tokenizer gives token {int(ids.max())}, but the model has only {vocabulary}")
    validate_length(length, model, max_new_tokens)
    return ids


def position_limit(model: PreTrainedModel) -> int | None:
    """Most tokens of a text that the model's configuration allows; None if it does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def validate_length(length: int, model: PreTrainedModel, max_new_tokens: int, also: str | None = None) -> None:
    """Raises `SettingsError` if the prompt's tokens and the new ones are more than the model takes."""
    limit = position_limit(model)
    if limit is not None and length + max_new_tokens > limit:
        where = "" if also is None else f"{also}: "
        raise SettingsError(
            f"{where}--max-new-tokens={max_new_tokens} and the prompt's {length} tokens are more than the model's "
            f"max_position_embeddings={limit}"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--prompt-file", required=True, help="text to continue; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="(default: %(default)s)")
    add_budget(parser)
    add_schedule(parser)
    parser.add_argument(
        "--offload", action="store_true", default=None, help="keep all keys and values but the small cache's on the CPU"
    )
    parser.add_argument("--tuned", action="store_true", help="compile for one sequence on a GPU")
    parser.add_argument("--full", action="store_true", help="full attention, no small cache")
    parser.add_argument("--sample", action="store_true", help="sample; without it the likeliest token")
    parser.add_argument("--temperature", type=float, help="with --sample (default: the model's generation settings)")
    parser.add_argument("--top-p", type=float, help="with --sample (default: the model's generation settings)")
    parser.add_argument("--seed", type=int, help="with --sample (default: 0)")
    add_generation(parser)
    parser.add_argument("--prefix-store", help="folder of prompts' keys and values, made if need be")
    parser.add_argument("--prefix-store-gb", type=float, help=f"most GB in it (default: {PREFIX_STORE_GB})")
    parser.add_argument(
        "--prefix-store-shared", action="store_true", default=None, help="other users read and write there too"
    )
    parser.add_argument("--documents", nargs="+", metavar="FILE", help="texts before the prompt, each a stored chunk")
    parser.add_argument("--recompute-first", type=int, help="first tokens of each document to compute again")
    parser.add_argument("--recompute-changed", type=float, help="or the share of their tokens to compute again")
    add_device(parser)
    add_overrides(parser)
    options = parser.parse_intermixed_args(arguments)
    validate(options)
    return options


def validate(options: argparse.Namespace) -> None:
    """Raises `SettingsError` for values that cannot work, and for options that the others leave without effect."""
    check_numbers(options)
    if options.full:
        refuse_given(options, ("budget", "stride", "threshold", "offload"), "means nothing with --full")
        if options.overrides:
            raise SettingsError("refresh.key=value means nothing with --full")
    if options.tuned and (options.full or options.offload):
        other = "--full" if options.full else "--offload"
        raise SettingsError(f"--tuned compiles the step, and {other} does not: leave one out")
    if not options.sample:
        refuse_given(options, ("temperature", "top_p", "seed"), "needs --sample")
    if options.prefix_store is None:
        refuse_given(options, ("prefix_store_gb", "prefix_store_shared", "documents"), "needs --prefix-store")
    if not options.documents:
        refuse_given(options, ("recompute_first", "recompute_changed"), "needs --documents")
    elif options.full:
        raise SettingsError("--documents needs a small cache: leave out --full (--budget 100% keeps everything)")


def refuse_given(options: argparse.Namespace, names: tuple[str, ...], reason: str) -> None:
    """Raises `SettingsError` if one of the options was given."""
    for name in names:
        if getattr(options, name) is not None:
            raise SettingsError(f"--{name.replace('_', '-')} {reason}")


if __name__ == "__main__":
    cli.run(main)
