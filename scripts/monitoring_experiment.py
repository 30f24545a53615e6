"""The paper's monitoring experiment (section 3.3): does the projection at the last prompt token predict the answer?

Graded system prompts (8, from discouraging the trait to encouraging it) and many-shot prompts (0 to 20 answers that
show the trait) are put before the trait's evaluation questions, which neither the vector nor its layer has seen. The
projection before the answer is compared with the answers' mean trait score: r overall and within a condition, 95 %
intervals clustered by question, beside random directions and a baseline that reads the prompts' text alone.

Usage: python scripts/monitoring_experiment.py MODEL VECTOR TRAIT --judge sentiment [--out DIR]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from monitoring_report import line, plot, report, write_csv
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from torch import Tensor
from tqdm import tqdm

from persona_vectors.cli.judges import make_judge
from persona_vectors.cli.options import Device, DType, ModelArg, load_by_name
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import Interval, correlation_interval
from persona_vectors.data.traits import Trait, load_trait
from persona_vectors.evaluation.judge import Answer, score
from persona_vectors.model.generation import generate_batches, stop_tokens
from persona_vectors.model.pooling import pool_while_generating
from persona_vectors.model.prompts import chat_text, decode, encode
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
    loaded, tokenizer = load_by_name(model, device=device, dtype=dtype)
    scorer = make_judge(
        judge, loaded, tokenizer, loaded_trait, lambda name: load_by_name(name, device=device, dtype=dtype)
    )
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

    points, hidden = measure(loaded, tokenizer, loaded_trait, scorer, out, settings)
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


def measure(
    model: Any, tokenizer: Any, trait: Trait, scorer: Any, out: Path, settings: dict[str, Any]
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return a point for each condition and question, and the residual stream before each, [point, layer, hidden]."""
    max_new_tokens, asked = settings["max_new_tokens"], trait.questions.eval[: settings["questions"]]
    shots = make_shots(model, tokenizer, trait, out, max_new_tokens // 2)
    points: list[dict[str, Any]] = []
    states: list[Tensor] = []
    conditions = make_conditions(trait, shots)
    for name, before in tqdm(conditions.items(), desc="conditions"):
        prompts = [[*before, {"role": "user", "content": question}] for question in asked]
        each = settings["shot_samples"] if name.startswith("shots") else settings["samples"]
        answers, hidden = answered(model, tokenizer, prompts, out / name, each, max_new_tokens)
        flat = [Answer(question, text) for question, row in zip(asked, answers) for text in row]
        scores = [np.nan if s is None else s for s in score(scorer, flat, trait.eval_prompt)]
        for index, question in enumerate(asked):
            own = scores[index * each : (index + 1) * each]
            mean = float(np.nanmean(own)) if not np.all(np.isnan(own)) else np.nan
            text = chat_text(tokenizer, prompts[index], add_generation_prompt=True)
            points.append({"condition": name, "question": index, "asked": question, "text": text, "score": mean})
        states.append(hidden)
    return points, torch.cat(states)


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
        for batch in generate_batches(
            model,
            tokenizer,
            rows,
            max_new_tokens=max_new_tokens,
            during=lambda _: pool_while_generating(model, stops=stops, poolings=["prompt_last"]),
        ):
            means = batch.read().means[:, 0]
            for i, (made, _), mean in zip(batch.rows, batch.answers, means):
                answers[i], states[i] = decode(tokenizer, made), mean
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


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
