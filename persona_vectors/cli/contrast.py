"""The command that measures vectors without a judge: contrast."""

from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    Json,
    Load,
    ModelArg,
    Positions,
    Seed,
    Store,
    VectorArgs,
    app,
    check_storable,
    command_line,
    echo_table,
    layers,
    load_vectors,
    loads_models,
    numbers,
    run_file,
    store_use,
)
from persona_vectors.data.errors import InputError


@app.command()
@loads_models
def contrast(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    statements: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="what to score, one for each vector in their order")
    ] = None,
    first: Annotated[int | None, typer.Option(help="take only the first N pairs of statements", min=10)] = None,
    layer: Annotated[
        list[str] | None, typer.Option(metavar="LAYER", help="layers to choose from (default: five in the middle)")
    ] = None,
    doses: Annotated[list[str], typer.Option(help="to choose from: fractions of the residual norm")] = ["0.1,0.2,0.4"],  # noqa: B006
    controls: Annotated[int, typer.Option(help="random vectors of the same norm, half of each kind", min=2)] = 100,
    max_perplexity: Annotated[float, typer.Option(help="highest on plain facts, times the plain model's")] = 1.5,
    positions: Positions = "all",
    store: Store = False,
    seed: Seed = 0,
    as_json: Json = False,
    load: Load,
) -> None:
    """Show which vectors move their trait's likelihood contrast, beside random vectors and prompt paraphrases.

    Each vector's layer and dose are chosen on eight pairs of its trait's statements; all numbers are from the other
    pairs, in nats a token, as differences from the plain model. No judge and no sampling. --statements takes your own,
    or the rows of a persona eval of Anthropic's or of a CAA file, which are counterbalanced. Interrupted,
    the same command goes on where it stopped.

    Example: persona-vectors contrast smollm2-135m vectors/smollm2-135m/*.safetensors
    """
    from persona_vectors.data.traits import list_traits, load_trait
    from persona_vectors.evaluation.contrast import contrast_effect, effect_matrix
    from persona_vectors.evaluation.likelihood import load_statements

    loaded_vectors = load_vectors(vectors)
    check_storable(vectors if store else [])
    names = statements or [vector.trait for vector in loaded_vectors]
    if len(names) != len(loaded_vectors):
        raise InputError(
            f"{len(names)} statements for {len(loaded_vectors)} vectors: give --statements for each vector"
        )
    scored = {v.trait: load_statements(name, first=first) for v, name in zip(loaded_vectors, names)}
    options: dict[str, Any] = {"doses": numbers(doses, option="--doses"), "controls": controls, "seed": seed}
    options["positions"] = positions
    loaded, tokenizer = load(model)
    kept, found = run_file("contrast", loaded, "-".join(scored)[:60]), []
    for vector in loaded_vectors:
        count = len(vector.directions)
        middle = list(range(count // 3, count - count // 6, max(1, count // 10)))[:5]
        options |= {"layer": layers(layer) if layer else middle, "max_perplexity": max_perplexity}
        options["trait"] = load_trait(vector.trait) if vector.trait in list_traits() else None
        found.append(contrast_effect(loaded, tokenizer, vector, scored[vector.trait], out=kept, **options))
        if store:
            store_use(vectors[len(found) - 1], vector, found[-1].use(source=command_line()))
    edits = [each.edit(vector) for each, vector in zip(found, loaded_vectors)]
    matrix = effect_matrix(loaded, tokenizer, edits, scored, out=kept).tolist() if len(edits) > 1 else []
    moved = [{"effect_on": dict(zip(scored, values))} for values in matrix] or [{}]
    rows = [row | on for row, on in zip((row for each in found for row in each.rows()), moved)]
    echo_table(rows, as_json=as_json, text=lambda: "\n".join([*_effects(found), *_matrix(list(scored), matrix)]))


def _effects(found: list[Any]) -> list[str]:
    lines = [
        "trait           layer  dose  effect [95 %]           flipped  random: max  beaten  band: least, most"
        "  own prompt  perplexity  works"
    ]
    for each in found:
        prompted = "" if each.prompted is None else f"{each.prompted.mean:+.3f}"
        lines.append(
            f"{each.trait:14} {each.layer:6} {each.dose:5g}  {f'{each.effect:+.3f}':24}{each.flipped.mean:+7.3f}"
            f"  {max(each.random):+11.3f}  {each.beaten:6.0%}  {min(each.band):+8.3f}, {max(each.band):+.3f}"
            f"  {prompted:>10}  {each.perplexity[0]:4.1f} {each.perplexity[1]:5.1f}"
            f"  {'yes' if each.works else 'no':>5}"
        )
    return lines


def _matrix(traits: list[str], matrix: list[list[float]]) -> list[str]:
    if not matrix:
        return []
    header = [
        "\nthe effect of each vector (row) on each trait's contrast (column)",
        f"{'':14}" + "".join(f"{name:>14}" for name in traits),
    ]
    return header + [f"{name:14}" + "".join(f"{value:+14.3f}" for value in row) for name, row in zip(traits, matrix)]
