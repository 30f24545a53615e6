#!/usr/bin/env bash
# Extract all shipped traits from one model, one command each: the vectors of vectors/smollm2-135m were made by this.
# Usage: bash scripts/extract_all.sh [MODEL [EXTRACT OPTIONS]]     (interrupted, it goes on where it stopped)
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-smollm2-135m}
shift || true
[ $# -gt 0 ] || set -- --samples 1 --max-new-tokens 48 --judge contrast:2
command=persona-vectors
[ ! -x .venv/bin/persona-vectors ] || command=.venv/bin/persona-vectors
for trait in $($command traits | cut -d' ' -f1); do
    "$command" extract "$model" "$trait" "$@" --rollouts "runs/$(basename "$model")/$trait.jsonl"
done
