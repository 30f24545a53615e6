"""The command that runs a neighbouring paper's system as a study: study."""

from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    Json,
    Load,
    ModelArg,
    Seed,
    app,
    command_line,
    echo_table,
    load_vectors,
    loads_models,
)
from persona_vectors.data.errors import InputError


@app.command()
@loads_models
def study(
    name: Annotated[str, typer.Argument(metavar="NAME", help="persona_judge, multi_personality ...")],
    model: ModelArg,
    *,
    vector: Annotated[
        list[str] | None,
        typer.Option(metavar="VECTOR", help="files or names of vectors (default: the shipped optimistic and humorous)"),
    ] = None,
    features: Annotated[
        Path | None, typer.Option(metavar="FILE", help="an autoencoder's W_dec, safetensors, for persona_features")
    ] = None,
    size: Annotated[int, typer.Option(help="how much of everything it takes", min=1)] = 4,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="where a killed run goes on; gets NAME.json and NAME.md")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    load: Load,
) -> None:
    """Run a system that a neighbouring paper describes, and print its table with intervals and what chance gives.

    Vectors are added where their files recommend it.

    Example: persona-vectors study persona_judge smollm2-135m --out runs/studies
    """
    from persona_vectors.model.loading import EMBEDDED
    from persona_vectors.studies.frame import module_of, run_study

    module_of(name, features)
    if not vector and model != EMBEDDED:
        raise InputError(f"vectors ship for {EMBEDDED} alone: give --vector, the file of one of {model}'s")
    vectors = load_vectors(vector or [f"{model}/{trait}" for trait in ("optimistic", "humorous")])
    loaded, tokenizer = load(model)
    options: dict[str, Any] = {"size": size, "seed": seed, "features": features, "out": out}
    found = run_study(name, loaded, tokenizer, vectors, **options, command=command_line())
    echo_table(found.rows(), as_json=as_json, text=found.page)
