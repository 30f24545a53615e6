"""Commands that judge training data: flag, split and compare."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    JUDGES,
    BatchTokens,
    GenerateOption,
    GPUs,
    Json,
    Load,
    ModelArg,
    OptionalLayer,
    Span,
    Store,
    VectorArgs,
    Workers,
    app,
    check_storable,
    command_line,
    echo_table,
    elsewhere_by_name,
    layers,
    load_vectors,
    loads_models,
    store_use,
)
from persona_vectors.data.errors import InputError

FlagsArg = Annotated[Path, typer.Option(help="a file that flag wrote")]
Data = Annotated[
    str, typer.Option(help="a .jsonl, .json, .csv (also .gz, .zst) or .parquet file, a dataset folder, a Hub id")
]
Columns = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="PROMPT ANSWER", help="the two columns, where they are others; one twice: all in it"),
]
Split = Annotated[str, typer.Option(help="the split of a Hugging Face dataset")]


@app.command()
@loads_models
def flag(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    layer: OptionalLayer = None,
    data: Data,
    out: Annotated[Path, typer.Option(help="the Parquet file to write; the same command goes on where it stopped")],
    score: Annotated[str, typer.Option(help="projection, or gradient: what training pulls towards")] = "projection",
    baseline: Annotated[str, typer.Option(help="generate, prompt_last or none")] = "generate",
    answers: Annotated[str | None, typer.Option(help="a file with an answer of the model to each prompt")] = None,
    html: Annotated[Path | None, typer.Option(help="write a report that needs nothing else to this file")] = None,
    each: Annotated[int | None, typer.Option(help="of each kind in the report (default: 50 or fewer)", min=1)] = None,
    columns: Columns = None,
    split: Split = "train",
    turns: Annotated[str, typer.Option(help="which answers of a conversation: last, or all")] = "last",
    on_error: Annotated[str, typer.Option(help="what is no sample: stop there, or skip and count it")] = "stop",
    max_length: Annotated[int | None, typer.Option(help="cut longer samples (default: the model's context)")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of a generated baseline", min=1)] = 256,
    positions: Span = "all",
    reference: Annotated[str | None, typer.Option(help="neutral samples for the percentiles, or their flags")] = None,
    threshold: Annotated[float | None, typer.Option(help="flag from this difference on")] = None,
    percentile: Annotated[float | None, typer.Option(help="or from this percentile (with --reference: 95)")] = None,
    controls: Annotated[int, typer.Option(help="random directions to read beside the vectors; 0: none", min=0)] = 100,
    labels: Annotated[str | None, typer.Option(help="a column of truth values: how well the vectors tell them")] = None,
    store: Store = False,
    judge: Annotated[str | None, typer.Option(help=f"add a judge's score too: {JUDGES}")] = None,
    trait: Annotated[str | None, typer.Option(help="the trait that it judges, a shipped one or a JSON file")] = None,
    cache: Annotated[Path | None, typer.Option(help="where baselines are kept (default: the user's cache)")] = None,
    batch_tokens: BatchTokens = None,
    generate: GenerateOption = None,
    workers: Workers = 1,
    gpus_per_worker: GPUs = None,
    as_json: Json = False,
    load: Load,
) -> None:
    """Score every sample of a dataset by how far it would move a model along persona vectors, before training.

    Example: persona-vectors flag smollm2-135m smollm2-135m/optimistic --data train.jsonl --out flags.parquet
    """
    from persona_vectors.cli.judges import make_generate
    from persona_vectors.flagging import run

    _check_options(judge, trait, labels, vectors if store else [], each if html is None else None)
    loaded_vectors, server = load_vectors(vectors), make_generate(generate, partial(load, model))
    where = _where(loaded_vectors, layer)
    loaded, tokenizer = load(model) if workers == 1 else elsewhere_by_name(model, load, gpus_per_worker)
    reading: dict[str, Any] = {"columns": columns, "split": split}
    options = {"out": out, "score": score, "baseline": baseline, "answers": answers, "cache": cache, **reading}
    options |= {"on_error": on_error, "turns": turns, "max_length": max_length, "max_new_tokens": max_new_tokens}
    options |= {"batch_tokens": batch_tokens, "positions": positions, "controls": controls, "labels": labels}
    options |= {"reference": reference, "threshold": threshold, "percentile": percentile, "generate": server}
    found = run.flag(loaded, tokenizer, data, loaded_vectors, layer=where, workers=workers, **options)
    echo_table(found.rows(), as_json=as_json, text=lambda: repr(found))
    for name, vector in zip(vectors if store else [], loaded_vectors):
        store_use(name, vector, found.uses(source=command_line())[vector.trait])
    here, tokenizer = load(model) if workers > 1 and (judge or html) else (loaded, tokenizer)
    if judge and trait:
        _add_scores(judge, trait, here, tokenizer, load, data=data, flags=out, **reading)
    _write_page(html, here, tokenizer, data, loaded_vectors, flags=out, each=each, as_json=as_json, **reading)


def _where(vectors: list[Any], layer: list[str] | None) -> Any:
    from persona_vectors.vectors.directions import layer_for

    return layer_for(vectors, layers(layer) if layer else None, purpose="flag")


def _write_page(html: Path | None, *what: Any, as_json: bool, **reading: Any) -> None:
    if html is None:
        return
    from persona_vectors.flagging.report import write_report

    write_report(*what, out=html, **reading)
    typer.echo(f"report -> {html}", err=as_json)


def _check_options(
    judge: str | None, trait: str | None, labels: str | None, stored: list[str], each: int | None
) -> None:
    if each is not None:
        raise InputError("--each is how many samples of each kind the report shows: give --html a file too")
    if bool(judge) != bool(trait):
        raise InputError("--judge and --trait belong together: give both, or neither")
    check_storable(stored)
    if stored and not labels:
        raise InputError("--store keeps what --labels says of the vectors: give a column of truth values")


def _add_scores(spec: str, trait: str, model: Any, tokenizer: Any, load: Load, **reading: Any) -> None:
    from persona_vectors.cli.judges import make_judge
    from persona_vectors.data.traits import load_trait
    from persona_vectors.flagging.screening import add_scores

    loaded_trait = load_trait(trait)
    judge = make_judge(spec, model, tokenizer, loaded_trait, load)
    if judge is None:
        raise InputError("--judge none scores nothing: name a judge, or leave --judge out")
    add_scores(reading.pop("data"), reading.pop("flags"), judge=judge, rubric=loaded_trait.eval_prompt, **reading)


@app.command()
def split(
    data: Annotated[str, typer.Argument(metavar="DATA", help="the dataset that was flagged")],
    flags: FlagsArg,
    kept: Annotated[Path, typer.Option(help="where to write the samples that are not flagged, in DATA's format")],
    removed: Annotated[Path | None, typer.Option(help="where to write the flagged ones")] = None,
    judge_above: Annotated[float | None, typer.Option(help="remove from this judge's score on, too")] = None,
    split: Split = "train",
    as_json: Json = False,
) -> None:
    """Split a dataset into what is kept and what was flagged, in its own format.

    Example: persona-vectors split train.jsonl --flags flags.parquet --kept clean.jsonl --removed flagged.jsonl
    """
    from persona_vectors.flagging.split import split_dataset

    counts = split_dataset(data, flags, kept=kept, removed=removed, judge_above=judge_above, split=split)
    words = (f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
    echo_table([counts], as_json=as_json, text=lambda: ", ".join(words))


@app.command()
def compare(
    flags: Annotated[Path, typer.Argument(metavar="FLAGS", help="a file that flag wrote")],
    other: Annotated[Path, typer.Argument(metavar="FLAGS", help="another one")],
    effects: Annotated[Path | None, typer.Option(help="what contrast --json wrote; names idle vectors")] = None,
    as_json: Json = False,
) -> None:
    """Say which of two flagged datasets will move each trait more, where random directions cannot say so as well.

    Example: persona-vectors compare mine.parquet theirs.parquet
    """
    from persona_vectors.flagging.compare import compare_datasets

    found = compare_datasets(flags, other, effects=effects)
    rows = [{"vector": key} | row for key, each in found.items() for row in each.rows()]
    echo_table(rows, as_json=as_json, text=lambda: "\n".join(f"{key}: {each}" for key, each in found.items()))
