"""Commands that watch projections while the model answers: monitor."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    Json,
    Load,
    MaxNewTokens,
    ModelArg,
    Questions,
    Seed,
    System,
    Temperature,
    VectorArgs,
    app,
    echo_table,
    load_vectors,
    loads_models,
)

Layer = Annotated[int, typer.Option(help="the decoder block whose output is read, from 0")]


@app.command()
@loads_models
def monitor(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    layer: Layer,
    question: Questions,
    system: System = None,
    html: Annotated[Path | None, typer.Option(help="write a page with every token's projections here")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    as_json: Json = False,
    load: Load,
) -> None:
    """Answer questions, and show the projections on each vector: before the answer, over it, and where it is highest.

    Example: persona-vectors monitor smollm2-135m smollm2-135m/optimistic --layer 19 --question "How will my exam go?"
    --html trace.html
    """
    from persona_vectors.model import generation, prompts
    from persona_vectors.monitoring import heatmaps, trace

    loaded_vectors = load_vectors(vectors)
    loaded, tokenizer = load(model)
    encoded = [prompts.encode(tokenizer, prompts.chat_prompt(tokenizer, text, system=system)) for text in question]
    stops = generation.stop_tokens(loaded, tokenizer)
    with trace.monitor(loaded, loaded_vectors, layer=layer, stops=stops) as read:
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        made = generation.generate_tokens(loaded, tokenizer, encoded, reading=True, **sampling)
    rows = []
    for index, (text, (tokens, _)) in enumerate(zip(question, made)):
        kept = tokens[:max_new_tokens]
        found = [
            _row(read.last, vector.trait, index, heatmaps.token_texts(tokenizer, kept)) for vector in loaded_vectors
        ]
        rows.append({"question": text, "answer": prompts.decode(tokenizer, tokens).strip(), "projections": found})
    echo_table(rows, as_json=as_json, text=lambda: _show(rows))
    if html:
        heatmaps.save_heatmaps([heatmaps.heatmap(tokenizer, read, row=row) for row in range(len(question))], html)
        typer.echo(f"token heatmaps -> {html}", err=as_json)


def _row(readings: Any, name: str, index: int, texts: list[str]) -> dict[str, Any]:
    """Return an answer's projections on one vector: before it, over it, and where they are highest."""
    values = readings[name][index][readings.answer[index]]
    best = int(values.argmax()) if len(values) else None
    return {
        "vector": name,
        "before the answer": float(readings.prompt_last[name][index]),
        "mean over it": float(readings.mean[name][index]),
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
                table.add_row(name, *(f"{value:+.3f}" for value in values), text)
            console.print(table)
    return shown.get().rstrip("\n")
