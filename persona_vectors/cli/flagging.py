"""Commands that judge training data: flag, split and compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import JUDGES, BatchTokens, Device, DeviceMap, DType, Fold, ModelArg, app, load
from persona_vectors.data.errors import InputError

FlagsArg = Annotated[Path, typer.Option(help="a file that flag wrote")]
Data = Annotated[str, typer.Option(help="a .jsonl, .json, .csv or .parquet file, a dataset folder, or a Hub id")]
Split = Annotated[str, typer.Option(help="the split of a Hugging Face dataset")]


@app.command()
def flag(
    model: ModelArg,
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTOR...", help="one or more .safetensors files")],
    layer: Annotated[list[int], typer.Option(help="a layer, or several (repeat the option)")],
    data: Data,
    out: Annotated[Path, typer.Option(help="the Parquet file to write; the same command goes on where it stopped")],
    baseline: Annotated[
        str, typer.Option(help="generate, prompt_last, none, or a file with an answer of the model to each prompt")
    ] = "generate",
    html: Annotated[Path | None, typer.Option(help="write a report that needs nothing else to this file")] = None,
    columns: Annotated[
        tuple[str, str] | None, typer.Option(metavar="PROMPT ANSWER", help="the two columns, where they are others")
    ] = None,
    split: Split = "train",
    skip_broken: Annotated[
        bool, typer.Option(help="count and leave out what is no sample, instead of stopping")
    ] = False,
    max_length: Annotated[int | None, typer.Option(help="cut longer samples [default: the model's context]")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of a generated baseline")] = 256,
    reference: Annotated[str | None, typer.Option(help="neutral samples for the percentiles, or their flags")] = None,
    threshold: Annotated[
        str | None, typer.Option(help="flag from this difference, or percentile, say p99 [with --reference: p95]")
    ] = None,
    judge: Annotated[str | None, typer.Option(help=f"add a judge's score too: {JUDGES}")] = None,
    trait: Annotated[str | None, typer.Option(help="the trait that it judges, a shipped one or a JSON file")] = None,
    cache: Annotated[Path | None, typer.Option(help="where baselines are kept [default: the user's cache]")] = None,
    batch_tokens: BatchTokens = None,
    workers: Annotated[int, typer.Option(help="Ray actors that hold a model each; RAY_ADDRESS names a cluster")] = 1,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Score every sample of a dataset by how far it would move a model along persona vectors, before training.

    Example: persona-vectors flag smollm2-135m optimistic.safetensors --layer 19 --data train.jsonl
    --out flags.parquet --baseline prompt_last --html flags.html
    """
    from persona_vectors.cli.judges import make_judge
    from persona_vectors.data.traits import load_trait
    from persona_vectors.flagging import run as flagging
    from persona_vectors.flagging import screening
    from persona_vectors.flagging.report import write_report
    from persona_vectors.vectors.vector import PersonaVector

    if bool(judge) != bool(trait):
        raise InputError("--judge and --trait belong together: give both, or neither")
    loaded_trait = load_trait(trait) if trait else None
    loaded_vectors = [PersonaVector.load(path) for path in vectors]
    loaded, tokenizer = load(model, "cpu" if workers > 1 and not device else device, dtype, device_map, fold_system)
    reading: dict[str, Any] = {"columns": columns, "split": split}
    found = flagging.flag(
        loaded,
        tokenizer,
        data,
        loaded_vectors,
        layer=layer,
        out=out,
        baseline=baseline,
        on_error="skip" if skip_broken else "stop",
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        reference=reference,
        threshold=_number(threshold),
        cache=cache,
        batch_tokens=batch_tokens,
        workers=workers,
        **reading,
    )
    typer.echo(repr(found))
    if judge and loaded_trait:
        scorer = make_judge(judge, loaded, tokenizer, loaded_trait, lambda n: load(n, device, dtype, device_map))
        if scorer:
            screening.add_scores(data, out, scorer, loaded_trait.eval_prompt, **reading)
    if html:
        write_report(loaded, tokenizer, data, loaded_vectors, out, html, **reading)
        typer.echo(f"report -> {html}")


def _number(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


@app.command()
def split(
    data: Annotated[str, typer.Argument(metavar="DATA", help="the dataset that was flagged")],
    flags: FlagsArg,
    kept: Annotated[Path, typer.Option(help="where to write the samples that are not flagged, in DATA's format")],
    removed: Annotated[Path | None, typer.Option(help="where to write the flagged ones")] = None,
    judge_above: Annotated[float | None, typer.Option(help="remove from this judge's score on, too")] = None,
    split: Split = "train",
) -> None:
    """Split a dataset into what is kept and what was flagged, in its own format.

    Example: persona-vectors split train.jsonl --flags flags.parquet --kept clean.jsonl --removed flagged.jsonl
    """
    from persona_vectors.flagging.split import split_dataset

    counts = split_dataset(data, flags, kept=kept, removed=removed, judge_above=judge_above, split=split)
    typer.echo(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="FLAGS", help="a file that flag wrote")],
    second: Annotated[Path, typer.Argument(metavar="FLAGS", help="another one")],
) -> None:
    """Say which of two flagged datasets will move each trait more, with intervals, and how few samples show it.

    Example: persona-vectors compare mine.parquet theirs.parquet
    """
    from persona_vectors.flagging.compare import compare_datasets

    for key, found in compare_datasets(first, second).items():
        typer.echo(f"{key}: {found}")
