#!/usr/bin/env bash
# From text to an adapted model on two CPU ranks, by the scripts that any user would call:   bash launch/quickstart.sh
#
# Rows go to rows/numpy-tests and are kept; everything else goes to runs/quickstart, which must not be in use:
#   bash launch/quickstart.sh --overwrite    replaces what an earlier call left there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
base=base/python-4m runs=runs/quickstart rows=rows/numpy-tests overwrite="${1:-}"
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
export DS_ACCELERATOR=cpu TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
threads_of_a_rank="${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}"
started=$SECONDS
say() { echo; echo "== $* ($((SECONDS - started)) s)"; }

# shellcheck disable=SC2086 # $overwrite is one word or none
{
    say "rows from the tests of the installed NumPy, which the base model has not read"
    [[ -e "$rows/rows.json" ]] || python launch/prepare.py --config configs/quickstart.yaml

    say "before: the base model decoding from a small cache"
    evaluate=(python launch/evaluate.py --data "$rows" --rows 64 --last-tokens 128 --strides 10,50
        --batch-size 8 --dtype float32 $overwrite)
    "${evaluate[@]}" --model "$base" --output "$runs/before" refresh.budget=64

    say "continued pretraining with the refresh pattern"
    OMP_NUM_THREADS="$threads_of_a_rank" \
        deepspeed --num_accelerators 2 launch/train.py --config configs/quickstart.yaml $overwrite
    python launch/export.py "$runs/training" "$runs/model" $overwrite

    say "a sample from the adapted model"
    python launch/generate.py --model "$runs/model" --prompt-file tests/attention/test_compiled_step.py --max-new-tokens 60 \
        --sample --temperature 0.7

    say "before and after"
    "${evaluate[@]}" --model "$runs/model" --output "$runs/after" --compare "$runs/before"
}
say "done: the adapted model is in $runs/model, the report in $runs/after"
