#!/usr/bin/env bash
# Sets the environment up if need be, checks format and lint, and runs the tests:   bash launch/test.sh [PYTEST ARGUMENTS]
#
#   bash launch/test.sh                            everything but the tests marked slow
#   bash launch/test.sh tests/attention/test_parity.py -x    one file, stopping at the first failure
#   bash launch/test.sh -n 0 -k window             some tests, without worker processes
#   bash launch/test.sh -m slow tests/train        the tests of a folder that are marked slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh test
export PATH="$(cd "${VENV:-.venv}" && pwd)/bin:$PATH" # the tests start deepspeed and python by name

# One thread per worker, or the workers fight over the cores. Nothing is fetched from a hub.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

ruff format --check .
ruff check .
exec python -m pytest -n 2 --dist worksteal "$@"
