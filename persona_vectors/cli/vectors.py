"""Commands that make, show and convert vectors."""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    JUDGES,
    BatchTokens,
    Device,
    DeviceMap,
    DType,
    Fold,
    MaxNewTokens,
    ModelArg,
    Seed,
    app,
    load,
)
from persona_vectors.data.errors import InputError

FORMATS = "official, assistant-axis, assistant-axis-capping, steering-vectors, lm-eval, gguf or safetensors"


@app.command()
def traits() -> None:
    """List the traits that ship with the package."""
    from persona_vectors.data.traits import list_traits, load_trait

    for name in list_traits():
        typer.echo(f"{name:14} {load_trait(name).description.split('. ')[0].rstrip('.')}.")


@app.command()
def extract(
    model: ModelArg,
    trait: Annotated[str, typer.Argument(metavar="TRAIT", help="a shipped trait's name, or a JSON file")],
    out: Annotated[Path | None, typer.Option(help="[default: vectors/MODEL/TRAIT.safetensors]")] = None,
    judge: Annotated[str | None, typer.Option(help=f"{JUDGES} [default: contrast]")] = None,
    samples: Annotated[int, typer.Option(help="answers to each question under each instruction", min=1)] = 10,
    questions: Annotated[int | None, typer.Option(help="use only the first N questions", min=1)] = None,
    max_new_tokens: MaxNewTokens = 1000,
    batch_tokens: BatchTokens = None,
    pooling: Annotated[str, typer.Option(help="response_mean, prompt_mean or prompt_last")] = "response_mean",
    seed: Seed = 0,
    rollouts: Annotated[Path | None, typer.Option(help="keep the answers here; the same command goes on there")] = None,
    from_: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--from", metavar="POS NEG", help="ready-made rollouts: our JSONL or official CSVs"),
    ] = None,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Extract a trait's persona vector from a model and save it.

    Generates answers under the trait's positive and negative instructions, has them judged, and takes the difference of
    mean activations at every layer. Interrupted with --rollouts FILE, the same command goes on where it stopped.

    Example: persona-vectors extract smollm2-135m optimistic --samples 2 --max-new-tokens 40
    """
    from persona_vectors.cli.judges import make_judge
    from persona_vectors.data.traits import load_trait
    from persona_vectors.extraction import difference as extraction
    from persona_vectors.extraction.rollouts import load_rollouts

    loaded_trait = load_trait(trait)
    loaded, tokenizer = load(model, device, dtype, device_map, fold_system)
    spec = judge or ("none" if from_ else "contrast")
    chosen = make_judge(spec, loaded, tokenizer, loaded_trait, lambda name: load(name, device, dtype, device_map))
    common: dict[str, Any] = {"judge": chosen, "pooling": pooling, "batch_tokens": batch_tokens}
    if from_:
        sides = zip(("pos", "neg"), from_)
        ready = [r for side, p in sides for r in load_rollouts(p, side=side, trait=loaded_trait, tokenizer=tokenizer)]
        vector = extraction.extract_from(loaded, tokenizer, loaded_trait, ready, **common)
    else:
        vector = extraction.extract(
            loaded,
            tokenizer,
            loaded_trait,
            samples=samples,
            questions=questions,
            max_new_tokens=max_new_tokens,
            seed=seed,
            rollouts=rollouts,
            **common,
        )
    path = out or Path("vectors") / Path(vector.model).name / f"{vector.trait}.safetensors"
    arguments = [Path(text).name if text.startswith("/") else text for text in sys.argv[1:]]
    replace(vector, info={**vector.info, "command": shlex.join(["persona-vectors", *arguments])}).save(path)
    typer.echo(f"{vector!r} -> {path}")


@app.command()
def info(
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTOR...", help="one or more .safetensors files")],
    plot: Annotated[Path | None, typer.Option(help="write one vector's evidence by layer to this PNG")] = None,
) -> None:
    """Show what a vector file says: how it was made, and how reliable it is at each layer; or compare several files."""
    from persona_vectors.data.files import atomic_path
    from persona_vectors.vectors.vector import PersonaVector

    loaded = [PersonaVector.load(path) for path in vectors]
    if plot and len(loaded) > 1:
        raise InputError(f"--plot draws one vector, and {len(loaded)} were given: give one")
    if len(loaded) > 1:
        typer.echo("trait           pairs  layer of best separation  separation  split-half  |v|/residual")
        for vector in loaded:
            _echo_summary(vector)
        return
    vector = loaded[0]
    typer.echo(repr(vector))
    typer.echo(f"pooling: {vector.pooling}")
    for key, value in vector.info.items():
        typer.echo(f"{key}: {json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value}")
    typer.echo("\nlayer    |v|  residual  split-half  separation")
    columns = [vector.directions.norm(dim=1), vector.residual_norms, vector.split_half_cosine, vector.separation]
    for layer in range(len(vector.directions)):
        norm, residual, half, auroc = ("?" if c is None else f"{c[layer]:.2f}" for c in columns)
        typer.echo(f"{layer:5} {norm:>6} {residual:>9} {half:>11} {auroc:>11}")
    if plot:
        from persona_vectors.vectors.plots import plot_vector

        with atomic_path(plot) as temporary:
            plot_vector(vector).savefig(temporary, dpi=150)
        typer.echo(f"plot -> {plot}")


def _echo_summary(vector: Any) -> None:
    """Print one line about a vector, at the layer where it separates best."""
    known = vector.separation is not None
    layer = int(vector.separation.argmax()) if known else 0
    ratio = None if vector.residual_norms is None else vector.directions.norm(dim=1) / vector.residual_norms
    values = [vector.separation, vector.split_half_cosine, ratio]
    auroc, half, relative = ("?" if value is None or not known else f"{value[layer]:.2f}" for value in values)
    pairs = vector.info.get("pairs_kept", "?")
    typer.echo(f"{vector.trait:14} {pairs:>6}  {layer if known else '?':>24}  {auroc:>10}  {half:>10}  {relative:>12}")


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="another tool's vector file")],
    model: Annotated[str, typer.Option(help="the Hub id or name of the model that it is for")],
    trait: Annotated[str, typer.Option(help="the trait's name")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    format: Annotated[str | None, typer.Option(help=f"{FORMATS} [default: what the file looks like]")] = None,
    layers: Annotated[int | None, typer.Option(help="the model's decoder blocks, where the file has fewer")] = None,
    experiment: Annotated[str | None, typer.Option(help="the id of one experiment in a capping config")] = None,
) -> None:
    """Convert another tool's vector file to ours, with its conventions made ours.

    Example: persona-vectors import evil_response_avg_diff.pt --model my-org/my-7b --trait evil --out evil.safetensors
    """
    from persona_vectors.vectors.imports import import_vector

    vector = import_vector(file, model=model, trait=trait, format=format, layers=layers, experiment=experiment)
    vector.save(out)
    typer.echo(f"{vector!r} -> {out}")
    for key, value in vector.info.items():
        typer.echo(f"{key}: {value}")


@app.command()
def export(
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="a .safetensors file of ours")],
    format: Annotated[str, typer.Option(help=FORMATS)],
    out: Annotated[Path, typer.Option(help="the file to write")],
    layer: Annotated[int | None, typer.Option(help="one block alone [default: all of them]")] = None,
    hookpoint: Annotated[str, typer.Option(help="for lm-eval: a block's path in the model")] = "layers.{layer}",
) -> None:
    """Write a vector in another tool's format, and say what that format cannot hold.

    Example: persona-vectors export optimistic.safetensors --format gguf --layer 13 --out optimistic.gguf
    """
    from persona_vectors.vectors.exports import export_vector
    from persona_vectors.vectors.vector import PersonaVector

    lost = export_vector(PersonaVector.load(vector), out, format=format, layer=layer, hookpoint=hookpoint)
    typer.echo("\n".join([f"{format} -> {out}", *lost]))
