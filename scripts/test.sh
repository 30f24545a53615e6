#!/usr/bin/env bash
# Every check: lint, types, the unit tests (offline), those of whole processes, then the embedded model, README, notebooks.
# Usage: bash scripts/test.sh [options of pytest, for each of the three runs, such as -k steer]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh dev
bin=.venv/bin
peers=.venv/.peers  # compared with in the tests; their own pins would downgrade numpy and transformers
if [ ! -e "$peers" ]; then
    $bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        repeng==0.4.0 steering-vectors==0.12.2 xllamacpp==2026.10.11549
    touch "$peers"
fi
$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
tests() { $bin/python -m pytest "$@" || [ $? -eq 5 ]; }  # 5: -k chose none of this part's tests
export OMP_NUM_THREADS=1  # two processes of one thread each get through more than one of two
for part in "not real and not slow" slow real; do
    tests -m "$part" -n 2 --dist worksteal "$@"
done
