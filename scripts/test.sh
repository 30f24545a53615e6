#!/usr/bin/env bash
# Every check: lint, types, the unit tests (offline), then the tests on the embedded model, README and notebooks.
# Usage: bash scripts/test.sh [options of pytest, for both runs]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh dev
bin=.venv/bin
$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
OMP_NUM_THREADS=1 $bin/python -m pytest -m "not real" -n 2 "$@"
$bin/python -m pytest -m real "$@"
