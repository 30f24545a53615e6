"""Reproduce the paper's fine-tuning results (sections 4 to 6) on any model: shift, prediction, prevention.

python scripts/reproduce_paper smollm2-135m optimistic --vectors vectors/smollm2-135m --out runs/paper [--quick]

Training sets are mixtures of the model's own answers to the trait's extraction questions, selected by VADER, which also
gives the trait score: on the evaluation questions, which neither the vectors nor the training have seen. Every run
writes one file, and the same command goes on where it stopped.
"""

import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from persona_vectors.cli.options import Device, DType, ModelArg, load
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.traits import Trait, load_trait
from persona_vectors.evaluation.judge import Answer, score
from persona_vectors.evaluation.judges import PerplexityJudge, SentimentJudge
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.generation import generate
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate
from persona_vectors.training.config import FinetuneConfig
from persona_vectors.training.finetuning import make_trainer
from persona_vectors.training.sets import make_training_sets
from persona_vectors.training.watch import penalize
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.vector import PersonaVector

MIXTURES = {  # fractions of positive and negative answers; the rest is plain
    "positive": (1.0, 0.0),
    "negative": (0.0, 1.0),
    "plain": (0.0, 0.0),
    "pos50-neg50": (0.5, 0.5),
    "pos75-neg25": (0.75, 0.25),
    "pos25-neg75": (0.25, 0.75),
    "pos50-plain50": (0.5, 0.0),
    "neg50-plain50": (0.0, 0.5),
}
KINDS = {"preventative": "persona vector", "random vector": "random vectors of its norm"}
PAPER = {"shift": ".76 to .97", "predicted": ".88 to .95"}
PLAIN = "plain training"
"""The name of training on the negative set without any intervention."""
NULLS = 100
SURPLUS = 4
"""Answers written for each in a set; those that show its side best are kept, as a small model often misses it."""


@dataclass
class Run:
    """One training run."""

    kind: str
    data: str
    """The mixture that it trains on."""
    seed: int
    edit: Callable[[Any], AbstractContextManager[None]]
    """Given the trainer, returns what its training runs inside."""

    @property
    def name(self) -> str:
        return f"{self.kind} seed {self.seed}"


@dataclass
class Study:
    """What all runs share."""

    model: Any
    tokenizer: Any
    vector: PersonaVector
    layer: int
    questions: list[str]
    neutral: list[Any]
    out: Path
    samples: int
    tokens: int
    training: dict[str, Any]

    def states(self) -> Tensor:
        """Return the activations at the last prompt tokens, [question, layer, hidden]."""
        rows = [(encode_answer(self.tokenizer, chat_prompt(self.tokenizer, q), "")[0], []) for q in self.questions]
        return pool(self.model, rows, poolings=["prompt_last"]).means[:, 0]

    def measure(self, seed: int = 0) -> dict[str, Any]:
        """Return the trait score (VADER) and the coherence by question, and the loss on held-out plain answers."""
        asked = [q for q in self.questions for _ in range(self.samples)]
        answers = generate(self.model, self.tokenizer, asked, max_new_tokens=self.tokens, seed=1 + seed)
        loss = -answer_logprobs(self.model, self.neutral)
        found = {"answers": answers, "neutral_loss": float(loss.nanmean())}
        return found | {"score": [SentimentJudge().compound(a) for a in answers]}

    def run(self, name: str, data: Path, seed: int, edit: Callable[[Any], AbstractContextManager[None]]) -> None:
        """Train, measure and write runs/NAME; nothing where it is there already."""
        path = self.out / "runs" / f"{name}.json"
        if path.is_file():
            return
        checkpoints = TemporaryDirectory()  # the Trainer saves its last step, with the optimizer: 115 MB here
        options: dict[str, Any] = {"training_file": str(data), "output_dir": checkpoints.name, "seed": seed}
        config = FinetuneConfig(model="given", save_steps=10**9, **options, **self.training)
        trainer = make_trainer(config, self.model, self.tokenizer)
        try:
            with checkpoints, edit(trainer):
                trainer.train()
            self.model.eval()
            found = {"name": name, "data": data.stem, "seed": seed, **self.measure()}
            states = self.states()
            if name.startswith(PLAIN):
                for coef in (1.0, 2.0):
                    with steer(self.model, self.vector, layer=self.layer, coef=coef):
                        found[f"post-hoc {coef:g}"] = self.measure()
        finally:
            trainer.model.unload()
            self.model.__dict__.pop("peft_config", None)
        self.write(name, found, states)

    def write(self, name: str, found: dict[str, Any], states: Tensor) -> None:
        with atomic_path(self.out / "runs" / f"{name}.safetensors") as temporary:
            save_file({"states": states.contiguous()}, temporary)
        with atomic_path(self.out / "runs" / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")

    def read(self, name: str) -> tuple[dict[str, Any], Tensor]:
        text = (self.out / "runs" / f"{name}.json").read_text(encoding="utf-8")
        return json.loads(text), load_file(self.out / "runs" / f"{name}.safetensors")["states"]


def json_lines(path: Path) -> list[str]:
    """Return the lines of a file; an answer may hold characters that `str.splitlines` takes for the end of one."""
    with path.open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def make_data(study: Study, trait: Trait, size: int) -> dict[str, Path]:
    """Write the mixtures, of at most `size` samples each, and keep a part of the plain answers as neutral."""
    folder, asked = study.out / "sets", trait.questions.extract
    samples = math.ceil(SURPLUS * size / (len(asked) * len(trait.instruction)))
    options: dict[str, Any] = {"questions": asked, "samples": samples, "max_new_tokens": study.tokens}
    make_training_sets(study.model, study.tokenizer, trait, folder, **options)
    rng = np.random.default_rng(0)
    lines = {}
    for name, sign in (("positive", 1), ("negative", -1), ("plain", 0)):
        found = json_lines(folder / f"{name}.jsonl")
        values = np.array([SentimentJudge().compound(json.loads(x)["messages"][-1]["content"]) for x in found])
        order = rng.permutation(len(found))
        kept = order[np.argsort(-sign * values[order], kind="stable")][: size if sign else size + size // 4]
        lines[name] = [found[i] for i in rng.permutation(kept)]
        means = f"mean VADER {values.mean():+.2f}, of the {len(kept)} kept {values[kept].mean():+.2f}"
        print(f"{name}: {len(found)} answers, {means}")
    held, lines["plain"] = lines["plain"][: size // 4], lines["plain"][size // 4 :]
    for line in held:
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        study.neutral.append(encode_answer(study.tokenizer, chat_prompt(study.tokenizer, question), answer))
    size = min(size, *map(len, lines.values()))
    paths = {}
    for name, (positive, negative) in MIXTURES.items():
        counts = {"positive": round(positive * size), "negative": round(negative * size)}
        counts["plain"] = size - sum(counts.values())
        chosen = [line for kind, count in counts.items() for line in lines[kind][:count]]
        paths[name] = study.out / "mixtures" / f"{name}.jsonl"
        with atomic_path(paths[name]) as temporary:
            temporary.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return paths


def predict(study: Study, path: Path) -> Tensor:
    """Return the mean activation of a set's answers minus that of the base model's own, [layer, hidden]."""
    kept = study.out / "predicted" / f"{path.stem}.safetensors"
    if not kept.is_file():
        pairs = [json.loads(line)["messages"] for line in json_lines(path)]
        questions = sorted({pair[0]["content"] for pair in pairs})
        options: dict[str, Any] = {"max_new_tokens": study.tokens, "temperature": 0.0}
        own = dict(zip(questions, generate(study.model, study.tokenizer, questions, **options)))
        means = []
        for answers in ([p[1]["content"] for p in pairs], [own[p[0]["content"]] for p in pairs]):
            prompts = [chat_prompt(study.tokenizer, pair[0]["content"]) for pair in pairs]
            rows = [encode_answer(study.tokenizer, p, a) for p, a in zip(prompts, answers)]
            means.append(pool(study.model, rows).means[:, 0].mean(dim=0))
        with atomic_path(kept) as temporary:
            save_file({"difference": (means[0] - means[1]).contiguous()}, temporary)
    return load_file(kept)["difference"]


def correlations(moved: Tensor, scores: np.ndarray, directions: Tensor) -> np.ndarray:
    """Return r at each layer between the scores [run] and the projections of `moved` [run, layer, hidden]."""
    units = directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-9)
    values = torch.einsum("rlh,lh->lr", moved, units).numpy()
    return np.array([np.corrcoef(row, scores)[0, 1] if np.ptp(row) > 0 else 0.0 for row in values])


def correlation_rows(
    study: Study, kind: str, moved: Tensor, scores: np.ndarray, groups: list[str], others: Any
) -> list:
    """Return the table's lines: our vector, other traits' vectors and the null, each with the best of all layers."""
    rng, sets = np.random.default_rng(0), sorted(set(groups))
    boot = []
    for _ in range(1000):
        drawn = [i for s in rng.choice(sets, len(sets)) for i, group in enumerate(groups) if group == s]
        if np.ptp(scores[drawn]) > 0:
            boot.append(
                correlations(
                    moved[drawn][:, study.layer : study.layer + 1],
                    scores[drawn],
                    study.vector.directions[study.layer : study.layer + 1],
                )[0]
            )
    own = correlations(moved, scores, study.vector.directions)
    low, high = np.percentile(boot, [2.5, 97.5]) if boot else (np.nan, np.nan)
    line = {"against": kind, "direction": study.vector.trait, "r": own[study.layer], "low": low, "high": high}
    lines = [line | {"best of layers": np.abs(own).max(), "paper": PAPER[kind]}]
    for other in others:
        r = correlations(moved, scores, other.directions)
        best = {"best of layers": np.abs(r).max(), "paper": ""}
        lines.append({"against": kind, "direction": other.trait, "r": r[study.layer], "low": "", "high": ""} | best)
    real = pool(study.model, study.neutral).means[:, 0]
    randoms = [random_vector(study.vector, seed=seed, like=real) for seed in range(NULLS)]
    null = [correlations(moved, scores, control.directions) for control in randoms]
    at = np.percentile([abs(r[study.layer]) for r in null], [50, 97.5])
    best = np.percentile([np.abs(r).max() for r in null], [50, 97.5])
    for index, name in enumerate(["median of absolute r", "97.5th percentile of absolute r"]):
        line = {"against": kind, "direction": f"{NULLS} random, covariance of real activations: {name}"}
        lines.append(line | {"r": at[index], "low": "", "high": "", "best of layers": best[index], "paper": ""})
    return lines


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table as CSV, and as Markdown beside it."""
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    with atomic_path(path.with_suffix(".csv")) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(rows[0]), *cells])
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    with atomic_path(path.with_suffix(".md")) as temporary:
        temporary.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


@dataclass
class Outcome:
    """What one intervention came to over all seeds, question by question."""

    name: str
    scores: list[list[float]]
    """[question][sample of any seed]"""
    shifts: list[list[float]]
    coherence: float
    neutral_loss: float

    def less(self, other: "Outcome") -> Interval:
        """Return the difference of the trait scores, paired by question."""
        return mean_interval([[float(np.mean(a) - np.mean(b))] for a, b in zip(self.scores, other.scores)])


def outcome(study: Study, name: str, seeds: Sequence[dict[str, Any]], shifts: Sequence[list[float]]) -> Outcome:
    """Gather the measurements of all seeds; `shifts` are each seed's by question."""
    n, scores, coherent = study.samples, [[] for _ in study.questions], []
    for found in seeds:
        for i, values in enumerate(scores):
            values += found["score"][i * n : (i + 1) * n]
        answers = [Answer(study.questions[i // n], text) for i, text in enumerate(found["answers"])]
        coherent += score(PerplexityJudge(study.model, study.tokenizer), answers, "")
    loss = float(np.mean([found["neutral_loss"] for found in seeds]))
    return Outcome(name, scores, [list(q) for q in zip(*shifts)], float(np.mean([c or 0.0 for c in coherent])), loss)


def gather(study: Study, runs: Sequence[Run], base: Sequence[tuple[dict[str, Any], Tensor]]) -> list[Outcome]:
    """Return the outcomes over all seeds: the base model's, each set's and each intervention's on the negative set."""
    unit = study.vector.directions[study.layer] / study.vector.directions[study.layer].norm()
    outcomes = [outcome(study, "base model", [found for found, _ in base], [[0.0] * len(study.questions)])]
    for kind in dict.fromkeys(run.kind for run in runs):
        read = [study.read(run.name) for run in runs if run.kind == kind]
        shifts = [((states - base[0][1])[:, study.layer] @ unit).tolist() for _, states in read]
        outcomes.append(outcome(study, kind, [found for found, _ in read], shifts))
        for name in [name for name in read[0][0] if name.startswith("post-hoc")]:
            outcomes.append(outcome(study, name, [found[name] for found, _ in read], []))
    return outcomes


def set_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the table's lines: the base model, and what training on each set comes to."""
    return [
        {
            "trained on": {PLAIN: "negative"}.get(o.name, o.name.removeprefix("set ")),
            "VADER [95 %]": str(mean_interval(o.scores)),
            "less base model": str(o.less(outcomes[0])),
            "shift [95 %]": str(mean_interval(o.shifts)),
            "coherence": o.coherence,
            "neutral loss": o.neutral_loss,
        }
        for o in outcomes
    ]


def intervention_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the table's lines, with the share that each intervention gives back of the fall that plain training makes.

    The share is left out where the fall's interval holds 0.
    """
    named = {o.name: o for o in outcomes}
    plain = named[PLAIN]
    fall = outcomes[0].less(plain)
    control = {name: named.get(name.replace("preventative", "random vector"), named[name]) for name in named}
    return [
        {
            "intervention": o.name,
            "VADER [95 %]": str(mean_interval(o.scores)),
            "less plain training": str(o.less(plain)),
            "share of the fall": o.less(plain).mean / fall.mean if fall.low > 0 else "",
            "less random vectors": str(o.less(control[o.name])) if control[o.name] is not o else "",
            "coherence": o.coherence,
            "neutral loss": o.neutral_loss,
            "shift [95 %]": str(mean_interval(o.shifts)) if o.shifts else "",
        }
        for o in outcomes
    ]


def plot_prevention(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Plot the trait score after training on the negative set against the coefficient during it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, (name, label) in enumerate(KINDS.items()):
        points = sorted((float(o.name.split()[-1]), mean_interval(o.scores)) for o in outcomes if name in o.name)
        xs, means = [x + 0.04 * place for x, _ in points], [found.mean for _, found in points]
        bars = [[found.mean - found.low for _, found in points], [found.high - found.mean for _, found in points]]
        axes.errorbar(xs, means, bars, marker="o", capsize=3, label=label)
    for name, style in (("base model", ":"), (PLAIN, "--")):
        mean = mean_interval(next(o for o in outcomes if o.name == name).scores).mean
        axes.axhline(mean, color="0.4", linestyle=style, label=name)
    axes.set(xlabel="coefficient during training", ylabel="trait score after training (mean VADER)")
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def plot(path: Path, x: np.ndarray, y: np.ndarray, labels: Sequence[str], xlabel: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for label in dict.fromkeys(labels):
        chosen = [i for i, other in enumerate(labels) if other == label]
        axes.scatter(x[chosen], y[chosen], label=label, s=22)
    axes.set(xlabel=xlabel, ylabel="trait score after training (mean VADER)")
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


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
    quick: Annotated[bool, typer.Option("--quick", help="two sets, one seed, few tokens: does it all run?")] = False,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Train on every set and seed, with every intervention on the negative set, and write tables and figures."""
    if quick:
        size, seeds, epochs, tokens, samples = 16, 1, 1.0, 16, 1
    loaded, tokenizer = load(model, device, dtype, None)
    loaded_trait = load_trait(trait)
    vector = PersonaVector.load(vectors / f"{loaded_trait.name}.safetensors")
    found_others = [PersonaVector.load(path) for path in sorted(vectors.glob("*.safetensors"))]
    others = [other for other in found_others if other.trait != vector.trait]
    count, asked = len(vector.directions), list(loaded_trait.questions.eval)
    where = count // 2 if train_layer is None else train_layer
    read_at = 2 * count // 3 if layer is None else layer
    training = {"epochs": epochs, "learning_rate": learning_rate, "logging_steps": 50}
    training |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    study = Study(loaded, tokenizer, vector, read_at, asked, [], out, samples, tokens, training)
    paths = make_data(study, loaded_trait, size)
    for seed in range(seeds):  # as many answers as after training
        if not (out / "runs" / f"base seed {seed}.json").is_file():
            study.write(f"base seed {seed}", {"name": "base", "seed": seed, **study.measure(seed)}, study.states())
    chosen = list(MIXTURES)[: 2 if quick else None]
    predicted = {name: predict(study, paths[name]) for name in chosen}

    runs: list[Run] = []
    for name in chosen:
        for seed in range(seeds):
            runs.append(Run(PLAIN if name == "negative" else f"set {name}", name, seed, lambda _: nullcontext()))
    options: dict[str, Any] = {"layer": where, "during": "training"}
    direction = vector.directions[where] / vector.directions[where].norm()
    usual = float((pool(loaded, study.neutral).means[:, 0, where] @ direction).mean())  # the penalty's target
    for seed in range(min(seeds, intervention_seeds)):
        for coef in (-2.0,) if quick else (-5.0, -2.0):
            edit = lambda _, c=coef: steer(loaded, vector, coef=c, **options)  # noqa: E731
            runs.append(Run(f"preventative {coef:g}", "negative", seed, edit))
            control = random_vector(vector, seed=seed)
            edit = lambda _, c=coef, v=control: steer(loaded, v, coef=c, **options)  # noqa: E731
            runs.append(Run(f"random vector {coef:g}", "negative", seed, edit))
        runs.append(Run("CAFT", "negative", seed, lambda _: ablate(loaded, vector, **options)))
        for weight in (0.001, 0.01):
            edit = lambda t, w=weight: penalize(t, vector, layer=where, weight=w, target=usual)  # noqa: E731
            runs.append(Run(f"penalty {weight:g}", "negative", seed, edit))
    runs.sort(key=lambda run: (run.seed, run.data != "negative"))
    for run in tqdm(runs, desc="training runs", unit="run"):
        study.run(run.name, paths[run.data], run.seed, run.edit)

    base = [study.read(f"base seed {seed}") for seed in range(seeds)]
    plain = [run for run in runs if run.kind == PLAIN or run.kind.startswith("set ")]
    results = [study.read(run.name) for run in plain]
    scores = np.array([np.mean(found["score"]) for found, _ in results])
    groups = [run.data for run in plain]
    moved = torch.stack([(states - base[0][1]).mean(dim=0) for _, states in results])
    before = torch.stack([predicted[name] for name in groups])
    lines = correlation_rows(study, "shift", moved, scores, groups, others)
    lines += correlation_rows(study, "predicted", before, scores, groups, others)
    write_table(out / "correlations", lines)
    unit = vector.directions[read_at] / vector.directions[read_at].norm()
    plot(out / "shift.png", (moved[:, read_at] @ unit).numpy(), scores, groups, "finetuning shift on v/|v|")
    xlabel = "projection difference, before training"
    plot(out / "predicted.png", (before[:, read_at] @ unit).numpy(), scores, groups, xlabel)
    outcomes = gather(study, runs, base)
    sets = [o for o in outcomes if o.name.startswith("set ")]
    compared = [o for o in outcomes if o not in sets]
    write_table(out / "sets", set_rows([o for o in outcomes if o in sets or o.name in ("base model", PLAIN)]))
    write_table(out / "interventions", intervention_rows(compared))
    plot_prevention(out / "prevention.png", compared)
    for name in ("sets", "correlations", "interventions"):
        print((out / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
