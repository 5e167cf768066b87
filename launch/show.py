"""Generates a text from a small, refreshed KV cache, and writes a page that shows what each layer and head kept.

    python launch/show.py DIR_OR_HUB_ID --prompt-file FILE [--output page.html] [--budget 0.125] [refresh.key=value ...]

The page is one HTML file that needs no network: the text, which tokens each layer and key/value head kept at each full
and selecting step, which came back, and a slider through the generation (docs/show.md). Schedule, selection and prompt
are those of `generate`; tokens are the likeliest ones.
"""

import argparse
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refreshkv import RefreshCache, cli, decode_ahead, enable
from refreshkv.cache.keyword import as_keyword
from refreshkv.config import NEVER, RefreshConfig
from refreshkv.evaluation.caches import GREEDY
from refreshkv.evaluation.show.page import build_page, token_texts
from refreshkv.evaluation.show.recording import ChoiceRecorder, Recording
from refreshkv.folders import validate_folder
from refreshkv.generation.finite import FiniteLogits
from refreshkv.generation.inherited import forget_own_settings, refuse_own_settings, without_own_settings
from refreshkv.launch.generate import encode, read_prompt
from refreshkv.loading import load_model, load_tokenizer, model_folder, own_config
from refreshkv.options import (
    add_budget,
    add_device,
    add_generation,
    add_origin,
    add_overrides,
    add_schedule,
    changed_config,
    check_numbers,
    chosen_device,
    chosen_origin,
)
from refreshkv.reading import refuse_special_files
from refreshkv.settings import SettingsError


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    prompt = read_prompt(options.prompt_file)
    validate_output(options.output, options.overwrite)
    folder, origin = model_folder(options.model, "MODEL"), chosen_origin(options)
    tokenizer = load_tokenizer(folder, "MODEL", origin)
    model = load_model(folder, "MODEL", origin, dtype=options.dtype).eval()
    if options.ignore_generation_config:
        forget_own_settings(model)
    refuse_own_settings(model)
    flags = {"budget": options.budget, "stride": options.stride, "threshold": options.threshold}
    config = changed_config(own_config(model.config), options.overrides, **flags)
    cast(nn.Module, enable(model, config)).to(chosen_device(options.device))
    ids = encode(prompt, tokenizer, model, options.max_new_tokens)

    recording = record(model, tokenizer, ids, config, options.max_new_tokens)

    texts = token_texts(recording.tokens, tokenizer)
    page = build_page(recording, texts, f"RefreshKV: {options.model}", settings(recording, config, model))
    options.output.write_text(page, encoding="utf-8")
    print(f"{options.output}: {len(page) / 1e6:.1f} MB, {len(recording.tokens) - ids.shape[1]} new tokens")


def record(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, config: RefreshConfig, tokens: int
) -> Recording:
    """Generates up to `tokens` tokens after the prompt ids (1, P)."""
    cache = RefreshCache(model.config, ids.shape[1] + tokens, config)
    recorder, finite = ChoiceRecorder(cache, ids.shape[1]), FiniteLogits("MODEL")
    with without_own_settings(model):
        output = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **as_keyword(cache),
            custom_generate=decode_ahead,
            logits_processor=[finite, recorder],
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **GREEDY,
        )
    finite.validate()
    return recorder.finished(output)


def settings(recording: Recording, config: RefreshConfig, model: PreTrainedModel) -> dict[str, Any]:
    """What the page says below its title."""
    usual, own = RefreshConfig().to_dict(), config.to_dict()
    changed = {name: value for name, value in own.items() if value != usual[name] and name not in ("budget", "stride")}
    return {
        "prompt": f"{recording.prompt_length} tokens",
        "new": f"{len(recording.tokens) - recording.prompt_length} tokens",
        "K": recording.budget,
        "stride": "never" if config.stride == NEVER else config.stride,
        **changed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "date": time.strftime("%Y-%m-%d"),
    }


def validate_output(output: Path, overwrite: bool) -> None:
    """Raises `SettingsError` unless the page can be written, before the model is loaded."""
    validate_folder(output.parent, "--output")
    if output.is_dir():
        raise SettingsError(f"--output {output} is a folder: name a file, such as {output / 'page.html'}")
    refuse_special_files(output, "--output")  # a pipe would be waited for
    if output.exists() and not overwrite:
        raise SettingsError(f"--output {output} is there already: replace it with --overwrite, or name another file")
    if not output.parent.is_dir():
        raise SettingsError(f"--output {output}: there is no folder {output.parent}: make it first")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a transformers decoder")
    parser.add_argument("--prompt-file", required=True, help="text to continue; - reads standard input")
    parser.add_argument("--output", type=Path, default=Path("page.html"), help="(default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    add_budget(parser)
    add_schedule(parser)
    add_origin(parser)
    add_generation(parser)
    add_device(parser)
    add_overrides(parser)
    options = parser.parse_intermixed_args(arguments)
    check_numbers(options)
    return options


if __name__ == "__main__":
    cli.run(main)
