"""Commands that measure: evaluate, and contrast."""

from contextlib import ExitStack
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

TraitArg = Annotated[str, typer.Argument(metavar="TRAIT", help="a shipped trait's name, or a JSON file")]


def numbers(text: str, kind: type, option: str) -> list[Any]:
    """Return the numbers of a comma-separated option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} is {text!r}: give numbers with commas between them") from None


@app.command()
def evaluate(
    model: ModelArg,
    trait: TraitArg,
    vector: Annotated[Path | None, typer.Option(help="steer with this .safetensors file")] = None,
    layer: Annotated[int | None, typer.Option(help="the block to steer at")] = None,
    coef: Annotated[float | None, typer.Option(help="times the vector")] = None,
    dose: Annotated[float | None, typer.Option(help="instead of --coef: a fraction of the residual norm")] = None,
    cap: Annotated[float | None, typer.Option(help="instead of steering: keep the projection at or below this")] = None,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    judge: Annotated[str, typer.Option(help=JUDGES)] = "contrast",
    check_judge: Annotated[
        bool, typer.Option("--check-judge", help="refuse a judge that cannot tell the trait's exemplars apart")
    ] = False,
    samples: Annotated[int, typer.Option(help="answers to each question", min=1)] = 1,
    max_new_tokens: MaxNewTokens = 128,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Answer a trait's evaluation questions and have them judged, plain and with what the options ask for.

    For a trait with statements the likelihood contrast is shown beside it, which needs no judge.

    Example: persona-vectors evaluate smollm2-135m optimistic --vector vectors/smollm2-135m/optimistic.safetensors
    --layer 13 --coef 2 --max-new-tokens 40
    """
    from persona_vectors.cli.judges import make_judge
    from persona_vectors.data.traits import load_trait
    from persona_vectors.evaluation import answers as evaluation
    from persona_vectors.evaluation import likelihood
    from persona_vectors.evaluation.contrast import by_pair
    from persona_vectors.evaluation.judge_check import require_valid_judge
    from persona_vectors.steering import add as steering
    from persona_vectors.steering import bounds as control
    from persona_vectors.vectors.vector import PersonaVector

    if vector and (layer is None or [coef, dose, cap].count(None) != 2):
        raise InputError("with --vector give --layer, and one of --coef, --dose and --cap")
    loaded_trait, loaded_vector = load_trait(trait), PersonaVector.load(vector) if vector else None
    loaded, tokenizer = load(model, device, dtype, device_map, fold_system)
    chosen = make_judge(judge, loaded, tokenizer, loaded_trait, lambda name: load(name, device, dtype, device_map))
    if chosen is None:
        raise InputError("evaluate needs a judge; without one, persona-vectors contrast scores a vector")
    statements = likelihood.load_statements(trait) if trait in likelihood.shipped_statements() else None
    if check_judge:
        if statements is None:
            raise InputError(f"--check-judge needs statements, and none ship for {trait!r}: use pv.require_valid_judge")
        typer.echo(str(require_valid_judge(chosen, loaded_trait, statements)))
    typer.echo(f"{'':24}{loaded_trait.name + ' [95 %]':24}{'coherence [95 %]':24}likelihood contrast, nats a token")
    for edited in (False, True) if vector or system is not None else (False,):
        with ExitStack() as stack:
            if edited and loaded_vector is not None:
                if cap is not None:
                    stack.enter_context(control.cap(loaded, loaded_vector, layer=layer or 0, limit=cap))
                else:
                    stack.enter_context(steering.steer(loaded, loaded_vector, layer=layer or 0, coef=coef, dose=dose))
            prompt = system if edited else None
            result = evaluation.evaluate(
                loaded,
                tokenizer,
                loaded_trait,
                judge=chosen,
                samples=samples,
                system=prompt,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )
            contrast = ""
            if statements:
                found = likelihood.likelihood_contrast(loaded, tokenizer, statements, system=prompt)
                contrast = f"{by_pair(found):.3f}"
        scores = "".join(f"{f'{interval:.1f}'!s:24}" for interval in (result.score, result.coherence))
        typer.echo(f"{'with the options' if edited else 'plain':24}{scores}{contrast}")
        if result.abstained:
            typer.echo(f"  the judge abstained on {result.abstained} of {len(result.answers)} answers")
    typer.echo(f"judge: {result.judge}; {len(result.answers)} answers to {len(loaded_trait.questions.eval)} questions")


@app.command()
def sweep(
    model: ModelArg,
    trait: TraitArg,
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help="a .safetensors file")],
    layers: Annotated[str, typer.Option(help="layers to try, with commas: 10,13,16")],
    coefs: Annotated[str | None, typer.Option(help="times the vector, with commas: -2,-1,1,2")] = None,
    doses: Annotated[str | None, typer.Option(help="instead of --coefs: fractions of the residual norm")] = None,
    judge: Annotated[str, typer.Option(help=JUDGES)] = "contrast:2",
    controls: Annotated[int, typer.Option(help="random vectors of the same norm, half of each kind", min=0)] = 10,
    samples: Annotated[int, typer.Option(help="answers to each question at each point", min=1)] = 1,
    questions: Annotated[int | None, typer.Option(help="choose on the first N extraction questions", min=1)] = None,
    gate: Annotated[float, typer.Option(help="least mean coherence of a point that may be chosen")] = 50.0,
    max_new_tokens: MaxNewTokens = 128,
    batch_tokens: BatchTokens = None,
    out: Annotated[Path | None, typer.Option(help="a folder [default: runs/sweep/MODEL/TRAIT]")] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Steer at every layer and strength, choose on the extraction questions, report on the evaluation questions.

    Random vectors, the flipped sign and the trait's own system prompt are steered with beside it. Writes sweep.csv,
    sweep.png and answers.jsonl; interrupted, the same command goes on where it stopped.

    Example: persona-vectors sweep smollm2-135m optimistic vectors/smollm2-135m/optimistic.safetensors
    --layers 10,13,16,19,22 --coefs -2,-1,0,1,2 --max-new-tokens 40
    """
    from persona_vectors.cli.judges import make_judge
    from persona_vectors.data.files import atomic_path
    from persona_vectors.data.traits import load_trait
    from persona_vectors.evaluation import sweeping
    from persona_vectors.evaluation.plots import plot_sweep
    from persona_vectors.vectors.vector import PersonaVector

    loaded_trait, loaded_vector = load_trait(trait), PersonaVector.load(vector)
    where = numbers(layers, int, "--layers")
    loaded, tokenizer = load(model, device, dtype, device_map, fold_system)
    chosen = make_judge(judge, loaded, tokenizer, loaded_trait, lambda name: load(name, device, dtype, device_map))
    if chosen is None:
        raise InputError("sweep needs a judge; without one, persona-vectors contrast scores a vector")
    folder = out or Path("runs") / "sweep" / Path(loaded_vector.model).name / loaded_trait.name
    result = sweeping.sweep(
        loaded,
        tokenizer,
        loaded_trait,
        loaded_vector,
        judge=chosen,
        layers=where,
        coefs=numbers(coefs, float, "--coefs") if coefs else None,
        doses=numbers(doses, float, "--doses") if doses else None,
        controls=controls,
        samples=samples,
        questions=questions,
        gate=gate,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_tokens=batch_tokens,
        out=folder / "answers.jsonl",
    )
    result.save_csv(folder / "sweep.csv")
    with atomic_path(folder / "sweep.png") as temporary:
        plot_sweep(result).savefig(temporary, dpi=150)
    typer.echo(
        f"chosen on {len(loaded_trait.questions.extract[:questions])} extraction questions: layer {result.layer},"
    )
    typer.echo(f"{result.unit} {result.strength:g}; below, the evaluation questions. Judge: {result.judge}")
    typer.echo(f"{result.unit:>6}  {'':20}{'score [95 %]':24}{'effect [95 %]':24}wrong way  coherence  perplexity")
    for point in result.stage("report"):
        typer.echo(
            f"{point.strength:+6g}  {point.name:20}{f'{point.score:.1f}':24}{f'{point.effect:.1f}':24}"
            f"{point.wrong_way:9.0%}  {point.coherence.mean:9.1f}  {point.perplexity:10.1f}"
        )
    typer.echo(f"-> {folder}/sweep.csv, sweep.png, answers.jsonl")


@app.command()
def contrast(
    model: ModelArg,
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTOR...", help="one or more .safetensors files")],
    layers: Annotated[str | None, typer.Option(help="layers to choose from [default: five in the middle]")] = None,
    doses: Annotated[str, typer.Option(help="doses to choose from, fractions of the residual norm")] = "0.1,0.2,0.4",
    controls: Annotated[int, typer.Option(help="random vectors of the same norm, half of each kind", min=2)] = 100,
    max_perplexity: Annotated[float, typer.Option(help="highest on plain facts, times the plain model's")] = 1.5,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Show which vectors move their trait's likelihood contrast, beside random vectors and prompt paraphrases.

    Each vector's layer and dose are chosen on eight pairs of its trait's statements; all numbers are from the other
    pairs, in nats a token, as differences from the plain model. No judge and no sampling.

    Example: persona-vectors contrast smollm2-135m vectors/smollm2-135m/*.safetensors
    """
    from tqdm.auto import tqdm

    from persona_vectors.data.traits import list_traits, load_trait
    from persona_vectors.evaluation.contrast import contrast_effect, effect_matrix
    from persona_vectors.evaluation.likelihood import load_statements
    from persona_vectors.vectors.vector import PersonaVector

    loaded_vectors = [PersonaVector.load(path) for path in vectors]
    statements = {vector.trait: load_statements(vector.trait) for vector in loaded_vectors}
    strengths = numbers(doses, float, "--doses")
    loaded, tokenizer = load(model, device, dtype, device_map, fold_system)
    typer.echo(
        "trait           layer  dose  effect [95 %]           flipped  random: max  beaten  band: least, most"
        "  own prompt  perplexity  works"
    )
    edits = []
    for vector in loaded_vectors:
        count = len(vector.directions)
        middle = list(range(count // 3, count - count // 6, max(1, count // 10)))[:5]
        with tqdm(desc=vector.trait, unit="statement", leave=False) as bar:
            found = contrast_effect(
                loaded,
                tokenizer,
                vector,
                statements[vector.trait],
                layers=numbers(layers, int, "--layers") if layers else middle,
                doses=strengths,
                trait=load_trait(vector.trait) if vector.trait in list_traits() else None,
                controls=controls,
                max_perplexity=max_perplexity,
                seed=seed,
                progress=bar.update,
            )
        edits.append(found.edit)
        prompted = "" if found.prompted is None else f"{found.prompted.mean:+.3f}"
        typer.echo(
            f"{found.trait:14} {found.layer:6} {found.dose:5g}  {f'{found.effect:.3f}':24}{found.flipped.mean:+7.3f}"
            f"  {max(found.random):+11.3f}  {found.beaten:6.0%}  {min(found.band):+8.3f}, {max(found.band):+.3f}"
            f"  {prompted:>10}  {found.perplexity[0]:4.1f} {found.perplexity[1]:5.1f}"
            f"  {'yes' if found.works else 'no':>5}"
        )
    if len(edits) > 1:
        matrix = effect_matrix(loaded, tokenizer, edits, statements)
        typer.echo("\nthe effect of each vector (row) on each trait's contrast (column)")
        typer.echo(f"{'':14}" + "".join(f"{name:>14}" for name in statements))
        for vector, row in zip(loaded_vectors, matrix.tolist()):
            typer.echo(f"{vector.trait:14}" + "".join(f"{value:+14.3f}" for value in row))
