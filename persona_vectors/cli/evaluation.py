"""Commands that measure with a judge: evaluate and sweep."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    JUDGES,
    BatchTokens,
    First,
    GenerateOption,
    Json,
    LayerOption,
    Load,
    MaxNewTokens,
    ModelArg,
    OptionalLayer,
    Positions,
    Samples,
    Seed,
    Store,
    System,
    TraitArg,
    VectorArg,
    app,
    check_storable,
    command_line,
    echo_table,
    layers,
    load_vectors,
    loads_models,
    numbers,
    run_file,
    save_figure,
    store_use,
)
from persona_vectors.data.errors import InputError


@app.command()
@loads_models
def evaluate(
    model: ModelArg,
    trait: TraitArg,
    *,
    vector: Annotated[str | None, typer.Option(help="steer with this .safetensors file, or shipped vector")] = None,
    layer: OptionalLayer = None,
    coef: Annotated[list[str] | None, typer.Option(help="times the vector: -2,2 compares strengths")] = None,
    dose: Annotated[list[str] | None, typer.Option(help="instead of --coef: fractions of the residual norm")] = None,
    positions: Positions = "all",
    cap: Annotated[float | None, typer.Option(help="instead of steering: keep the projection at or below this")] = None,
    system: System = None,
    judge: Annotated[str, typer.Option(help=JUDGES)] = "contrast",
    check_judge: Annotated[
        bool, typer.Option("--check-judge", help="refuse a judge that cannot tell the trait's exemplars apart")
    ] = False,
    samples: Samples = 3,
    max_new_tokens: MaxNewTokens = 128,
    batch_tokens: BatchTokens = None,
    seed: Seed = 0,
    generate: GenerateOption = None,
    as_json: Json = False,
    load: Load,
) -> None:
    """Answer a trait's evaluation questions and have them judged, plain and with what the options ask for.

    For a trait with statements the likelihood contrast is shown beside it, which needs no judge. Answers are kept in
    runs/evaluate; interrupted, the same command goes on where it stopped.

    Example: persona-vectors evaluate smollm2-135m optimistic --vector smollm2-135m/optimistic --layer 13 --coef 2
    --max-new-tokens 40
    """
    from persona_vectors.cli.judges import make_generate, needed_judge
    from persona_vectors.data.traits import load_trait
    from persona_vectors.evaluation.answers import evaluate as run
    from persona_vectors.model.thoughts import edit_positions

    loaded_trait, elsewhere = load_trait(trait), make_generate(generate, partial(load, model))
    loaded_vector = load_vectors([vector])[0] if vector else None
    _check_edit(vector, generate, layer, coef, dose, cap)
    edit: dict[str, Any] = {"layer": layers(layer) if layer else None, "cap": cap, "positions": positions}
    edit |= {"coef": numbers(coef, option="--coef"), "dose": numbers(dose, option="--dose")}
    loaded, tokenizer = load(model)
    states: dict[str, AbstractContextManager[Any]] = {"plain": nullcontext()}
    if vector or system is not None:
        states |= _edits(loaded, loaded_vector, **edit | {"positions": edit_positions(tokenizer, positions)})
    scorer = needed_judge(judge, loaded, tokenizer, loaded_trait, load, check=trait if check_judge else None)
    options: dict[str, Any] = {"judge": scorer, "samples": samples, "max_new_tokens": max_new_tokens, "seed": seed}
    options["generate"] = elsewhere
    rows = []
    for state, edited in states.items():
        prompt = None if state == "plain" else system
        kept = _file(loaded, loaded_trait, state, loaded_vector, edit, system=prompt, **options)
        with edited:
            found = run(loaded, tokenizer, loaded_trait, system=prompt, out=kept, batch_tokens=batch_tokens, **options)
            rows.append({"state": state, **_scores(found, _contrast(loaded, tokenizer, trait, prompt))})
    echo_table(rows, as_json=as_json, text=lambda: _evaluations(loaded_trait, rows))


def _check_edit(vector: str | None, generate: str | None, layer: Any, coef: Any, dose: Any, cap: float | None) -> None:
    if vector and generate:
        raise InputError("--generate has a server answer, and --vector edits the model here: leave one out")
    given = [bool(coef), bool(dose), cap is not None].count(True)
    if vector and (given > 1 or (given == 0 and layer) or (cap is not None and not layer)):
        raise InputError("with --vector give --layer, and one of --coef, --dose and --cap; or none: what it recommends")


def _file(model: Any, trait: Any, state: str, vector: Any, edit: dict[str, Any], **options: Any) -> Path:
    told = {**options, "trait": trait.model_dump(), "state": state}
    edited = {**edit, "vector": vector.directions.tolist()} if vector and state != "plain" else {}
    return run_file("evaluate", model, trait.name, **told, **edited)


def _edits(
    model: Any, vector: Any, *, layer: Any, cap: float | None, positions: Any, **strengths: list[float] | None
) -> dict[str, AbstractContextManager[Any]]:
    """Return the edits that are asked for, by their names; they are checked before the plain answers are drawn."""
    from persona_vectors.steering import add, bounds
    from persona_vectors.vectors.directions import incremental

    if vector is None:
        return {"with the options": nullcontext()}
    vector.check_fits(model)
    if cap is not None:
        incremental(vector, layer=layer, coef=cap, dose=None)
        return {"with the options": bounds.cap(model, vector, layer=layer, limit=cap, positions=positions)}
    edits: dict[str, AbstractContextManager[Any]] = {}
    place = layer
    if layer is None:
        use = vector.recommended("steer")
        place, strengths = use.layer, strengths if any(strengths.values()) else {"coef": [use.coef]}
    for name, strength in [(name, value) for name, values in strengths.items() for value in values or ()]:
        how: dict[str, Any] = {"layer": layer, "coef": None, "dose": None, name: strength}
        incremental(vector, **how | {"layer": place})
        edits[f"{name} {strength:+g}"] = add.steer(model, vector, positions=positions, **how)
    return edits if len(edits) > 1 else dict(zip(["with the options"], edits.values()))


def _contrast(model: Any, tokenizer: Any, trait: str, system: str | None) -> Any:
    """Return the likelihood contrast of the model as it stands, None for a trait without statements."""
    from persona_vectors.evaluation.contrast import by_pair
    from persona_vectors.evaluation.likelihood import likelihood_contrast, load_statements, shipped_statements

    if trait not in shipped_statements():
        return None
    return by_pair(likelihood_contrast(model, tokenizer, load_statements(trait), system=system))


def _scores(found: Any, contrast: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"judge": found.judge, "answers": len(found.answers), "abstained": found.abstained}
    for name, interval in (("score", found.score), ("coherence", found.coherence), ("likelihood_contrast", contrast)):
        if interval is not None:
            row |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row


def _evaluations(trait: Any, rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':24}{trait.name + ' [95 %]':24}{'coherence [95 %]':24}likelihood contrast, nats a token"]
    for row in rows:
        cells = [_interval(row, "score", ".1f"), _interval(row, "coherence", ".1f")]
        contrast = _interval(row, "likelihood_contrast", "+.3f") if "likelihood_contrast" in row else ""
        lines.append(f"{row['state']:24}{cells[0]:24}{cells[1]:24}{contrast}")
        if row["abstained"]:
            lines.append(f"  the judge abstained on {row['abstained']} of {row['answers']} answers")
    asked = len(trait.questions.eval)
    return "\n".join([*lines, f"judge: {rows[0]['judge']}; {rows[0]['answers']} answers to {asked} questions"])


def _interval(row: dict[str, Any], name: str, form: str) -> str:
    return f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


@app.command()
@loads_models
def sweep(
    model: ModelArg,
    trait: TraitArg,
    vector: VectorArg,
    *,
    layer: LayerOption,
    coefs: Annotated[list[str] | None, typer.Option(help="times the vector, with commas: -2,-1,1,2")] = None,
    doses: Annotated[list[str] | None, typer.Option(help="instead of --coefs: fractions of the residual norm")] = None,
    judge: Annotated[str, typer.Option(help=JUDGES)] = "contrast:2",
    controls: Annotated[int, typer.Option(help="random vectors of the same norm, half of each kind", min=0)] = 10,
    samples: Samples = 3,
    first: First = None,
    gate: Annotated[float, typer.Option(help="least mean coherence of a point that may be chosen")] = 50.0,
    positions: Positions = "all",
    max_new_tokens: MaxNewTokens = 128,
    batch_tokens: BatchTokens = None,
    out: Annotated[Path | None, typer.Option(help="a folder (default: runs/sweep/MODEL/TRAIT)")] = None,
    store: Store = False,
    seed: Seed = 0,
    as_json: Json = False,
    load: Load,
) -> None:
    """Steer at every layer and strength, choose on the extraction questions, report on the evaluation questions.

    Random vectors, the flipped sign and the trait's own system prompt are steered with beside it. Writes sweep.json,
    sweep.csv, sweep.png and answers.jsonl; interrupted, the same command goes on where it stopped.

    Example: persona-vectors sweep smollm2-135m optimistic smollm2-135m/optimistic --layer 10-22 --coefs=-2,-1,1,2
    --max-new-tokens 40
    """
    from persona_vectors.cli.judges import needed_judge
    from persona_vectors.data.traits import load_trait
    from persona_vectors.evaluation import sweeping

    loaded_trait, loaded_vector = load_trait(trait), load_vectors([vector])[0]
    check_storable([vector] if store else [])
    grid: dict[str, Any] = {"layer": layers(layer), "coefs": numbers(coefs, option="--coefs")}
    grid |= {"doses": numbers(doses, option="--doses"), "positions": positions}
    loaded, tokenizer = load(model)
    grid["judge"] = needed_judge(judge, loaded, tokenizer, loaded_trait, load)
    folder = out or Path("runs") / "sweep" / Path(loaded_vector.model).name / loaded_trait.name
    options: dict[str, Any] = {"controls": controls, "samples": samples, "first": first, "gate": gate, "seed": seed}
    options |= {"max_new_tokens": max_new_tokens, "batch_tokens": batch_tokens, "out": folder / "answers.jsonl"}
    result = sweeping.sweep(loaded, tokenizer, loaded_trait, loaded_vector, **grid, **options)
    _write_sweep(result, folder)
    if store:
        store_use(vector, loaded_vector, result.use(source=command_line()))
    asked = len(loaded_trait.questions.extract[:first])
    echo_table(result.rows(), as_json=as_json, text=lambda: _reported(result, asked, folder))


def _write_sweep(result: Any, folder: Path) -> None:
    from persona_vectors.evaluation.plots import plot_sweep

    result.save(folder / "sweep.json")
    result.save_csv(folder / "sweep.csv")
    save_figure(plot_sweep(result), folder / "sweep.png")


def _reported(result: Any, asked: int, folder: Path) -> str:
    lines = [
        f"chosen on {asked} extraction questions: layer {result.layer},",
        f"{result.unit} {result.strength:g}; below, {result.points[-1].samples} answers to each evaluation question. "
        f"Judge: {result.judge}",
        f"{result.unit:>6}  {'':20}{'score [95 %]':24}{'effect [95 %]':24}wrong way  coherence  perplexity",
    ]
    lines += [
        f"{point.strength:+6g}  {point.name:20}{f'{point.score:.1f}':24}{f'{point.effect:+.1f}':24}"
        f"{point.wrong_way:9.0%}  {point.coherence.mean:9.1f}  {point.perplexity:10.1f}"
        for point in result.stage("report")
    ]
    return "\n".join([*lines, f"-> {folder}/sweep.json, sweep.csv, sweep.png, answers.jsonl"])
