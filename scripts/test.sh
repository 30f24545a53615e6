#!/usr/bin/env bash
# Every check: lint, types, the unit tests (offline), then the tests on the embedded model, README and notebooks.
# Usage: bash scripts/test.sh [options of pytest, for both runs]
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
OMP_NUM_THREADS=1 $bin/python -m pytest -m "not real" -n 2 "$@"
$bin/python -m pytest -m real "$@"
