"""Commands that answer while vectors are added, or watched."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import Device, DeviceMap, DType, Fold, MaxNewTokens, ModelArg, Seed, app, load
from persona_vectors.data.errors import InputError


@app.command()
def steer(
    model: ModelArg,
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTOR...", help="one or more .safetensors files")],
    layer: Annotated[list[str], typer.Option(help="a layer, several (repeat the option), or all")],
    prompt: Annotated[list[str], typer.Option(help="a question to answer; repeat for more")],
    coef: Annotated[list[float] | None, typer.Option(help="times the vector; repeat to compare strengths")] = None,
    dose: Annotated[list[float] | None, typer.Option(help="instead of --coef: a fraction of the residual norm")] = None,
    positions: Annotated[str, typer.Option(help="all, prompt or response")] = "all",
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Answer prompts while vectors are added to the residual stream, once for each strength.

    Example: persona-vectors steer smollm2-135m vectors/smollm2-135m/optimistic.safetensors --layer 19
    --coef -2 --coef 0 --coef 2 --prompt "How will my exam go?"
    """
    from persona_vectors.model import generation
    from persona_vectors.steering import add as steering
    from persona_vectors.vectors.vector import PersonaVector

    if bool(coef) == bool(dose):
        raise InputError("give either --coef (times the vector) or --dose (a fraction of the residual norm)")
    if layer != ["all"] and not all(text.isdigit() for text in layer):
        raise InputError(f"--layer is {' '.join(layer)!r}: give a number, several numbers, or all")
    where = "all" if layer == ["all"] else [int(text) for text in layer]
    loaded_vectors = [PersonaVector.load(path) for path in vectors]
    loaded, tokenizer = load(model, device, dtype, device_map, fold_system)
    name = "coef" if coef else "dose"
    for strength in coef or dose or []:
        with ExitStack() as stack:
            for vector in loaded_vectors:
                edit: dict[str, Any] = {"layer": where, name: strength, "positions": positions}
                stack.enter_context(steering.steer(loaded, vector, **edit))
            answers = generation.generate(
                loaded,
                tokenizer,
                prompt,
                system=system,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
            )
        for question, answer in zip(prompt, answers):
            typer.secho(f"{name} {strength:+g} | {question}", bold=True)
            typer.echo(f"{answer.strip()}\n")


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="smollm2-135m, a Hub id, a folder or a .gguf file")] = "smollm2-135m",
    trait: Annotated[str, typer.Option(help="a trait of valence: its score is VADER's sentiment")] = "optimistic",
    out: Annotated[Path, typer.Option(help="folder for the vector, the plots and the rollouts")] = Path("runs/demo"),
    controls: Annotated[int, typer.Option(help="random vectors of the same norm beside it", min=0)] = 1,
) -> None:
    """Extract a vector, choose its layer, steer with it beside random vectors, and show a table and two plots."""
    from rich.console import Console
    from rich.table import Table

    from persona_vectors.cli.demo import run_demo
    from persona_vectors.data.traits import load_trait

    loaded_trait = load_trait(trait)
    loaded, tokenizer = load(model, None, None, None)
    result = run_demo(loaded, tokenizer, loaded_trait, out=out, controls=controls)
    table = Table(title=f"{trait} at layer {result.layer}, chosen on the extraction questions; scored on the others")
    for column in ("coef", "VADER [95 %]", "ContrastJudge [95 %]", "an answer"):
        table.add_column(column)
    for coef, example in result.examples.items():
        own = result.sentiment[trait][coef]
        contrast = result.contrast[coef]
        judged = f"{contrast.mean:.0f} [{contrast.low:.0f}, {contrast.high:.0f}]"
        table.add_row(f"{coef:+g}", str(own), judged, example.replace("[", r"\["))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print("Effect, VADER at the highest coefficient minus at the lowest, 95 % interval by question:")
    others = [name for name in result.effect if name != trait]
    for name in [trait, *(others if len(others) <= 3 else [])]:
        console.print(f"  {name}: {result.effect[name]}", markup=False)
    if len(others) > 3:
        means = sorted(result.effect[name].mean for name in others)
        console.print(f"  {len(others)} random vectors: {means[0]:+.2f} to {means[-1]:+.2f}", markup=False)
    console.print("ContrastJudge is no outside opinion: it measures likeness to prompted behaviour. VADER is one.")
    console.print(f"Written: {out}/{trait}.safetensors, rollouts.jsonl, vector.png, steering.png", markup=False)
