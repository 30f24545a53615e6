"""Reproduce the paper's fine-tuning results (sections 4 to 6) on any model: shift, prediction, prevention.

python scripts/reproduce_paper.py smollm2-135m optimistic --vectors vectors/smollm2-135m --out runs/paper [--quick]

Training sets are mixtures of the model's own answers. Half of the evaluation questions are trained on, the other
half evaluate; the vectors have seen neither. Every run writes one file, and the same command goes on where it stopped.
"""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from persona_vectors.activations import pool
from persona_vectors.cli_options import Device, DType, ModelArg, load
from persona_vectors.control import ablate
from persona_vectors.evaluation import mean_interval
from persona_vectors.files import InputError, atomic_path
from persona_vectors.finetuning import FinetuneConfig, make_trainer
from persona_vectors.judge import Answer, PerplexityJudge, SentimentJudge, answer_logprobs, score
from persona_vectors.models import chat_prompt, encode_answer, generate
from persona_vectors.steering import steer
from persona_vectors.training import penalize
from persona_vectors.training_sets import make_training_sets
from persona_vectors.traits import load_trait
from persona_vectors.vectors import PersonaVector, random_vector

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
PAPER = {"shift": ".76 to .97", "predicted": ".88 to .95"}
NULLS = 100


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
        """Return the mean activation at the last prompt token, [layer, hidden]."""
        rows = [(encode_answer(self.tokenizer, chat_prompt(self.tokenizer, q), "")[0], []) for q in self.questions]
        return pool(self.model, rows, poolings=["prompt_last"]).means[:, 0].mean(dim=0)

    def measure(self) -> dict[str, Any]:
        """Return the trait score (VADER) and the coherence by question, and the loss on held-out plain answers."""
        asked = [q for q in self.questions for _ in range(self.samples)]
        answers = generate(self.model, self.tokenizer, asked, max_new_tokens=self.tokens, seed=1)
        loss = -answer_logprobs(self.model, self.neutral)
        found = {"answers": answers, "neutral_loss": float(loss.nanmean())}
        return found | {"score": [SentimentJudge().compound(a) for a in answers]}

    def run(self, name: str, data: Path, seed: int, edit: Callable[[Any], AbstractContextManager[None]]) -> None:
        """Train, measure and write runs/NAME; nothing where it is there already."""
        path = self.out / "runs" / f"{name}.json"
        if path.is_file():
            return
        folder = str(self.out / "adapters" / name)
        config = FinetuneConfig(
            model="given", training_file=str(data), output_dir=folder, seed=seed, save_steps=10**9, **self.training
        )
        trainer = make_trainer(config, self.model, self.tokenizer)
        try:
            with edit(trainer):
                trainer.train()
            self.model.eval()
            found = {"name": name, "data": data.stem, "seed": seed, **self.measure()}
            states = self.states()
            if name.startswith("plain-training"):
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


def make_data(study: Study, trait: Any, asked: list[str], samples: int, size: int) -> dict[str, Path]:
    """Write the mixtures, of at most `size` samples each, and keep a part of the plain answers as neutral."""
    folder = study.out / "sets"
    options: dict[str, Any] = {"questions": asked, "samples": samples, "max_new_tokens": study.tokens}
    make_training_sets(study.model, study.tokenizer, trait, folder, **options)
    lines = {
        n: (folder / f"{n}.jsonl").read_text(encoding="utf-8").splitlines() for n in ("positive", "negative", "plain")
    }
    rng = np.random.default_rng(0)
    lines = {name: [found[i] for i in rng.permutation(len(found))] for name, found in lines.items()}
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
        pairs = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
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
    lines = [line | {"best of layers": own.max(), "paper": PAPER[kind]}]
    for other in others:
        r = correlations(moved, scores, other.directions)
        best = {"best of layers": np.abs(r).max(), "paper": ""}
        lines.append({"against": kind, "direction": other.trait, "r": r[study.layer], "low": "", "high": ""} | best)
    rows = study.neutral
    real = pool(study.model, rows).means[:, 0]
    noise = torch.randn(NULLS, len(real), generator=torch.Generator().manual_seed(0))
    null = [correlations(moved, scores, d) for d in torch.einsum("nr,rlh->nlh", noise, real - real.mean(dim=0))]
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


def outcome(study: Study, name: str, found: dict[str, Any], shift: float | str) -> dict[str, Any]:
    """Return one line of the table of interventions."""
    scores = [found["score"][i : i + study.samples] for i in range(0, len(found["score"]), study.samples)]
    asked = [q for q in study.questions for _ in range(study.samples)]
    judged = score(
        PerplexityJudge(study.model, study.tokenizer), [Answer(q, a) for q, a in zip(asked, found["answers"])], ""
    )
    coherence = sum(value or 0.0 for value in judged) / len(judged)
    line = {"intervention": name, "VADER [95 %]": str(mean_interval(scores)), "coherence": coherence}
    return line | {"neutral loss": found["neutral_loss"], "shift": shift}


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
    half = len(asked) // 2
    where = count // 2 if train_layer is None else train_layer
    read_at = 2 * count // 3 if layer is None else layer
    training = {"epochs": epochs, "learning_rate": learning_rate, "gradient_accumulation_steps": 4, "logging_steps": 50}
    study = Study(loaded, tokenizer, vector, read_at, asked[half:], [], out, samples, tokens, training)
    per_question = -(-size * 5 // 4 // (half * len(loaded_trait.instruction)))
    paths = make_data(study, loaded_trait, asked[:half], per_question, size)
    if not (out / "runs" / "base.json").is_file():
        study.write("base", {"name": "base", **study.measure()}, study.states())
    chosen = list(MIXTURES)[: 2 if quick else None]
    predicted = {name: predict(study, paths[name]) for name in chosen}

    runs: list[tuple[str, str, int, Callable[[Any], AbstractContextManager[None]]]] = []
    for name in chosen:
        for seed in range(seeds):
            kind = "plain-training" if name == "negative" else "set"
            runs.append((f"{kind} {name} seed {seed}", name, seed, lambda _: nullcontext()))
    strengths = (-2.0,) if quick else (-5.0, -2.0, -1.0, 1.0)
    options: dict[str, Any] = {"layer": where, "during": "training"}
    for seed in range(seeds):
        for coef in strengths:
            edit = lambda _, c=coef: steer(loaded, vector, coef=c, **options)  # noqa: E731
            runs.append((f"preventative {coef:g} seed {seed}", "negative", seed, edit))
            control = random_vector(vector, seed=seed)
            edit = lambda _, c=coef, v=control: steer(loaded, v, coef=c, **options)  # noqa: E731
            runs.append((f"random vector {coef:g} seed {seed}", "negative", seed, edit))
        runs.append((f"CAFT seed {seed}", "negative", seed, lambda _: ablate(loaded, vector, **options)))
        for weight in (0.01, 0.1):
            edit = lambda t, w=weight: penalize(t, vector, layer=where, weight=w)  # noqa: E731
            runs.append((f"penalty {weight:g} seed {seed}", "negative", seed, edit))
    for name, data, seed, edit in tqdm(runs, desc="training runs", unit="run"):
        study.run(name, paths[data], seed, edit)

    base, base_states = study.read("base")
    plain = [run for run in runs if run[0].startswith(("set", "plain-training"))]
    results = [study.read(run[0]) for run in plain]
    scores = np.array([np.mean(found["score"]) for found, _ in results])
    groups = [run[1] for run in plain]
    moved = torch.stack([states - base_states for _, states in results])
    before = torch.stack([predicted[name] for name in groups])
    lines = correlation_rows(study, "shift", moved, scores, groups, others)
    lines += correlation_rows(study, "predicted", before, scores, groups, others)
    write_table(out / "correlations", lines)
    unit = vector.directions[read_at] / vector.directions[read_at].norm()
    plot(out / "shift.png", (moved[:, read_at] @ unit).numpy(), scores, groups, "finetuning shift on v/|v|")
    xlabel = "projection difference, before training"
    plot(out / "predicted.png", (before[:, read_at] @ unit).numpy(), scores, groups, xlabel)
    table = [outcome(study, "base model", base, 0.0)]
    for name, data, _, _ in runs:
        if data == "negative":
            found, states = study.read(name)
            table.append(outcome(study, name, found, float((states - base_states)[read_at] @ unit)))
            table += [outcome(study, f"{k} after {name}", v, "") for k, v in found.items() if k.startswith("post-hoc")]
    write_table(out / "interventions", table)
    for name in ("correlations", "interventions"):
        print((out / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
