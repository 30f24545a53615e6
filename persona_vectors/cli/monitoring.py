"""Commands that watch projections while the model answers: monitor, and calibrate, which says what is usual."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    BatchTokens,
    Json,
    Load,
    MaxNewTokens,
    ModelArg,
    OptionalLayer,
    Questions,
    Seed,
    Span,
    System,
    Temperature,
    VectorArg,
    VectorArgs,
    app,
    echo_table,
    layers,
    load_vectors,
    loads_models,
    read_questions,
)

Layer = Annotated[
    int | None, typer.Option(help="the decoder block whose output is read, from 0 (default: the recommended one)")
]
Calibrations = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="colour by the place among neutral answers: each vector's file from calibrate"),
]


@app.command()
@loads_models
def monitor(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    layer: OptionalLayer = None,
    question: Questions,
    system: System = None,
    calibration: Calibrations = None,
    positions: Span = "all",
    html: Annotated[Path | None, typer.Option(help="write a page with every token's projections here")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    as_json: Json = False,
    load: Load,
) -> None:
    """Answer questions, and show the projections on each vector: before the answer, over it, and where it is highest.

    Example: persona-vectors monitor smollm2-135m smollm2-135m/optimistic --question "How will my exam go?"
    --html trace.html
    """
    from persona_vectors.model import generation, prompts, thoughts
    from persona_vectors.monitoring import heatmaps, trace
    from persona_vectors.vectors.directions import layer_for

    loaded_vectors, known = load_vectors(vectors), load_calibrations(calibration)
    where = layer_for(loaded_vectors, layers(layer) if layer else None, purpose="monitor")
    loaded, tokenizer = load(model)
    encoded = [prompts.encode(tokenizer, prompts.chat_prompt(tokenizer, text, system=system)) for text in question]
    watching: dict[str, Any] = {"layer": where, "positions": thoughts.span_of(tokenizer, positions) or "all"}
    watching["stops"] = generation.stop_tokens(loaded, tokenizer)
    with trace.monitor(loaded, loaded_vectors, **watching) as read:
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        made = generation.generate_tokens(loaded, tokenizer, encoded, reading=True, **sampling)
    places = read.percentiles(known) if known else {}
    rows = []
    for index, (text, (tokens, _)) in enumerate(zip(question, made)):
        kept = tokens[:max_new_tokens]
        texts = heatmaps.token_texts(tokenizer, kept)
        found = [_row(read.last, key, index, texts, places) for key in read.last.keys]
        rows.append({"question": text, "answer": prompts.decode(tokenizer, tokens).strip(), "projections": found})
    echo_table(rows, as_json=as_json, text=lambda: _show(rows))
    if html:
        pages = [
            heatmaps.heatmap(tokenizer, read, row=row, calibration=known, title=f"{model}, {text!r}")
            for row, text in enumerate(question)
        ]
        heatmaps.save_heatmaps(pages, html)
        typer.echo(f"token heatmaps -> {html}", err=as_json)


@app.command()
@loads_models
def calibrate(
    model: ModelArg,
    vector: VectorArg,
    *,
    layer: OptionalLayer = None,
    questions: Annotated[
        str, typer.Option(help="neutral ones: a text file, one a line; or a trait: its evaluation questions")
    ],
    out: Annotated[Path, typer.Option(help="the JSON file to write, for --calibration, and for cap and floor")],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    batch_tokens: BatchTokens = None,
    as_json: Json = False,
    load: Load,
) -> None:
    """Answer neutral questions, and keep the percentiles of their tokens' projections on a vector.

    Example: persona-vectors calibrate smollm2-135m smollm2-135m/optimistic --questions neutral.txt
    --out optimistic.calibration.json
    """
    from persona_vectors.monitoring import calibration
    from persona_vectors.vectors.directions import layer_for
    from persona_vectors.vectors.shipped import load_vector

    loaded_vector, asked = load_vector(vector), read_questions(questions)
    where = layer_for([loaded_vector], layers(layer) if layer else None, purpose="monitor")
    loaded, tokenizer = load(model)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    sampling["batch_tokens"] = batch_tokens
    found = calibration.calibrate(loaded, tokenizer, loaded_vector, asked, layer=where, **sampling)
    found.save(out)
    rows = [
        {"trait": found.trait, "layer": at, "tokens": found.tokens, "percentiles": dict(zip(found.percentiles, values))}
        for at, values in zip(found.layers, found.values)
    ]
    echo_table(rows, as_json=as_json, text=lambda: "\n".join(map(_percentiles, rows)))
    typer.echo(f"calibration -> {out}", err=as_json)


def _percentiles(row: dict[str, Any]) -> str:
    shown = ", ".join(f"{percentile:g}: {value:.3f}" for percentile, value in row["percentiles"].items())
    return f"{row['trait']} at layer {row['layer']}, percentiles of {row['tokens']:,} tokens: {shown}"


def load_calibrations(paths: list[Path] | None) -> list[Any] | None:
    """Return what calibrate wrote; None where nothing was given."""
    from persona_vectors.monitoring.percentiles import Calibration

    return [Calibration.load(path) for path in paths] if paths else None


def _row(readings: Any, name: str, index: int, texts: list[str], places: Any) -> dict[str, Any]:
    """Return an answer's projections on one vector: before it, over it, and where they are highest."""
    averaged, width = readings.averaged[index], readings.prompt_width
    values, texts = readings[name][index][averaged], [texts[i] for i in averaged[width:].nonzero()[:, 0].tolist()]
    best = int(values.argmax()) if len(values) else None
    place = {"mean percentile": float(places[name][index][averaged].mean())} if places else {}
    over = "it" if readings.span is None else f"the {readings.span.name}"
    return {
        "vector": name,
        "before the answer": float(readings.prompt_last[name][index]),
        f"mean over {over}": float(readings.mean[name][index]),
        **place,
        "highest": math.nan if best is None else float(values[best]),
        "at the token": None if best is None else texts[best],
    }


def _show(rows: list[dict[str, Any]]) -> str:
    """Print answers and tables with colours; returns nothing more to print."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.capture() as shown:
        for row in rows:
            console.print(row["question"], style="bold", markup=False)
            console.print(row["answer"], markup=False)
            table = Table(*row["projections"][0])
            for found in row["projections"]:
                name, *values, token = found.values()
                text = "" if token is None else repr(token).replace("[", r"\[")
                shown_values = [f"{value:+.3f}" for value in values]
                if "mean percentile" in found:
                    shown_values[2] = f"{found['mean percentile']:.0f}"
                table.add_row(name, *shown_values, text)
            console.print(table)
    return shown.get().rstrip("\n")
