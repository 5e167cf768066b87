#!/usr/bin/env bash
# From text to an adapted model on two CPU ranks, by the scripts that any user would call:   bash launch/quickstart.sh
#
# Rows go to rows/python-stdlib and are kept; everything else goes to runs/quickstart, which must not be in use:
#   bash launch/quickstart.sh --overwrite    replaces what an earlier call left there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
runs=runs/quickstart rows=rows/python-stdlib overwrite="${1:-}"
if [[ -n "$overwrite" && "$overwrite" != --overwrite ]]; then
    echo "error: unknown argument $overwrite; there is only --overwrite" >&2
    exit 2
fi
if [[ -e "$runs" && -z "$overwrite" ]]; then
    echo "error: $runs is in use; replace it with: bash launch/quickstart.sh --overwrite" >&2
    exit 2
fi

bash launch/setup.sh
export PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
started=$SECONDS
say() { echo; echo "== $* ($((SECONDS - started)) s)"; }

# shellcheck disable=SC2086 # $overwrite is one word or none
{
    say "rows from the sources of the running Python"
    [[ -e "$rows/rows.json" ]] || python launch/prepare.py --config configs/quickstart.yaml

    say "a base model, attention in full"
    deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart.yaml $overwrite
    python launch/export.py "$runs/base" "$runs/base-model" $overwrite

    say "before: the base model decoding from a small cache"
    evaluate=(python launch/evaluate.py --data "$rows" --rows 64 --last-tokens 128 --batch-size 8 --strides 10,50 $overwrite)
    "${evaluate[@]}" --model "$runs/base-model" --output "$runs/before"

    say "continued pretraining with the refresh pattern"
    deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart-refresh.yaml $overwrite
    python launch/export.py "$runs/refresh" "$runs/refresh-model" $overwrite

    say "a sample from the adapted model"
    python launch/generate.py --model "$runs/refresh-model" --prompt-file train/simulation.py --max-new-tokens 60 \
        --sample --temperature 0.7

    say "before and after"
    "${evaluate[@]}" --model "$runs/refresh-model" --output "$runs/after" --compare "$runs/before"
}
say "done: the adapted model is in $runs/refresh-model, the report in $runs/after"
