"""Make labelled training sets from a model and a trait, without outside services.

Usage: python scripts/make_training_sets.py smollm2-135m optimistic --out runs/sets --samples 2
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from persona_vectors.cli.judges import make_generate
from persona_vectors.cli.options import (
    Device,
    DeviceMap,
    DType,
    Fold,
    GenerateOption,
    MaxNewTokens,
    ModelArg,
    Seed,
    load_by_name,
)
from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import load_trait
from persona_vectors.training.sets import make_training_sets


def main(
    model: ModelArg,
    trait: Annotated[str, typer.Argument(metavar="TRAIT", help="a shipped trait's name, or a JSON file")],
    out: Annotated[Path, typer.Option(help="the folder to write; the same command goes on there")],
    questions: Annotated[
        Path | None, typer.Option(help="a text file, one question a line [default: the trait's evaluation questions]")
    ] = None,
    samples: Annotated[int, typer.Option(help="answers to each question under each instruction", min=1)] = 2,
    max_new_tokens: MaxNewTokens = 128,
    seed: Seed = 0,
    generate: GenerateOption = None,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Write positive, negative, plain and mixed JSONL sets of a model's own answers, system prompts dropped."""
    asked, elsewhere = None, make_generate(generate)
    if questions:
        asked = [line.strip() for line in questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    loaded, tokenizer = load_by_name(model, device=device, dtype=dtype, device_map=device_map, fold_system=fold_system)
    options = {"questions": asked, "samples": samples, "max_new_tokens": max_new_tokens, "seed": seed}
    options["generate"] = elsewhere
    for name, count in make_training_sets(loaded, tokenizer, load_trait(trait), out=out, **options).items():
        print(f"{count:6} samples -> {out}/{name}.jsonl")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
