"""The paper's monitoring experiment (section 3.3): does the projection at the last prompt token predict the answer?

Graded system prompts (8, from discouraging the trait to encouraging it) and many-shot prompts (0 to 20 answers that
show the trait) are put before the trait's evaluation questions, which neither the vector nor its layer has seen. The
projection before the answer is compared with the answers' mean trait score: r overall and within a condition, 95 %
intervals clustered by question, beside random directions and a baseline that reads the prompts' text alone.

Usage: python scripts/monitoring_experiment.py MODEL VECTOR TRAIT --judge sentiment [--out DIR]
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from torch import Tensor
from tqdm import tqdm

from persona_vectors.cli.judges import make_judge
from persona_vectors.cli.options import Device, DType, ModelArg, load
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import Interval, correlation_interval
from persona_vectors.data.traits import Trait, load_trait
from persona_vectors.evaluation.judge import Answer, score
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.pooling import pool_while_generating
from persona_vectors.model.prompts import batch_tokens_for, chat_text, decode, encode, length_batches
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.vector import PersonaVector

SHOTS = (0, 5, 10, 15, 20)
Messages = list[dict[str, str]]


def main(
    model: ModelArg,
    vector: Annotated[Path, typer.Argument(help="a .safetensors file of this model")],
    trait: Annotated[str, typer.Argument(help="a shipped trait's name, or a JSON file")],
    judge: Annotated[str, typer.Option(help="as in persona-vectors extract")] = "contrast",
    layer: Annotated[int | None, typer.Option(help="[default: where the vector separates best]")] = None,
    samples: Annotated[int, typer.Option(help="answers to each prompt", min=1)] = 3,
    shot_samples: Annotated[int, typer.Option(help="the same for many-shot prompts, which are long", min=1)] = 1,
    questions: Annotated[int | None, typer.Option(help="use only the first N evaluation questions", min=2)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer", min=1)] = 48,
    controls: Annotated[int, typer.Option(help="random directions of each kind", min=1)] = 100,
    out: Annotated[Path, typer.Option(help="folder for answers, CSV and plot; a second run goes on from it")] = Path(
        "runs/monitoring"
    ),
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Measure how well the projection before the answer predicts the answer's trait score."""
    loaded_vector, loaded_trait = PersonaVector.load(vector), load_trait(trait)
    if layer is None and loaded_vector.separation is None:
        raise InputError(f"{loaded_vector!r} does not know where it separates best: give --layer")
    chosen = int(loaded_vector.separation.argmax()) if layer is None else layer  # type: ignore[union-attr]
    loaded, tokenizer = load(model, device, dtype, None)
    scorer = make_judge(judge, loaded, tokenizer, loaded_trait, lambda name: load(name, device, dtype, None))
    if scorer is None:
        raise InputError("judge none scores nothing: give another")
    asked = loaded_trait.questions.eval[:questions]
    settings = {
        "samples": samples,
        "shot_samples": shot_samples,
        "max_new_tokens": max_new_tokens,
        "questions": len(asked),
        "trait": trait,
    }
    check_settings(out, {**settings, "model": Path(model).name})

    shots = make_shots(loaded, tokenizer, loaded_trait, out, max_new_tokens // 2)
    points: list[dict[str, Any]] = []
    states: list[Tensor] = []
    conditions = make_conditions(loaded_trait, shots)
    for name, before in tqdm(conditions.items(), desc="conditions"):
        prompts = [[*before, {"role": "user", "content": question}] for question in asked]
        each = shot_samples if name.startswith("shots") else samples
        answers, hidden = answered(loaded, tokenizer, prompts, out / name, each, max_new_tokens)
        flat = [Answer(question, text) for question, row in zip(asked, answers) for text in row]
        scores = [np.nan if s is None else s for s in score(scorer, flat, loaded_trait.eval_prompt)]
        for index, question in enumerate(asked):
            own = scores[index * each : (index + 1) * each]
            mean = float(np.nanmean(own)) if not np.all(np.isnan(own)) else np.nan
            text = chat_text(tokenizer, prompts[index], add_generation_prompt=True)
            points.append({"condition": name, "question": index, "asked": question, "text": text, "score": mean})
        states.append(hidden)
    hidden = torch.cat(states)
    for point, value in zip(points, loaded_vector.project(hidden[:, chosen], layer=chosen).tolist()):
        point["projection"] = value

    lines = [
        line for kind in ("system", "shots") for line in compare(kind, points, hidden, loaded_vector, chosen, controls)
    ]
    text = report(lines, f"{loaded_vector.trait} at layer {chosen}, scored by {getattr(scorer, 'name', judge)}")
    print(text)
    write_csv(out / "points.csv", [{key: value for key, value in p.items() if key != "text"} for p in points])
    write_csv(out / "correlations.csv", lines)
    with atomic_path(out / "correlations.md") as temporary:
        temporary.write_text(text + "\n", "utf-8")
    with atomic_path(out / "monitoring.png") as temporary:
        plot(points, lines, loaded_vector.trait, chosen).savefig(temporary, dpi=150)
    print(f"Written: {out}/points.csv, correlations.csv, correlations.md, monitoring.png")


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a folder's answers; raises InputError where they were made with others."""
    path = out / "settings.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else settings
    different = [key for key in settings if known.get(key) != settings[key]]
    if different:
        key = different[0]
        raise InputError(f"{out} holds a run with {key} {known.get(key)!r}, not {settings[key]!r}: give another --out")
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings), "utf-8")


def make_shots(model: Any, tokenizer: Any, trait: Trait, out: Path, max_new_tokens: int) -> Messages:
    """Return turns that show the trait: the model's own answers to extraction questions, told to show it."""
    asked = trait.questions.extract[: max(SHOTS)]
    prompts = [
        [
            {"role": "system", "content": trait.system_prompt("pos", index % len(trait.instruction))},
            {"role": "user", "content": question},
        ]
        for index, question in enumerate(asked)
    ]
    answers, _ = answered(model, tokenizer, prompts, out / "examples", 1, max_new_tokens)
    turns = [[("user", question), ("assistant", row[0])] for question, row in zip(asked, answers)]
    return [{"role": role, "content": text} for turn in turns for role, text in turn]


def make_conditions(trait: Trait, shots: Messages) -> dict[str, Messages]:
    """Return what stands before the question in each condition."""
    graded = {
        f"system {i}": [{"role": "system", "content": text}] for i, text in enumerate(trait.graded_prompts(), start=1)
    }
    return graded | {f"shots {count}": shots[: 2 * count] for count in SHOTS}


def answered(
    model: Any, tokenizer: Any, prompts: Sequence[Messages], path: Path, samples: int, max_new_tokens: int
) -> tuple[list[list[str]], Tensor]:
    """Return each prompt's answers, and the residual stream at its last token, [prompt, layer, hidden].

    They are kept beside `path`, and read from there by a second run.
    """
    texts, tensors = path.with_suffix(".json"), path.with_suffix(".safetensors")
    if not (texts.exists() and tensors.exists()):
        encoded = [encode(tokenizer, chat_text(tokenizer, p, add_generation_prompt=True)) for p in prompts]
        rows = [prompt for prompt in encoded for _ in range(samples)]
        answers, states = [""] * len(rows), [torch.zeros(0)] * len(rows)
        stops = stop_tokens(model, tokenizer)
        for number, batch in enumerate(length_batches(rows, max_new_tokens, 8 * batch_tokens_for(model))):
            with pool_while_generating(model, stops=stops, poolings=["prompt_last"]) as pooled:
                made = generate_tokens(
                    model, tokenizer, [rows[i] for i in batch], max_new_tokens=max_new_tokens, seed=number
                )
            means = pooled().means[:, 0]
            for line, i in enumerate(batch):
                answers[i], states[i] = decode(tokenizer, made[line][0]), means[line]
        with atomic_path(tensors) as temporary:
            save_file({"prompt_last": torch.stack(states[::samples]).contiguous()}, temporary)
        with atomic_path(texts) as temporary:
            kept = [answers[i : i + samples] for i in range(0, len(rows), samples)]
            temporary.write_text(json.dumps(kept, ensure_ascii=False, indent=1), "utf-8")
    return json.loads(texts.read_text("utf-8")), load_file(tensors)["prompt_last"]


def compare(
    kind: str, points: Sequence[dict], hidden: Tensor, vector: PersonaVector, layer: int, controls: int
) -> list[dict[str, Any]]:
    """Return the correlations of one family of prompts: the vector's, the random directions' and the text baseline's.

    A random direction has no sign, so its |r| counts.
    """
    index = [i for i, point in enumerate(points) if point["condition"].startswith(kind)]
    some = [points[i] for i in index]
    scores, questions = [p["score"] for p in some], [p["question"] for p in some]
    states = hidden[index]

    def r(values: Sequence[float]) -> Interval:
        return correlation_interval(values, scores, questions)

    def within(values: Sequence[float]) -> Interval:
        groups = np.array([p["condition"] for p in some])
        centred = [np.array(column, dtype=float) for column in (values, scores)]
        for column in centred:
            for group in np.unique(groups):
                column[groups == group] -= np.nanmean(column[groups == group])
        return correlation_interval(list(centred[0]), list(centred[1]), questions)

    own = [p["projection"] for p in some]
    lines = [line(kind, "the vector", r(own), within(own))]
    for name, like in (("random, isotropic", None), ("random, covariance of these activations", hidden)):
        found = []
        for seed in range(controls):
            control = random_vector(vector, seed=seed, like=like)
            values = control.project(states[:, layer], layer=layer).tolist()
            found.append(abs(correlation_interval(values, scores, questions, resamples=1).mean))
        cut = Interval(float(np.median(found)), float(np.min(found)), float(np.quantile(found, 0.95)))
        beaten = sum(value < lines[0]["r"] for value in found)
        lines.append(
            line(kind, f"{name}: median, lowest, 95th percentile, unsigned", cut, None, f"{beaten}/{controls}")
        )
    baseline = text_baseline([p["text"] for p in some], scores, questions)
    lines.append(line(kind, "the prompts' text alone (TF-IDF ridge, other questions)", r(baseline), within(baseline)))
    return lines


def line(kind: str, predictor: str, r: Interval, within: Interval | None, beaten: str = "") -> dict[str, Any]:
    ends = {"within": np.nan, "within_low": np.nan, "within_high": np.nan}
    if within is not None:
        ends = {"within": within.mean, "within_low": within.low, "within_high": within.high}
    found = {"r": r.mean, "low": r.low, "high": r.high}
    return {"prompts": kind, "predictor": predictor, **found, **ends, "below_the_vector": beaten}


def text_baseline(texts: Sequence[str], scores: Sequence[float], questions: Sequence[int]) -> list[float]:
    """Return each score as a ridge regression on the prompts' words predicts it, fitted on the other questions."""
    known = ~np.isnan(scores)
    predicted = np.full(len(scores), np.nan)
    ridge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), RidgeCV(np.logspace(-2, 3, 11)))
    kept = [text for text, is_known in zip(texts, known) if is_known]
    groups = np.asarray(questions)[known]
    folds = GroupKFold(min(5, len(np.unique(groups))))
    predicted[known] = cross_val_predict(ridge, kept, np.asarray(scores)[known], groups=groups, cv=folds)
    return predicted.tolist()


def report(lines: Sequence[dict[str, Any]], title: str) -> str:
    """Return the correlations as a Markdown table."""
    rows = [
        f"{title}\n",
        "| prompts | predictor | r [95 %] | r within a condition [95 %] | controls below |",
        "|---" * 5 + "|",
    ]
    for entry in lines:
        r = f"{entry['r']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
        within = "" if np.isnan(entry["within"]) else f"{entry['within']:.2f} [{entry['within_low']:.2f}, "
        within += within and f"{entry['within_high']:.2f}]"
        rows.append(f"| {entry['prompts']} | {entry['predictor']} | {r} | {within} | {entry['below_the_vector']} |")
    return "\n".join(rows)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(points: Sequence[dict], lines: Sequence[dict[str, Any]], trait: str, layer: int) -> Figure:
    """Plot score against projection, coloured by condition, for system prompts and many-shot prompts."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, kind, title in zip(figure.subplots(1, 2), ("system", "shots"), ("graded system prompts", "many-shot")):
        names = [name for name in dict.fromkeys(p["condition"] for p in points) if name.startswith(kind)]
        for index, name in enumerate(names):
            own = [p for p in points if p["condition"] == name]
            share = index / max(1, len(names) - 1)
            colour = tuple((1 - share) * low + share * high for low, high in zip((0.0, 0.45, 0.7), (0.84, 0.37, 0.0)))
            x, y = ([p[key] for p in own] for key in ("projection", "score"))
            axes.scatter(x, y, s=12, color=colour, alpha=0.6, linewidths=0, label=name.split()[1])
        own_line = next(entry for entry in lines if entry["prompts"] == kind)
        axes.set_title(f"{title}: r {own_line['r']:.2f} [{own_line['low']:.2f}, {own_line['high']:.2f}]")
        axes.set(xlabel=f"projection before the answer, layer {layer}", ylabel=f"{trait}: mean score of the answers")
        legend = "level (8: encouraged)" if kind == "system" else "examples shown"
        axes.legend(frameon=False, fontsize=8, title=legend, title_fontsize=8, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
