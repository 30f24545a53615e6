"""Commands around fine-tuning: train with or without steering, and measure how far training moved a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import (
    BatchTokens,
    Json,
    LayerOption,
    Load,
    ModelArg,
    VectorArgs,
    app,
    echo_table,
    layers,
    load_vectors,
    loads_models,
    read_questions,
    run_file,
    save_figure,
)


@app.command()
def finetune(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="a JSON file: the official training config, or ours")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in output_dir")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start anew over what is in output_dir")] = False,
) -> None:
    """Train a LoRA adapter with the paper's settings, steered where the config says so.

    Example, with the defaults for all else: {"model": "smollm2-135m", "training_file": "negative.jsonl", "output_dir":
    "runs/tuned", "steering_config": {"steering_vector_path": "optimistic.safetensors", "layer": 14, "steering_coef":
    -2}}
    """
    from persona_vectors.training.config import load_config
    from persona_vectors.training.finetuning import finetune

    loaded = load_config(config)
    finetune(loaded, resume=resume, overwrite=overwrite)
    typer.echo(f"saved: {loaded.output_dir}")


@app.command()
@loads_models
def shift(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    tuned: Annotated[str, typer.Option(help="what training made of MODEL: an adapter's folder, or a model")],
    questions: Annotated[
        str, typer.Option(help="a text file, one question a line; or a trait: its evaluation questions")
    ],
    layer: LayerOption = ["all"],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(help="of each answer; 0: read only the questions", min=0)] = 48,
    controls: Annotated[int, typer.Option(help="random directions to read beside the vectors; 0: none", min=0)] = 0,
    batch_tokens: BatchTokens = None,
    out: Annotated[Path | None, typer.Option(help="write JSON here, and a plot beside it (.png)")] = None,
    as_json: Json = False,
    load: Load,
) -> None:
    """Measure how far training moved a model along vectors, with 95 % intervals over the questions. Interrupted,
    the same command goes on where it stopped.

    Example: persona-vectors shift smollm2-135m smollm2-135m/optimistic --tuned runs/tuned --layer 20
    --questions optimistic
    """
    from persona_vectors.training.plots import plot_shift
    from persona_vectors.training.shifts import finetuning_shift

    where, asked, loaded_vectors = layers(layer), read_questions(questions), load_vectors(vectors)
    loaded, tokenizer = load(model)
    options: dict[str, Any] = {"tuned": tuned, "questions": asked, "max_new_tokens": max_new_tokens}
    options |= {"controls": controls, "batch_tokens": batch_tokens}
    options["out"] = run_file("shift", loaded, "-".join(v.trait for v in loaded_vectors)[:60], tuned=tuned)
    found = finetuning_shift(loaded, tokenizer, loaded_vectors, layer=where, **options)
    rows = found.rows()
    echo_table(rows, as_json=as_json, text=lambda: "\n".join([_table(rows), *_freedom(found)]))
    if out:
        found.save(out)
        save_figure(plot_shift(rows), out.with_suffix(".png"))


def _table(rows: list[dict[str, Any]]) -> str:
    beside = any("effect" in row for row in rows)
    more = "       deviations  beats isotropic  covariance" if beside else ""
    lines = [f"{'trait':<16}{'layer':>6}  {'read at':<14}{'base':>9}{'tuned':>9}  shift [95 %]{more}"]
    for row in rows:
        interval = f"{row['shift']:+.2f} [{row['shift_low']:+.2f}, {row['shift_high']:+.2f}]"
        if beside:
            shares = f"{row['beaten_isotropic']:>17.0%}{row['beaten_covariance']:>12.0%}"
            interval = f"{interval:<22}{row['effect']:>+8.2f}{shares}"
        numbers = f"{row['base']:>9.2f}{row['tuned']:>9.2f}"
        lines.append(f"{row['trait']:<16}{row['layer']:>6}  {row['pooling']:<14}{numbers}  {interval}")
    return "\n".join(lines)


def _freedom(found: Any) -> list[str]:
    """Return a line for each vector at the layer that moved most, beside random directions at theirs."""
    if found.nulls is None or len(found.layers) == 1:
        return []
    lines = [f"each at its best layer, as {found.nulls.random.shape[2]} random directions at theirs:"]
    for trait, pooling in dict.fromkeys((row["trait"], row["pooling"]) for row in found.nulls.rows()):
        isotropic, covariance = found.nulls.over_layers(trait, pooling=pooling).values()
        shares = f"{isotropic.percentile:.0f}% of isotropic ones and {covariance.percentile:.0f}% with"
        reference = f"the covariance of {found.nulls.reference}"
        lines.append(f"{trait}, {pooling}: layer {isotropic.layer}, beats {shares} {reference}")
    return lines
