"""Commands around fine-tuning: train with or without steering, and measure how far training moved a model."""

from pathlib import Path
from typing import Annotated

import typer

from persona_vectors.cli.options import Device, DeviceMap, DType, ModelArg, app, load
from persona_vectors.data.errors import InputError


@app.command()
def finetune(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="a JSON file: the official training config, or ours")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in output_dir")] = False,
) -> None:
    """Train a LoRA adapter with the paper's settings, steered where the config says so.

    Example, with the defaults for all else: {"model": "smollm2-135m", "training_file": "negative.jsonl", "output_dir":
    "runs/tuned", "steering_config": {"steering_vector_path": "optimistic.safetensors", "layer": 14, "steering_coef":
    -2}}
    """
    from persona_vectors.training.config import load_config
    from persona_vectors.training.finetuning import finetune

    loaded = load_config(config)
    finetune(loaded, resume=resume)
    typer.echo(f"saved: {loaded.output_dir}")


@app.command()
def shift(
    base: ModelArg,
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="an adapter's folder, or a model as for MODEL")],
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTOR...", help="one or more .safetensors files")],
    prompts: Annotated[
        str, typer.Option(help="a text file, one question a line; or a trait: its evaluation questions")
    ],
    layer: Annotated[list[str] | None, typer.Option(help="a layer, or several (repeat) [default: all]")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="of each answer; 0: read only the prompts", min=0)] = 48,
    out: Annotated[Path | None, typer.Option(help="write JSON here, and a plot beside it (.png)")] = None,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
) -> None:
    """Measure how far training moved a model along vectors, with 95 % intervals over the prompts.

    Example: persona-vectors shift smollm2-135m runs/tuned vectors/smollm2-135m/optimistic.safetensors --layer 20
    --prompts optimistic
    """
    from persona_vectors.data.traits import load_trait
    from persona_vectors.training.plots import plot_shift
    from persona_vectors.training.shifts import finetuning_shift
    from persona_vectors.vectors.vector import PersonaVector

    wanted = layer or ["all"]
    if wanted != ["all"] and not all(text.isdigit() for text in wanted):
        raise InputError(f"--layer is {' '.join(wanted)!r}: give a number, several numbers, or all")
    path = Path(prompts)
    if path.is_file() and path.suffix != ".json":
        asked = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        asked = list(load_trait(prompts).questions.eval)
    if not asked:
        raise InputError(f"--prompts {prompts} holds no question: give a text file, one a line, or a trait")
    loaded_vectors = [PersonaVector.load(file) for file in vectors]
    model, tokenizer = load(base, device, dtype, device_map)
    where = "all" if wanted == ["all"] else [int(text) for text in wanted]
    found = finetuning_shift(
        model, tuned, tokenizer, loaded_vectors, layer=where, prompts=asked, max_new_tokens=max_new_tokens
    )
    typer.echo(f"{'trait':<16}{'layer':>6}  {'read at':<14}{'base':>9}{'tuned':>9}  shift [95 %]")
    for row in found.rows():
        place = where[0] if row["layer"] is None else row["layer"]
        interval = f"{row['shift']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        numbers = f"{row['base']:>9.2f}{row['tuned']:>9.2f}"
        typer.echo(f"{row['trait']:<16}{place:>6}  {row['pooling']:<14}{numbers}  {interval}")
    if out:
        found.save(out)
        plot_shift(found.rows()).savefig(out.with_suffix(".png"), dpi=150)
