#!/usr/bin/env bash
# Makes the virtual environment .venv for training and evaluation:   bash launch/setup.sh [EXTRAS]
#
#   EXTRAS   further extras of pyproject.toml than train and eval, separated by commas: test, tasks, gpu, flash-attn, ...
#   PYTHON   the interpreter to build from (default: python3)
#   VENV     where the environment goes (default: .venv in the repository)
#
# pip's own settings hold. On Linux, PyPI's torch is the CUDA build, several gigabytes; with PIP_EXTRA_INDEX_URL set to
# PyTorch's index of CPU builds, pip takes that one instead.
# A second call returns at once unless pyproject.toml, constraints.txt or the extras have changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="train,eval,${1:-}"
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
python="$VENV/bin/python"
stamp="$VENV/.refreshkv-setup"

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
install() { "$python" -m pip install -qq --disable-pip-version-check --constraint constraints.txt "$@"; }
# What an environment depends on. The folder is part of it: an editable install points there.
fingerprint() { { pwd; cat pyproject.toml constraints.txt; } | cksum; }

known="$(sed -n '/^\[project.optional-dependencies\]/,/^$/s/^\([a-z0-9-]*\) = .*/\1/p' pyproject.toml | paste -sd ' ' -)"
for extra in ${extras//,/ }; do
    [[ " $known " == *" $extra "* ]] || fail "unknown extra '$extra'; pyproject.toml has: $known"
done

# The stamp's first line is the fingerprint, the second the extras installed so far, which later calls keep.
installed=""
if [[ -f "$stamp" ]]; then
    installed="$(sed -n 2p "$stamp")"
    missing=""
    for extra in ${extras//,/ }; do
        [[ ",$installed," == *",$extra,"* ]] || missing="yes"
    done
    if [[ -z "$missing" && "$(sed -n 1p "$stamp")" == "$(fingerprint)" ]]; then exit 0; fi
fi
extras="$(echo "$installed,$extras" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd ',' -)"

command -v "$PYTHON" > /dev/null || fail "no '$PYTHON' found; set PYTHON to an interpreter, version 3.10 or later"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "Python 3.10 or later is needed, '$PYTHON' is $("$PYTHON" --version 2>&1); set PYTHON to a newer one"
started=$SECONDS
if ! "$python" -m pip --version > /dev/null 2>&1; then
    say "making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv "$VENV" || fail "python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
fi
rm -f "$stamp"

# torch first and alone, so that the pinned version is the one that everything after it finds.
say "1/3 pip and torch (the largest download)"
install pip setuptools wheel
install torch

# DeepSpeed is built from source, in isolation: its setup.py refuses a machine that has a GPU but no CUDA toolkit if it
# can import torch. No kernels are compiled now; it compiles those it needs when they are first used.
say "2/3 DeepSpeed"
DS_BUILD_OPS=0 install --build-constraint constraints.txt deepspeed

# Without isolation, because flash-attn builds against the installed torch (and imports wheel).
say "3/3 refreshkv with $extras"
install --no-build-isolation --editable ".[$extras]"

printf '%s\n%s\n' "$(fingerprint)" "$extras" > "$stamp"
say "done in $((SECONDS - started)) s; to use it: source $VENV/bin/activate"
