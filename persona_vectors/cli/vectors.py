"""Commands that show and convert vectors."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    BatchTokens,
    Json,
    LayerOption,
    Load,
    ModelArg,
    VectorArg,
    VectorArgs,
    app,
    echo_table,
    layers,
    load_vectors,
    loads_models,
    save_figure,
)
from persona_vectors.data.errors import InputError

FORMATS = "official, assistant-axis, assistant-axis-capping, steering-vectors, lm-eval, safetensors or "
FORMATS += "gguf (also as repeng or easysteer)"


@app.command()
def info(
    vectors: VectorArgs,
    plot: Annotated[Path | None, typer.Option(help="write one vector's evidence by layer to this PNG")] = None,
    as_json: Json = False,
) -> None:
    """Show what a vector file says: how it was made, how reliable it is at each layer, and where to use it.

    Several files are compared.
    """
    from persona_vectors.vectors.plots import plot_vector
    from persona_vectors.vectors.shipped import load_vector
    from persona_vectors.vectors.uses import to_json

    loaded = [load_vector(name) for name in vectors]
    if plot and len(loaded) > 1:
        raise InputError(f"--plot draws one vector, and {len(loaded)} were given: give one")
    if len(loaded) > 1:
        rows = [_summary(vector) for vector in loaded]
        echo_table(rows, as_json=as_json, text=lambda: _summaries(rows))
        return
    vector = loaded[0]
    rows = _by_layer(vector)
    facts = {"vector": repr(vector), "pooling": vector.pooling, **vector.info}
    uses = [str(use) for use in vector.uses.values()] or ["no recommended use is stored: see contrast --store"]
    table = {**facts, "uses": to_json(vector.uses), "layers": rows}
    echo_table([table], as_json=as_json, text=lambda: "\n".join([_one(facts, rows), "", *uses]))
    if plot:
        save_figure(plot_vector(vector), plot)
        typer.echo(f"plot -> {plot}", err=as_json)


@app.command()
def card(
    vectors: VectorArgs,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the Markdown file (default: print it)")] = None,
) -> None:
    """Write the card of vectors from their files: how they were made, the evidence, where to use them, the licence.

    It has the metadata that the Hugging Face Hub reads; `vector.push_to_hub` writes it too.

    Example: persona-vectors card optimistic.safetensors --out README.md
    """
    from persona_vectors.data.files import atomic_path
    from persona_vectors.vectors.card import vectors_card

    text = vectors_card(load_vectors(vectors))
    if out is None:
        typer.echo(text, nl=False)
        return
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    typer.echo(f"card -> {out}")


def _by_layer(vector: Any) -> list[dict[str, Any]]:
    """Return one row a layer: the vector's length, the residual stream's, and the evidence; None where unknown."""
    columns = {
        "norm": vector.directions.norm(dim=1),
        "residual_norm": vector.residual_norms,
        "split_half_cosine": vector.split_half_cosine,
        "separation": vector.separation,
    }
    return [
        {"layer": layer} | {name: None if c is None else float(c[layer]) for name, c in columns.items()}
        for layer in range(len(vector.directions))
    ]


def _one(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    shown = {k: json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else v for k, v in facts.items()}
    lines = [str(shown.pop("vector")), *(f"{key}: {value}" for key, value in shown.items())]
    lines.append("\nlayer    |v|  residual  split-half  separation")
    for row in rows:
        norm, residual, half, auroc = (_short(row[name]) for name in list(row)[1:])
        lines.append(f"{row['layer']:5} {norm:>6} {residual:>9} {half:>11} {auroc:>11}")
    return "\n".join(lines)


def _summary(vector: Any) -> dict[str, Any]:
    """Return a vector's row in a comparison, at the layer where it separates best."""
    row: dict[str, Any] = {"trait": vector.trait, "pairs": vector.info.get("pairs_kept")}
    row |= {purpose: _place(vector.uses.get(purpose)) for purpose in ("steer", "monitor", "flag")}
    if vector.separation is None:
        return row | dict.fromkeys(("layer", "separation", "split_half_cosine", "relative_norm"))
    best = _by_layer(vector)[int(vector.separation.argmax())]
    relative = None if best["residual_norm"] is None else best["norm"] / best["residual_norm"]
    kept = {name: best[name] for name in ("layer", "separation", "split_half_cosine")}
    return row | kept | {"relative_norm": relative}


def _place(use: Any) -> str | None:
    """Return where to use a vector, "no" where there is no evidence, None where it was not measured."""
    return None if use is None else use.place if use.evidence else "no"


def _summaries(rows: list[dict[str, Any]]) -> str:
    lines = [
        "trait           pairs  layer of best separation  separation  split-half  |v|/residual  steer; monitor; flag"
    ]
    for row in rows:
        pairs, layer = ("?" if row[name] is None else row[name] for name in ("pairs", "layer"))
        uses = "; ".join(row[purpose] or "?" for purpose in ("steer", "monitor", "flag"))
        auroc, half, ratio = (_short(row[name]) for name in ("separation", "split_half_cosine", "relative_norm"))
        lines.append(f"{row['trait']:14} {pairs:>6}  {layer:>24}  {auroc:>10}  {half:>10}  {ratio:>12}  {uses}")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"


@app.command()
@loads_models
def whiten(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    layer: LayerOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="a folder; or a .safetensors file, for one vector")],
    reference: Annotated[
        str | None, typer.Option(help="neutral samples, or a moments file (default: answers on plain facts)")
    ] = None,
    columns: Annotated[
        tuple[str, str] | None, typer.Option(metavar="PROMPT ANSWER", help="the two columns, where they are others")
    ] = None,
    split: Annotated[str, typer.Option(help="the split of a Hugging Face dataset")] = "train",
    first: Annotated[int | None, typer.Option(help="take only the first N samples", min=2)] = None,
    shrinkage: Annotated[float, typer.Option(help="of the mean variance, added to each direction's")] = 0.1,
    steers: Annotated[bool, typer.Option("--steers", help="have steer and its like take them, to compare")] = False,
    moments: Annotated[Path | None, typer.Option(help="write the moments here, a later run's --reference")] = None,
    batch_tokens: BatchTokens = None,
    as_json: Json = False,
    load: Load,
) -> None:
    """Make vectors for reading that weigh each direction by how little neutral answers vary along it.

    They can be monitored, projected on and flagged with like any other, at the layers given here; not steered with,
    unless --steers says so.

    Example: persona-vectors whiten smollm2-135m smollm2-135m/optimistic --layer 13,20 --reference neutral.jsonl
    -o whitened
    """
    from persona_vectors.model.blocks import chosen_layers
    from persona_vectors.vectors.moments import Moments, neutral_moments

    loaded_vectors, where = load_vectors(vectors), layers(layer)
    single = out.suffix == ".safetensors"
    if single and len(loaded_vectors) > 1:
        raise InputError(f"--out {out} is one file for {len(loaded_vectors)} vectors: give a folder")
    if reference and reference.endswith(".safetensors"):
        known = Moments.load(reference).only(chosen_layers(where, len(loaded_vectors[0].directions)))
    else:
        options: dict[str, Any] = {"columns": columns, "split": split, "first": first, "batch_tokens": batch_tokens}
        loaded, tokenizer = load(model)
        known = neutral_moments(loaded, tokenizer, reference, layer=where, **options)
    if moments:
        known.save(moments)
    lines, rows = [], []
    for vector in loaded_vectors:
        made = known.whiten(vector, shrinkage=shrinkage, steers=steers)
        path = out if single else out / f"{vector.trait}.safetensors"
        made.save(path)
        lines.append(f"{made!r}, by {known.count} answers of {known.source} -> {path}")
        rows.append({"trait": made.trait, "answers": known.count, "reference": known.source, "out": str(path)})
    echo_table(rows, as_json=as_json, text=lambda: "\n".join(lines))


@app.command(name="import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="another tool's vector file")],
    model: Annotated[str, typer.Option(help="the Hub id or name of the model that it is for")],
    trait: Annotated[str, typer.Option(help="the trait's name")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    format: Annotated[str | None, typer.Option(help=f"{FORMATS} (default: what the file looks like)")] = None,
    blocks: Annotated[int | None, typer.Option(help="the model's decoder blocks, where the file has fewer")] = None,
    experiment: Annotated[str | None, typer.Option(help="the id of one experiment in a capping config")] = None,
    as_json: Json = False,
) -> None:
    """Convert another tool's vector file to ours, with its conventions made ours.

    Example: persona-vectors import evil_response_avg_diff.pt --model my-org/my-7b --trait evil --out evil.safetensors
    """
    from persona_vectors.vectors.imports import import_vector

    vector = import_vector(file, model=model, trait=trait, format=format, blocks=blocks, experiment=experiment)
    vector.save(out)
    facts = [f"{key}: {value}" for key, value in vector.info.items()]
    row = {"trait": vector.trait, "model": vector.model, "out": str(out), **vector.info}
    echo_table([row], as_json=as_json, text=lambda: "\n".join([f"{vector!r} -> {out}", *facts]))


@app.command()
def export(
    vector: VectorArg,
    format: Annotated[str, typer.Option(help=FORMATS)],
    out: Annotated[Path, typer.Option(help="the file to write")],
    layer: Annotated[int | None, typer.Option(help="one block alone (default: all of them)")] = None,
    hookpoint: Annotated[str, typer.Option(help="for lm-eval: a block's path in the model")] = "layers.{layer}",
    as_json: Json = False,
) -> None:
    """Write a vector in another tool's format, and say what that format cannot hold.

    Example: persona-vectors export optimistic.safetensors --format gguf --layer 13 --out optimistic.gguf
    """
    from persona_vectors.vectors.exports import export_vector
    from persona_vectors.vectors.shipped import load_vector

    lost = export_vector(load_vector(vector), out=out, format=format, layer=layer, hookpoint=hookpoint)
    row = {"format": format, "out": str(out), "lost": lost}
    echo_table([row], as_json=as_json, text=lambda: "\n".join([f"{format} -> {out}", *lost]))
