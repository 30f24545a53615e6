"""Reproduce the paper's fine-tuning results (sections 4 to 6) on any model: shift, prediction, prevention.

python scripts/reproduce_paper smollm2-135m optimistic --vectors vectors/smollm2-135m --out runs/paper [--quick]

Training sets are mixtures of the model's own answers to the trait's extraction questions, selected by VADER, which also
gives the trait score: on the evaluation questions, which neither the vectors nor the training have seen. Every run
writes one file, and the same command goes on where it stopped; on several devices, give each process a --share.
"""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # `python scripts/reproduce_paper` looks in the folder only

from persona_vectors.cli.options import Device, DType, ModelArg, load_by_name
from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import Questions, load_trait
from persona_vectors.vectors.controls import random_vectors
from persona_vectors.vectors.vector import PersonaVector
from reproduce_paper.report import report
from reproduce_paper.runs import make_runs
from reproduce_paper.sets import MIXTURES, make_data, predict
from reproduce_paper.study import Study, measure_base


def main(
    model: ModelArg,
    trait: Annotated[
        str, typer.Argument(metavar="TRAIT", help="a trait of valence: the score is VADER's")
    ] = "optimistic",
    vectors: Annotated[Path, typer.Option(help="a folder of .safetensors: the trait's, and others' to compare")] = Path(
        "vectors/smollm2-135m"
    ),
    out: Annotated[Path, typer.Option(help="results; the same command goes on there")] = Path("runs/paper"),
    train_layer: Annotated[int | None, typer.Option(help="layer to intervene at [default: the middle]")] = None,
    layer: Annotated[int | None, typer.Option(help="layer to read the shift at [default: two thirds]")] = None,
    size: Annotated[int, typer.Option(help="samples a training set")] = 96,
    seeds: Annotated[int, typer.Option(help="training runs a set")] = 3,
    intervention_seeds: Annotated[int, typer.Option(help="training runs an intervention, of those seeds")] = 2,
    epochs: Annotated[float, typer.Option(help="passes over a set")] = 2.0,
    tokens: Annotated[int, typer.Option(help="most tokens of an answer")] = 48,
    samples: Annotated[int, typer.Option(help="answers to each evaluation question")] = 3,
    learning_rate: Annotated[float, typer.Option(help="the paper's is 1e-5, for 7B models")] = 3e-4,
    randoms: Annotated[int, typer.Option(help="random vectors an intervention, half of each kind", min=2)] = 6,
    share: Annotated[str, typer.Option(help="train only runs i of n, as in 1/8, and write no tables")] = "1/1",
    quick: Annotated[bool, typer.Option("--quick", help="two sets, one seed, few questions: does it all run?")] = False,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Train on every set and seed, with every intervention on the negative set, and write tables and figures."""
    if quick:
        size, seeds, epochs, tokens, samples, randoms = 8, 1, 1.0, 12, 1, 2
    if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", share):
        raise InputError(f"share is {share!r}: give one of several, such as 1/8")
    number, shares = map(int, share.split("/"))
    loaded, tokenizer = load_by_name(model, device=device, dtype=dtype)
    loaded_trait = load_trait(trait)
    if quick:
        few = Questions(extract=loaded_trait.questions.extract[:5], eval=loaded_trait.questions.eval[:5])
        loaded_trait = loaded_trait.model_copy(update={"questions": few})
    vector = PersonaVector.load(vectors / f"{loaded_trait.name}.safetensors")
    found_others = [PersonaVector.load(path) for path in sorted(vectors.glob("*.safetensors"))]
    others = [other for other in found_others if other.trait != vector.trait]
    count, asked = len(vector.directions), list(loaded_trait.questions.eval)
    where = count // 2 if train_layer is None else train_layer
    read_at = 2 * count // 3 if layer is None else layer
    training = {"epochs": epochs, "learning_rate": learning_rate, "logging_steps": 50}
    training |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    controls = random_vectors(loaded, tokenizer, vector, layer=sorted({where, read_at}), count=randoms)
    study = Study(loaded, tokenizer, vector, controls, read_at, asked, [], out, samples, tokens, training)
    paths = make_data(study, loaded_trait, size)
    measure_base(study, seeds)
    chosen = list(MIXTURES)[: 2 if quick else None]
    predicted = {name: predict(study, paths[name]) for name in chosen}
    coefs, weights = ((-2.0,), (0.001,)) if quick else ((-5.0, -2.0), (0.001, 0.01))
    runs = make_runs(study, chosen, seeds, min(seeds, intervention_seeds), where, coefs, weights)
    for run in tqdm(runs[number - 1 :: shares], desc="training runs", unit="run"):
        study.run(run.name, paths[run.data], run.seed, run.edit)
    if shares == 1:
        report(study, runs, predicted, others, [study.read(f"base seed {seed}") for seed in range(seeds)])


if __name__ == "__main__":
    try:
        typer.run(main)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
