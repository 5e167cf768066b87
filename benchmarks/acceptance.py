"""How many drafts of lossless decoding full attention accepts: a real model on prepared sequences.

    python benchmarks/acceptance.py --model DIR_OR_HUB_ID --data ROWS [--data ROWS] [--rows 16] [--new 256] [--sample]

The first tokens of each sequence are a prompt. The model generates --new tokens after it by decode_lossless, greedily
or drawn at temperature 1. Drafts come from RefreshConfig.recommended(), with selections that serve --select-stride
tokens. For each text the table has the share of the judged drafts that full attention accepted, and the new tokens of a
round. --output DIR writes acceptance.json, after each batch.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from output import save
from refreshkv import DraftCounts, RefreshCache, RefreshConfig, SettingsError, decode_lossless, enable
from refreshkv.cache.keyword import as_keyword
from refreshkv.evaluation.reports import hardware
from refreshkv.tables import column_table
from texts import add_texts, open_model, read_sequences


def main() -> None:
    args = read_arguments()
    refresh = RefreshConfig.recommended(budget=args.budget, select_stride=args.select_stride)
    folder, model = open_model(args, getattr(torch, args.dtype))
    enable(model, refresh)
    about = f"{hardware()}, torch {torch.__version__}, {time.strftime('%d %B %Y')}"
    results: list[dict[str, Any]] = []
    found = {"about": about, "settings": {**vars(args), "output": None}, "results": results}
    for data in args.data:
        prompts = read_prompts(model, folder, data, args).to(args.device)
        counts = DraftCounts()
        results.append({})
        for batch in tqdm(prompts.split(args.batch_size), desc=Path(data).name, unit="batch"):
            write(model, batch, refresh, counts, args)
            results[-1] = {"data": Path(data).name, **vars(counts), "acceptance": counts.acceptance}
            results[-1]["tokens a round"] = counts.tokens_per_round
            save(args.output, "acceptance.json", found)
    print(about, table(results), sep="\n")


def read_prompts(model: Any, folder: str, data: str, args: argparse.Namespace) -> Tensor:
    """The first tokens of the prepared sequences, (rows, P). Raises `SettingsError` if the sequences are shorter than
    --prompt, or have other tokens than the model in `folder`."""
    ids = read_sequences(model, folder, data, args.split, args.rows)
    if not 1 <= args.prompt <= ids.shape[1]:
        raise SettingsError(
            f"--prompt={args.prompt}: the sequences of {data} have {ids.shape[1]} tokens: ask for fewer"
        )
    return ids[:, : args.prompt]


def write(model: Any, prompts: Tensor, refresh: RefreshConfig, counts: DraftCounts, args: argparse.Namespace) -> None:
    """Generates after these prompts, (B, P), and adds to `counts` what was drafted and accepted."""
    torch.manual_seed(args.seed)
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        **as_keyword(RefreshCache(model.config, prompts.shape[1] + args.new + 64, refresh)),
        max_new_tokens=args.new,
        **({"do_sample": True, "top_k": 0} if args.sample else {"do_sample": False}),
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=True,
        custom_generate=decode_lossless,
        draft_length=args.draft_length,
        drafts=counts,
    )


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        (line["data"], str(line["judged"]), f"{line['acceptance']:.1%}", f"{line['tokens a round']:.2f}")
        for line in results
    ]
    return column_table([("text", "judged drafts", "accepted", "tokens a round"), *lines], text_columns=1)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_texts(parser, rows=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=7680, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens that are written after it")
    parser.add_argument("--budget", type=int, default=1024, help="tokens of the small cache")
    parser.add_argument("--select-stride", type=int, default=2, help="tokens that a selection serves")
    parser.add_argument("--sample", action="store_true", help="draw tokens at temperature 1 instead of the likeliest")
    parser.add_argument("--draft-length", type=int, help="drafts of a round (default: by the acceptance so far)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for acceptance.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
