"""Chats with a model that decodes from a small, refreshed KV cache, and shows what each answer took.

    python launch/chat.py DIR_OR_HUB_ID [--context 8192] [refresh.key=value ...]

The model's chat template is used. All turns stay in one cache of --context tokens, so that a turn costs what is new in
it. Below each answer stand its tokens, their rate, and how many steps were full and selecting steps. /reset begins
another chat; /exit or the end of the input ends the program; Ctrl-C stops an answer.

The schedule and the selection are the ones saved with the model, or else the paper's; refresh.key=value changes them.
Tokens are the likeliest ones, or drawn with --sample.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from refreshkv import RefreshCache, cli, enable, generate
from refreshkv.cache.keyword import as_keyword
from refreshkv.generation.chat import Conversation, steps_line
from refreshkv.generation.finite import FiniteLogits
from refreshkv.generation.inherited import forget_own_settings, refuse_own_settings, without_own_settings
from refreshkv.generation.report import TimedStreamer
from refreshkv.launch.generate import SAMPLING, refuse_given, sampling_settings
from refreshkv.loading import load_model, load_tokenizer, model_folder, own_config
from refreshkv.options import (
    add_budget,
    add_device,
    add_generation,
    add_origin,
    add_overrides,
    changed_config,
    check_numbers,
    chosen_device,
    chosen_origin,
)
from refreshkv.settings import SettingsError

CONTEXT = 8192
"""Most tokens of a chat, unless the model takes fewer."""
NOT_TEXT = "{} is not UTF-8 text: convert it, for example with iconv -t utf-8"


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    validate_text(options.system or "", "--system")
    folder, origin = model_folder(options.model, "MODEL"), chosen_origin(options)
    tokenizer = load_tokenizer(folder, "MODEL", origin)
    conversation = Conversation(tokenizer, options.system)
    model = load_model(folder, "MODEL", origin, dtype=options.dtype).eval()
    if options.ignore_generation_config:
        forget_own_settings(model)
    refuse_own_settings(model, taken=SAMPLING, samples=options.sample)
    cast(nn.Module, model).to(chosen_device(options.device))
    enable(model, changed_config(own_config(model.config), options.overrides, budget=options.budget))
    set_seed(options.seed or 0)
    cache = RefreshCache(config=model.config, max_cache_len=context(model, options))
    for text in messages():
        if text == "/reset":
            conversation.reset()
            print("(another chat)", flush=True)
        else:
            print(answer(model, tokenizer, conversation, cache, text, options), flush=True)


def context(model: PreTrainedModel, options: argparse.Namespace) -> int:
    """Tokens that the cache holds. Raises `SettingsError` if the model cannot take as many as were asked for."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if options.context is None:
        return min(CONTEXT, limit or CONTEXT)
    if limit is not None and options.context > limit:
        raise SettingsError(f"--context={options.context} is more than the model's max_position_embeddings={limit}")
    return options.context


def messages() -> Iterator[str]:
    """The user's lines that are not empty, up to /exit or the end of the input."""
    while True:
        try:
            text = input("> " if sys.stdin is not None and sys.stdin.isatty() else "").strip()
        except (EOFError, RuntimeError):  # a closed standard input is a RuntimeError
            return
        except UnicodeDecodeError:
            raise SettingsError(NOT_TEXT.format("standard input")) from None
        validate_text(text, "standard input")
        if text == "/exit":
            return
        if text:
            yield text


def validate_text(text: str, whose: str) -> None:
    """Raises `SettingsError` for a text with bytes that are not UTF-8, which some locales let through."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingsError(NOT_TEXT.format(whose)) from None


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    cache: RefreshCache,
    text: str,
    options: argparse.Namespace,
) -> str:
    """Prints the answer to `text` as it is decoded; returns a line that says what it took."""
    tokens = conversation.prompt(text)
    if not conversation.tokens:
        cache.reset()
    known, room = cache.length, cache.capacity - len(tokens)
    if room < 1:
        conversation.messages.pop()
        return f"(no room: the chat has {len(tokens)} tokens of --context={cache.capacity}; begin another with /reset)"
    streamer, finite = TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), FiniteLogits("MODEL")
    settings = {
        **decoding_settings(model, tokenizer, options),
        "max_new_tokens": min(options.max_new_tokens, room),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.long, device=model.device),
        "logits_processor": [finite],
    }
    ids = torch.tensor([tokens], device=model.device)
    try:
        with without_own_settings(model):
            ids = generate(model, ids, **as_keyword(cache), streamer=streamer, **settings)
    except KeyboardInterrupt:
        conversation.messages.pop()
        conversation.tokens = []
        return "\n(stopped; the question is forgotten)"
    finite.validate()
    new = ids[0, len(tokens) :].tolist()
    conversation.add_answer(ids[0].tolist(), str(tokenizer.decode(new, skip_special_tokens=True)))
    return took(streamer, cache, len(tokens), len(tokens) - known)


def decoding_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> dict[str, Any]:
    """How tokens are chosen, and which end an answer."""
    chosen = sampling_settings(model, options) if options.sample else {}
    end = model.generation_config.eos_token_id
    return {
        **chosen,
        "do_sample": options.sample,
        "eos_token_id": tokenizer.eos_token_id if end is None else end,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }


def took(streamer: TimedStreamer, cache: RefreshCache, prompt_tokens: int, computed: int) -> str:
    """What an answer took, as one line."""
    rate = "" if streamer.token_seconds is None else f" at {1 / streamer.token_seconds:.1f} tokens/s"
    prompt = f"{computed} of {prompt_tokens} prompt tokens computed in {streamer.prompt_seconds:.2f} s"
    small = cache.config.largest_budget(prompt_tokens)
    used = f"{cache.length} of {cache.capacity} tokens in the cache, {small} in the small one"
    return f"({streamer.new_tokens} tokens{rate}; {steps_line(cache, prompt_tokens)}; {prompt}; {used})"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", metavar="MODEL", help="folder or Hub id of a transformers decoder with a chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the first message")
    parser.add_argument("--context", type=int, help=f"most tokens of a chat (default: {CONTEXT} at most)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of one answer (default: %(default)s)")
    add_budget(parser)
    parser.add_argument("--sample", action="store_true", help="sample; without it the likeliest token")
    parser.add_argument("--temperature", type=float, help="with --sample (default: the model's generation settings)")
    parser.add_argument("--top-p", type=float, help="with --sample (default: the model's generation settings)")
    parser.add_argument("--seed", type=int, help="with --sample (default: 0)")
    add_origin(parser)
    add_generation(parser)
    add_device(parser)
    add_overrides(parser)
    options = parser.parse_intermixed_args(arguments)
    check_numbers(options)
    if not options.sample:
        refuse_given(options, ("temperature", "top_p", "seed"), "needs --sample")
    return options


if __name__ == "__main__":
    cli.run(main)
