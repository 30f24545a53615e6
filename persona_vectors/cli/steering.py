"""Commands that answer while vectors are added: steer, and the demonstration."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    Json,
    Load,
    MaxNewTokens,
    ModelArg,
    OptionalLayer,
    Positions,
    Questions,
    Seed,
    System,
    Temperature,
    VectorArgs,
    app,
    echo_table,
    layers,
    load_vectors,
    loads_models,
    numbers,
)
from persona_vectors.data.errors import InputError


@app.command()
@loads_models
def steer(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    layer: OptionalLayer = None,
    question: Questions,
    coef: Annotated[list[str] | None, typer.Option(help="times the vector: -2,0,2 compares strengths")] = None,
    dose: Annotated[list[str] | None, typer.Option(help="instead of --coef: fractions of the residual norm")] = None,
    positions: Positions = "all",
    system: System = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    as_json: Json = False,
    load: Load,
) -> None:
    """Answer questions while vectors are added to the residual stream, once for each strength.

    Without --layer and a strength it is what each vector's file recommends: see info.

    Example: persona-vectors steer smollm2-135m smollm2-135m/optimistic --coef=-2,0,2 --question "How will my exam go?"
    """
    from persona_vectors.model.generation import generate
    from persona_vectors.model.thoughts import edit_positions
    from persona_vectors.steering import add

    name = "dose" if dose else "coef"
    if (coef and dose) or (layer and not coef and not dose):
        raise InputError("give either --coef (times the vector) or --dose (a fraction of the residual norm)")
    where, loaded_vectors = layers(layer) if layer else None, load_vectors(vectors)
    strengths: Sequence[float | None] = numbers(coef or dose, option=f"--{name}") or [None]
    uses = [] if layer else [vector.recommended("steer") for vector in loaded_vectors]
    loaded, tokenizer = load(model)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    rows: list[dict[str, Any]] = []
    for strength in strengths:
        with ExitStack() as stack:
            for vector in loaded_vectors:
                edit: dict[str, Any] = {"layer": where, name: strength}
                edit["positions"] = edit_positions(tokenizer, positions)
                stack.enter_context(add.steer(loaded, vector, **edit))
            answers = generate(loaded, tokenizer, question, system=system, **sampling)
        for asked, answer in zip(question, answers):
            rows.append({name: strength, "question": asked, "answer": answer.strip()})
            if not as_json:
                shown = "; ".join(use.place for use in uses) if strength is None else f"{name} {strength:+g}"
                typer.secho(f"{shown} | {asked}", bold=True)
                typer.echo(f"{answer.strip()}\n")
    if as_json:
        echo_table(rows, as_json=True, text=str)


@app.command()
@loads_models
def demo(
    *,
    model: Annotated[str, typer.Option(help="smollm2-135m, a Hub id, a folder or a .gguf file")] = "smollm2-135m",
    trait: Annotated[str, typer.Option(help="a trait of valence: its score is VADER's sentiment")] = "optimistic",
    out: Annotated[Path, typer.Option(help="folder for the vector, the plots and the rollouts")] = Path("runs/demo"),
    controls: Annotated[int, typer.Option(help="random vectors of the same norm beside it", min=0)] = 1,
    load: Load,
) -> None:
    """Extract a vector, choose its layer, steer with it beside random vectors, and show a table and two plots."""
    from persona_vectors.cli.demo import run_demo
    from persona_vectors.data.traits import load_trait

    loaded_trait = load_trait(trait)
    loaded, tokenizer = load(model)
    result = run_demo(loaded, tokenizer, loaded_trait, out=out, controls=controls)
    _show(result, loaded_trait.name, out)


def _show(result: Any, trait: str, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{trait} at layer {result.layer}, chosen on the extraction questions; scored on the others")
    for column in ("coef", "VADER [95 %]", "ContrastJudge [95 %]", "an answer"):
        table.add_column(column)
    for coef, example in result.examples.items():
        scores = f"{result.sentiment[trait][coef]:+.2f}", f"{result.contrast[coef]:.0f}"
        table.add_row(f"{coef:+g}", *(s.replace("[", r"\[") for s in scores), example.replace("[", r"\["))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print("Effect, VADER at the highest coefficient minus at the lowest, 95 % interval by question:")
    others = [name for name in result.effect if name != trait]
    for name in [trait, *(others if len(others) <= 3 else [])]:
        console.print(f"  {name}: {result.effect[name]:+.2f}", markup=False)
    if len(others) > 3:
        means = sorted(result.effect[name].mean for name in others)
        console.print(f"  {len(others)} random vectors: {means[0]:+.2f} to {means[-1]:+.2f}", markup=False)
    console.print("ContrastJudge is no outside opinion: it measures likeness to prompted behaviour. VADER is one.")
    console.print(f"Written: {out}/{trait}.safetensors, rollouts.jsonl, vector.png, steering.png", markup=False)
