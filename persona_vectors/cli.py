"""The command line: the Python functions under their own names."""

import json
import shlex
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.files import InputError

FORMATS = "official, assistant-axis, assistant-axis-capping, steering-vectors, lm-eval, gguf or safetensors"
JUDGES = "contrast[:PAIRS], sentiment, openai:MODEL, local:MODEL or none"
app = typer.Typer(
    help="Extract persona vectors from language models, and steer with them (arXiv 2507.21509).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m, a Hub id, a folder or a .gguf file")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu [default: the best there is]")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 ... [default: bfloat16 on a GPU]")]
DeviceMap = Annotated[str | None, typer.Option(help="let accelerate place the weights, say: auto")]
Fold = Annotated[bool, typer.Option("--fold-system", help="put the system prompt into the user's turn")]
Seed = Annotated[int, typer.Option(help="random seed: the same run gives the same answers")]
MaxNewTokens = Annotated[int, typer.Option(help="most tokens of an answer")]


def _load(name: str, device: str | None, dtype: str | None, device_map: str | None, fold: bool = False) -> Any:
    import torch
    from transformers.utils import logging

    from persona_vectors.models import fold_system_role, load_model

    logging.disable_progress_bar()

    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise InputError(f"no dtype {dtype!r}: give float32, bfloat16 or float16")
    model, tokenizer = load_model(name, device=device, dtype=kind, device_map=device_map)
    return model, fold_system_role(tokenizer) if fold else tokenizer


@app.command()
def traits() -> None:
    """List the traits that ship with the package."""
    from persona_vectors.traits import list_traits, load_trait

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
    batch_tokens: Annotated[int | None, typer.Option(help="tokens a batch: lower it when memory runs out")] = None,
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
    from persona_vectors import extraction
    from persona_vectors.judge import make_judge
    from persona_vectors.rollouts import load_rollouts
    from persona_vectors.traits import load_trait

    loaded_trait = load_trait(trait)
    loaded, tokenizer = _load(model, device, dtype, device_map, fold_system)
    spec = judge or ("none" if from_ else "contrast")
    chosen = make_judge(spec, loaded, tokenizer, loaded_trait, lambda name: _load(name, device, dtype, device_map))
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
    from persona_vectors.files import atomic_path
    from persona_vectors.vectors import PersonaVector

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
        from persona_vectors.plot import plot_vector

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
    from persona_vectors import models, steering
    from persona_vectors.vectors import PersonaVector

    if bool(coef) == bool(dose):
        raise InputError("give either --coef (times the vector) or --dose (a fraction of the residual norm)")
    if layer != ["all"] and not all(text.isdigit() for text in layer):
        raise InputError(f"--layer is {' '.join(layer)!r}: give a number, several numbers, or all")
    where = "all" if layer == ["all"] else [int(text) for text in layer]
    loaded_vectors = [PersonaVector.load(path) for path in vectors]
    loaded, tokenizer = _load(model, device, dtype, device_map, fold_system)
    name = "coef" if coef else "dose"
    for strength in coef or dose or []:
        with ExitStack() as stack:
            for vector in loaded_vectors:
                edit: dict[str, Any] = {"layer": where, name: strength, "positions": positions}
                stack.enter_context(steering.steer(loaded, vector, **edit))
            answers = models.generate(
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
    from persona_vectors.interop import import_vector

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
    from persona_vectors.interop import export_vector
    from persona_vectors.vectors import PersonaVector

    lost = export_vector(PersonaVector.load(vector), out, format=format, layer=layer, hookpoint=hookpoint)
    typer.echo("\n".join([f"{format} -> {out}", *lost]))


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

    from persona_vectors.demo import run_demo
    from persona_vectors.traits import load_trait

    loaded_trait = load_trait(trait)
    loaded, tokenizer = _load(model, None, None, None)
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


def main() -> None:
    """Run the command line: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    try:
        code = app(standalone_mode=False)
    except (InputError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: typer prints it, and says how to get help
        if show is None:
            raise
        show()
        code = getattr(error, "exit_code", 1)
    if code == 130:
        typer.echo("interrupted: the same command goes on where it stopped, if it was given --rollouts", err=True)
    sys.exit(code or 0)
