"""How well projection difference finds the samples that show a trait, plain and whitened, beside its nulls and rivals.

Each trait's sets are the model's own answers under its instructions, the instructions dropped. The layer is chosen on
the questions that the vector was extracted with, by the vector and by each random direction alike; every number is on
the evaluation questions. Random directions, isotropic and with the covariance of plain answers to the former, get
their sign there too. Whitening is by that covariance. Intervals resample whole questions.

Usage: python scripts/flagging_experiment.py smollm2-135m vectors/smollm2-135m/*.safetensors --out runs/flagging
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import persona_vectors as pv
from persona_vectors.cli.options import Device, DType, MaxNewTokens, ModelArg, Seed, load_by_name
from persona_vectors.data.files import atomic_path
from persona_vectors.model.gradients import answer_gradients
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.training.sets import FRACTIONS
from persona_vectors.vectors.controls import random_null

POOLINGS = ("response_mean", "prompt_last")
BOOTSTRAPS = 1000
KINDS = ("isotropic", "covariance")
METHODS = ("projection difference", "prompt_last", "raw projection")
GRADIENT = "gradient"


@dataclass
class Labelled:
    """A trait's samples and those of its opposite, to the same questions."""

    texts: list[str]
    question: np.ndarray
    label: np.ndarray
    read: dict[str, torch.Tensor]
    """What each method projects, [sample, layer, hidden]."""


def read_set(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Return the samples of some of a folder's sets."""
    paths = [folder / f"{name}.jsonl" for name in names]
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def activations(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
    """Return [sample, pooling, layer, hidden] for questions and answers."""
    return pool(model, encoded(tokenizer, pairs), poolings=POOLINGS).means


def encoded(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    return [encode_answer(tokenizer, chat_prompt(tokenizer, question), answer) for question, answer in pairs]


def answer_of(line: dict[str, Any]) -> str:
    return line["messages"][-1]["content"]


def measure(model: Any, tokenizer: Any, lines: list[dict], max_new_tokens: int, gradients: bool) -> Labelled:
    """Return the set's activations, less each method's baseline, and its gradients."""
    questions = list(dict.fromkeys(line["question"] for line in lines))
    own = pv.generate(model, tokenizer, questions, max_new_tokens=max_new_tokens, temperature=0)
    base = activations(model, tokenizer, list(zip(questions, own)))[:, 0]
    pairs = [(line["question"], answer_of(line)) for line in lines]
    read = activations(model, tokenizer, pairs)
    place = [questions.index(line["question"]) for line in lines]
    differences = (read[:, 0] - base[place], read[:, 0] - read[:, 1], read[:, 0])
    labels = np.array([line["label"] for line in lines])
    found = dict(zip(METHODS, differences))
    if gradients:
        found[GRADIENT] = answer_gradients(model, encoded(tokenizer, pairs))
    return Labelled([answer_of(line) for line in lines], np.array(place), labels, found)


def embed(folder: str, texts: Sequence[str]) -> np.ndarray:
    """Return a sentence encoder's vectors, [text, hidden]: means over the tokens of its last layer, of length 1."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(texts), 64):
        batch = tokenizer(list(texts[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found.append(normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1)))
    return torch.cat(found).numpy()


def area(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(roc_auc_score(labels, scores)) if len(set(labels.tolist())) == 2 else float("nan")


def interval(scores: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> pv.Interval:
    """Return the AUROC and its 95 % interval, resampling whole questions."""
    return pv.bootstrap(lambda i: area(scores[i], labels[i]), questions, resamples=BOOTSTRAPS)


def within(scores: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> float:
    """Return the mean AUROC among the samples of one question, weighted with its pairs: no baseline changes it."""
    groups = [questions == q for q in np.unique(questions)]
    pairs = [int(labels[group].sum() * (1 - labels[group]).sum()) for group in groups]
    areas = [area(scores[group], labels[group]) for group, count in zip(groups, pairs) if count]
    return float(np.average(areas, weights=[count for count in pairs if count])) if areas else float("nan")


def project(read: torch.Tensor, directions: torch.Tensor) -> np.ndarray:
    """Return each direction's projections on v/|v|, [direction, sample, layer]."""
    return torch.einsum("nlh,dlh->dnl", read, normalize(directions, dim=2)).numpy()


def areas(values: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """Return the AUROC of scores [direction, sample, layer] for each direction and layer: `area` of all at once."""
    positive = int(labels.sum())
    ranks = rankdata(values, axis=1)[:, labels == 1].sum(axis=1)
    return torch.from_numpy((ranks - positive * (positive + 1) / 2) / positive / (len(labels) - positive))


@dataclass
class Found:
    """How well the first of some directions does, the others being isotropic random ones and then covariance ones."""

    choice: torch.Tensor
    """AUROC on the questions that choose, [direction, layer]; for random directions from .5 on, their sign chosen."""
    test: torch.Tensor
    """The same on the others, with those signs."""
    values: np.ndarray
    """The first direction's scores, [sample, layer]."""

    @property
    def layer(self) -> int:
        return int(self.choice[0].argmax())

    def null(self, kind: str) -> Any:
        """Return where the vector stands among one kind's random directions, each at the layer that is best for it."""
        half = (len(self.test) - 1) // 2
        some = slice(1, 1 + half) if kind == "isotropic" else slice(1 + half, None)
        return random_null(self.test[0], self.test[some], chosen_on=(self.choice[0], self.choice[some]))

    def limits(self, layer: int) -> list[float]:
        """Return the 95th percentile of each kind at one layer, without the freedom to choose it."""
        half = (len(self.test) - 1) // 2
        return [float(some[:, layer].quantile(0.95)) for some in (self.test[1 : 1 + half], self.test[1 + half :])]


def find(choice: Labelled, test: Labelled, method: str, directions: torch.Tensor) -> Found:
    on = areas(project(choice.read[method], directions), choice.label)
    values = project(test.read[method], directions)
    found, flipped = areas(values, test.label), on < 0.5
    flipped[0] = False  # the vector has its sign
    return Found(torch.where(flipped, 1 - on, on), torch.where(flipped, 1 - found, found), values[0])


def experiment(choice: Labelled, test: Labelled, vector: pv.PersonaVector, moments: pv.Moments, controls: int) -> dict:
    """Return each method's `Found`, plain and whitened."""
    randoms = moments.random_vectors(vector, count=2 * controls)
    plain = torch.stack([each.directions for each in (vector, *randoms)])
    whitened = [plain[:, k].double() @ moments.whitener(k) for k in range(plain.shape[1])]
    return {
        name + suffix: find(choice, test, name, directions)
        for suffix, directions in (("", plain), (", whitened", torch.stack(whitened, dim=1).float()))
        for name in choice.read
        if name != GRADIENT or not suffix  # its covariance is another one
    }


def rows(trait: str, found: dict[str, Found], test: Labelled) -> list[dict[str, Any]]:
    """Return the table's lines: each method at its chosen layer, beside both nulls."""
    lines = []
    for method, each in found.items():
        own = interval(each.values[:, each.layer], test.label, test.question)
        nulls = [each.null(kind).at(95) for kind in KINDS]
        line: dict[str, Any] = {"trait": trait, "method": method, "layer": each.layer, "auroc": own.mean}
        line |= {"low": own.low, "high": own.high}
        line["within"] = within(each.values[:, each.layer], test.label, test.question)
        line |= dict(zip((f"{kind} 95th" for kind in KINDS), nulls))
        lines.append(line | {"evidence": own.low > 0.5 and own.mean > max(nulls)})
    return lines


def rivals(trait: str, choice: Labelled, test: Labelled, embeddings: str | None) -> list[dict[str, Any]]:
    """Return the lines of what needs no vector: length, VADER, and a sentence encoder that has seen the labels."""
    sentiment = pv.SentimentJudge()
    found = {
        "answer length": np.array([len(text.split()) for text in test.texts]),
        "VADER": np.array([sentiment.compound(text) for text in test.texts]),
    }
    if embeddings:
        own, theirs = embed(embeddings, choice.texts), embed(embeddings, test.texts)
        means = [own[choice.label == label].mean(axis=0) for label in (0, 1)]
        found["sentence embeddings, difference of means"] = theirs @ (means[1] - means[0])
    lines = []
    for name, values in found.items():
        own = interval(values, test.label, test.question)
        line = {"trait": trait, "method": name, "auroc": own.mean, "low": own.low, "high": own.high}
        lines.append(line | {"within": within(values, test.label, test.question)})
    return lines


def by_layer(trait: str, found: dict[str, Found]) -> list[dict[str, Any]]:
    """Return every layer's AUROC on both parts of the questions, beside the nulls at that layer."""
    lines = []
    for method, each in found.items():
        for layer, (chosen, other) in enumerate(zip(each.choice[0].tolist(), each.test[0].tolist())):
            line = {"trait": trait, "method": method, "layer": layer, "extraction questions": chosen, "auroc": other}
            lines.append(line | dict(zip((f"{kind} 95th" for kind in KINDS), each.limits(layer))))
    return lines


def by_fraction(model: Any, tokenizer: Any, vector: pv.PersonaVector, out: Path, options: dict) -> None:
    """Print the mean difference of each mixture of the trait's answers and its opposite's."""
    for fraction in FRACTIONS:
        name = f"mixed-{round(100 * fraction):03d}"
        data, flags = out / "test" / f"{name}.jsonl", out / f"{name}.parquet"
        print(pv.flag(model, tokenizer, data, vector, out=flags, cache=out / "baselines.sqlite", **options))


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def plot(layers: Sequence[dict[str, Any]], path: Path, method: str = "prompt_last") -> None:
    """Plot one method's AUROC by layer, plain and whitened, each above the 95th percentile of both nulls."""
    from matplotlib.figure import Figure

    traits = list(dict.fromkeys(line["trait"] for line in layers))
    columns = min(4, len(traits))
    figure = Figure(figsize=(3.2 * columns, 2.6 * -(-len(traits) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(traits) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, trait in zip(grid, traits):
        for suffix, colour in (("", "C0"), (", whitened", "C1")):
            own = [line for line in layers if line["trait"] == trait and line["method"] == method + suffix]
            at = [line["layer"] for line in own]
            axes.plot(at, [line["auroc"] for line in own], color=colour, label=f"vector{suffix}")
            limit = [max(line[f"{kind} 95th"] for kind in KINDS) for line in own]
            axes.fill_between(at, 0.5, limit, color=colour, alpha=0.2, linewidth=0, label=f"95 % of random{suffix}")
        axes.set_title(trait, fontsize=10)
    for axes in grid[len(traits) :]:
        axes.axis("off")
    figure.supxlabel("layer")
    figure.supylabel("AUROC, evaluation questions")
    figure.axes[0].legend(frameon=False, fontsize=7)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def show(line: dict[str, Any]) -> str:
    text = f"{line['trait']:14} {line['method']:42} {line.get('layer', ''):>5}  {line['auroc']:.3f} "
    text += f"[{line['low']:.3f}, {line['high']:.3f}]  within {line['within']:.3f}"
    if "evidence" in line:
        text += "  random " + ", ".join(f"{line[f'{kind} 95th']:.3f}" for kind in KINDS)
        text += "  evidence" if line["evidence"] else ""
    return text


def main(
    model_name: ModelArg,
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTOR...", help=".safetensors files of shipped traits")],
    out: Annotated[Path, typer.Option(help="folder for the sets, the flags and the numbers")] = Path("runs/flagging"),
    samples: Annotated[int, typer.Option(help="answers to each evaluation question under each instruction")] = 4,
    choice_samples: Annotated[int, typer.Option(help="the same for the questions that choose the layer")] = 2,
    controls: Annotated[int, typer.Option(help="random directions of each kind")] = 100,
    embeddings: Annotated[
        str | None, typer.Option(help="a sentence encoder to compare with, such as all-MiniLM-L6-v2: Hub id or folder")
    ] = None,
    fractions: Annotated[bool, typer.Option("--fractions", help="flag mixtures of both sides too")] = False,
    gradients: Annotated[bool, typer.Option("--gradients", help="score by gradients too, which take longest")] = False,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Make each trait's sets, choose layers, and write AUROCs by method (table.csv) and by layer (layers.csv, .png)."""
    model, tokenizer = load_by_name(model_name, device=device, dtype=dtype)
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    table, layers = [], []
    for vector in map(pv.PersonaVector.load, vectors):
        trait, own = pv.load_trait(vector.trait), out / vector.trait
        first = {"questions": trait.questions.extract, "samples": choice_samples}
        pv.make_training_sets(model, tokenizer, trait, out=own / "choice", **first, **common)
        pv.make_training_sets(model, tokenizer, trait, out=own / "test", samples=samples, **common)
        choice, test = (
            measure(model, tokenizer, read_set(own / part, "positive", "negative"), max_new_tokens, gradients)
            for part in ("choice", "test")
        )
        plain = [(line["question"], answer_of(line)) for line in read_set(own / "choice", "plain")]
        moments = pv.Moments.of(activations(model, tokenizer, plain)[:, 0], model=vector.model)
        found = experiment(choice, test, vector, moments, controls)
        lines = rows(trait.name, found, test) + rivals(trait.name, choice, test, embeddings)
        print("\n".join(map(show, lines)), flush=True)
        table, layers = table + lines, layers + by_layer(trait.name, found)
        write_csv(out / "table.csv", table)
        write_csv(out / "layers.csv", layers)
        plot(layers, out / "layers.png")
        if fractions:
            options = {"layer": found[METHODS[0]].layer, "max_new_tokens": max_new_tokens}
            by_fraction(model, tokenizer, vector, own, options)


if __name__ == "__main__":
    typer.run(main)
