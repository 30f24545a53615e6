"""How well projection difference finds the samples that show a trait, beside controls and simple rivals.

The layer is chosen on the questions that the vector was extracted with, by the vector and by each random direction
alike; every number is on the evaluation questions. Intervals resample whole questions.

Usage: python scripts/flagging_experiment.py smollm2-135m optimistic vectors/smollm2-135m/optimistic.safetensors
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import persona_vectors as pv
from persona_vectors.cli.options import Device, MaxNewTokens, ModelArg, Seed, load_by_name
from persona_vectors.data.files import atomic_path
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.training.sets import FRACTIONS

POOLINGS = ("response_mean", "prompt_last")
BOOTSTRAPS = 1000


def read_sets(folder: Path) -> list[dict[str, Any]]:
    """Return the samples with the trait and as many with its opposite, to the same questions."""
    paths = [folder / f"{name}.jsonl" for name in ("positive", "negative")]
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def activations(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
    """Return [sample, pooling, layer, hidden] for questions and answers."""
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, question), answer) for question, answer in pairs]
    return pool(model, rows, poolings=POOLINGS).means


def measure(model: Any, tokenizer: Any, lines: list[dict], max_new_tokens: int) -> dict[str, np.ndarray]:
    """Return the set's activations, those of the model's own greedy answers, and what the rivals go by."""
    questions = list(dict.fromkeys(line["question"] for line in lines))
    own = pv.generate(model, tokenizer, questions, max_new_tokens=max_new_tokens, temperature=0)
    base = activations(model, tokenizer, list(zip(questions, own)))[:, 0]
    answers = [line["messages"][-1]["content"] for line in lines]
    read = activations(model, tokenizer, [(line["question"], answer) for line, answer in zip(lines, answers)])
    place = [questions.index(line["question"]) for line in lines]
    sentiment = pv.SentimentJudge()
    return {
        "text": np.array(answers),
        "question": np.array(place),
        "label": np.array([line["label"] for line in lines]),
        "answer": read[:, 0].numpy(),
        "prompt_last": read[:, 1].numpy(),
        "base": base[place].numpy(),
        "length": np.array([len(answer.split()) for answer in answers]),
        "vader": np.array([sentiment.compound(answer) for answer in answers]),
    }


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


def interval(scores: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> list[float]:
    """Return the AUROC and its 95 % interval, resampling whole questions."""
    if len(set(labels.tolist())) < 2:
        return [float("nan")] * 3
    return list(pv.bootstrap(lambda i: area(scores[i], labels[i]), questions, resamples=BOOTSTRAPS))


def within(scores: np.ndarray, labels: np.ndarray, questions: np.ndarray) -> float:
    """Return the mean AUROC among the samples of one question, weighted with its pairs: no baseline changes it."""
    groups = [questions == q for q in np.unique(questions)]
    pairs = [int(labels[group].sum() * (1 - labels[group]).sum()) for group in groups]
    areas = [area(scores[group], labels[group]) for group, count in zip(groups, pairs) if count]
    return float(np.average(areas, weights=[count for count in pairs if count])) if areas else float("nan")


def project(found: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return projections on v/|v|, [sample, layer]."""
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    return np.einsum("nlh,lh->nl", found, units)


def scores(data: dict[str, np.ndarray], directions: np.ndarray) -> dict[str, np.ndarray]:
    """Return each method's scores of a direction at every layer, [sample, layer]."""
    raw = project(data["answer"], directions)
    return {
        "projection difference": raw - project(data["base"], directions),
        "prompt_last": raw - project(data["prompt_last"], directions),
        "raw projection": raw,
    }


def areas(values: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    """Return the AUROC at each layer."""
    return torch.tensor([area(column, labels) for column in values.T])


def randoms(vector: pv.PersonaVector, like: torch.Tensor, count: int, seed: int) -> list[np.ndarray]:
    """Return directions with the covariance of real activations, which get the same choice of a layer."""
    return [pv.random_vector(vector, seed=seed + i, like=like).directions.numpy() for i in range(count)]


def compare(
    rivals: dict[str, np.ndarray], test: dict[str, np.ndarray], labellings: dict[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Return, and print, every method's AUROC with its interval under each labelling, and that within a question."""
    table: dict[str, dict[str, Any]] = {}
    labels = test["label"]
    for name, mask in labellings.items():
        print(f"\n{name}: {mask.sum()} samples, {labels[mask].sum()} with the trait")
        table[name] = {"samples": int(mask.sum()), "positive": int(labels[mask].sum())}
        for method, values in rivals.items():
            rows = values[mask], labels[mask], test["question"][mask]
            found = table[name][method] = [*interval(*rows), within(*rows)]
            print(f"  {method:42} {found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]   within a question {found[3]:.3f}")
    return table


def add_nulls(
    table: dict[str, dict[str, Any]],
    vector: pv.PersonaVector,
    controls: Sequence[np.ndarray],
    sets: tuple[dict[str, np.ndarray], dict[str, np.ndarray]],
    labellings: dict[str, np.ndarray],
) -> None:
    """Add what random directions reach, each at the layer that is best for it on the first of the two sets."""
    choice, test = sets
    directions = [vector.directions.numpy(), *controls]
    for kind in scores(choice, directions[0]):
        on = torch.stack([areas(scores(choice, each)[kind], choice["label"]) for each in directions])
        values = [scores(test, each)[kind] for each in directions]
        for name, mask in labellings.items():
            found = torch.stack([areas(each[mask], test["label"][mask]) for each in values])
            null = pv.random_null(found[0], found[1:], chosen_on=(on[0], on[1:]))
            limit = table[name][f"{kind}: 97.5th percentile of random"] = null.at(97.5)
            print(f"{name}, {kind}: {len(controls)} random directions, median {null.at(50):.3f}, 97.5 % {limit:.3f}")


def by_fraction(model: Any, tokenizer: Any, vector: pv.PersonaVector, out: Path, options: dict) -> dict[float, list]:
    """Return, and print, the mean difference and its standard error of each mixture of trait and plain answers."""
    found = {}
    for fraction in FRACTIONS:
        name = f"mixed-{round(100 * fraction):03d}"
        data, flags = out / "test" / f"{name}.jsonl", out / f"{name}.parquet"
        one = pv.flag(model, tokenizer, data, vector, out=flags, **options).summary[vector.trait]
        found[fraction] = [one.mean, one.standard_error]
        print(f"fraction {fraction:4}: mean difference {one.mean:+.4f} +- {1.96 * one.standard_error:.4f}")
    return found


def main(
    model_name: ModelArg,
    trait_name: Annotated[str, typer.Argument(metavar="TRAIT", help="a trait of valence, for VADER to judge")],
    vector_file: Annotated[Path, typer.Argument(metavar="VECTOR", help="the trait's .safetensors file")],
    out: Annotated[Path, typer.Option(help="folder for the sets, the flags and the numbers")] = Path("runs/flagging"),
    samples: Annotated[int, typer.Option(help="answers to each evaluation question under each instruction")] = 4,
    choice_samples: Annotated[int, typer.Option(help="the same for the questions that choose the layer")] = 2,
    controls: Annotated[int, typer.Option(help="random directions")] = 100,
    embeddings: Annotated[
        str | None, typer.Option(help="a sentence encoder to compare with, such as all-MiniLM-L6-v2: Hub id or folder")
    ] = None,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Make the sets, choose the layer, and print AUROCs by method and labelling, and means by mixed fraction."""
    model, tokenizer = load_by_name(model_name, device=device)
    trait, vector = pv.load_trait(trait_name), pv.PersonaVector.load(vector_file)
    common: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    extract = trait.questions.extract
    pv.make_training_sets(
        model, tokenizer, trait, out=out / "choice", questions=extract, samples=choice_samples, **common
    )
    pv.make_training_sets(model, tokenizer, trait, out=out / "test", samples=samples, **common)
    choice = measure(model, tokenizer, read_sets(out / "choice"), max_new_tokens)
    test = measure(model, tokenizer, read_sets(out / "test"), max_new_tokens)

    labels = test["label"]
    agrees = np.where(labels == 1, test["vader"] >= 0.05, test["vader"] <= -0.05)  # VADER's own thresholds
    labellings = {"by system prompt": np.ones(len(labels), bool), "where VADER agrees": agrees}
    directions = vector.directions.numpy()
    chosen = {kind: int(areas(v, choice["label"]).argmax()) for kind, v in scores(choice, directions).items()}
    rivals = {"answer length": test["length"], "VADER": test["vader"]}
    rivals |= {
        f"{method}, layer {chosen[method]}": v[:, chosen[method]] for method, v in scores(test, directions).items()
    }
    if embeddings:
        own, theirs = embed(embeddings, choice["text"]), embed(embeddings, test["text"])
        means = [own[choice["label"] == label].mean(axis=0) for label in (0, 1)]
        rivals["sentence embeddings, difference of means"] = theirs @ (means[1] - means[0])
    table = compare(rivals, test, labellings)
    controls_found = randoms(vector, torch.from_numpy(choice["answer"]), controls, seed)
    add_nulls(table, vector, controls_found, (choice, test), labellings)

    options = {"layer": chosen["projection difference"], "max_new_tokens": max_new_tokens}
    fractions = by_fraction(model, tokenizer, vector, out, options | {"cache": out / "baselines.sqlite"})
    rank = float(spearmanr(list(fractions), [mean for mean, _ in fractions.values()]).statistic)
    print(f"Spearman of fraction and mean: {rank:.3f}")
    result = {"labellings": table, "layers": chosen, "fractions": fractions, "spearman": rank}
    with atomic_path(out / "experiment.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
