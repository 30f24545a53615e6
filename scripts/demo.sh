#!/usr/bin/env bash
# Extract a persona vector from the embedded model and steer with it, from nothing but Python and pip.
# Usage: bash scripts/demo.sh [options of "persona-vectors demo"]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh ""
exec .venv/bin/persona-vectors demo "$@"
