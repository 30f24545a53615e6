"""The demonstration: extract a vector from the embedded model, choose its layer, and steer with it beside a control."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.progress import bar
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.answers import steered_answers
from persona_vectors.evaluation.judge import Answer, score
from persona_vectors.evaluation.judges import ContrastJudge, PerplexityJudge, SentimentJudge
from persona_vectors.extraction.difference import extract
from persona_vectors.model.blocks import Model
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.vector import PersonaVector

COEFS = (-2.0, -1.0, 0.0, 1.0, 2.0)
ByCoef = dict[float, Interval]


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration found; every score is on evaluation questions, which chose nothing."""

    vector: PersonaVector
    layer: int
    sentiment: dict[str, ByCoef]
    """VADER's compound score (-1 to 1), by vector (the trait's, and the controls) and coefficient."""
    contrast: ByCoef
    """ContrastJudge's score (0 to 100) of the trait's vector, by coefficient."""
    effect: dict[str, Interval]
    """VADER at the highest coefficient minus at the lowest, by vector."""
    examples: dict[float, str]


def choose_layer(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    questions: Sequence[str],
    *,
    layers: Sequence[int],
    coef: float,
    max_new_tokens: int,
) -> tuple[int, dict[int, float]]:
    """Return the layer where +-`coef` moves the sentiment most with coherent answers, and every layer's effect."""
    sentiment, coherence = SentimentJudge(), PerplexityJudge(model, tokenizer)
    effects: dict[int, float] = {}
    for layer in bar(layers, desc="choosing the layer", unit="layer"):
        low, high = steered_answers(
            model, tokenizer, vector, questions, layer=layer, coefs=[-coef, coef], max_new_tokens=max_new_tokens
        )
        both = [Answer(question, answer) for side in (low, high) for question, answer in zip(questions, side)]
        scores = [value or 0.0 for value in score(coherence, both, "")]
        coherent = sum(scores) / len(scores) >= 50
        difference = [sentiment.compound(b) - sentiment.compound(a) for a, b in zip(low, high)]
        effects[layer] = sum(difference) / len(difference) if coherent else -math.inf
    return max(effects, key=lambda layer: effects[layer]), effects


def run_demo(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    *,
    out: str | Path = "runs/demo",
    controls: int = 1,
    samples: int = 1,
    eval_samples: int = 2,
    first: int | None = 10,
    extract_tokens: int = 32,
    max_new_tokens: int = 40,
) -> DemoResult:
    """Extract the trait's vector, choose a layer on the extraction questions, and steer on the evaluation questions.

    The vector is made of answers to the `first` extraction questions. `controls` random vectors of the same norm are
    steered with beside it, at the lowest and highest coefficient. Answers have `extract_tokens` tokens where the vector
    and its layer are made, and `max_new_tokens` where they are scored. The score is VADER's, so the trait should be one
    of valence. Writes the vector, the rollouts and two plots to `out`; a second run goes on from the rollouts there.
    """
    out = Path(out)
    quick = ContrastJudge(model, tokenizer, trait, pairs=1)
    drawing: dict[str, Any] = {"samples": samples, "first": first, "max_new_tokens": extract_tokens}
    drawing["rollouts"] = out / "rollouts.jsonl"
    vector = extract(model, tokenizer, trait, judge=quick, **drawing)
    vector.save(out / f"{trait.name}.safetensors")
    count = len(vector.directions)
    layers = range(count // 3, count - count // 6, max(1, count // 7))
    questions = trait.questions.extract[:10]
    layer, _ = choose_layer(
        model, tokenizer, vector, questions, layers=layers, coef=max(COEFS), max_new_tokens=extract_tokens
    )
    held_out = list(trait.questions.eval)
    candidates = {trait.name: vector} | {f"random {seed}": random_vector(vector, seed=seed) for seed in range(controls)}
    sentiment: dict[str, ByCoef] = {}
    effect: dict[str, Interval] = {}
    own: list[list[str]] = []
    for name, candidate in candidates.items():
        coefs = COEFS if candidate is vector else (COEFS[0], COEFS[-1])
        asked = [question for question in held_out for _ in range(eval_samples)]
        options: dict[str, Any] = {"layer": layer, "coefs": coefs, "max_new_tokens": max_new_tokens}
        answers = steered_answers(model, tokenizer, candidate, asked, **options)
        own = own or answers
        sentiment[name], effect[name] = _score(answers, coefs, eval_samples)
        sentiment[name][0.0] = sentiment[trait.name][0.0]  # nothing is added there
    answered = [Answer(q, row[i * eval_samples]) for row in own for i, q in enumerate(held_out)]
    values = [math.nan if value is None else value for value in score(quick, answered, trait.eval_prompt)]
    contrast = {c: mean_interval([[v] for v in part]) for c, part in zip(COEFS, _split(values, len(held_out)))}
    examples = {coef: " ".join(row[0].split()) for coef, row in zip(COEFS, own)}
    result = DemoResult(vector, layer, sentiment, contrast, effect, examples)
    _draw(result, trait.name, out)
    return result


def _score(answers: Sequence[Sequence[str]], coefs: Sequence[float], size: int) -> tuple[ByCoef, Interval]:
    """Return the sentiment at each coefficient, and its difference from the lowest to the highest, by question."""
    analyzer = SentimentJudge()
    compounds = [_split([analyzer.compound(answer) for answer in row], size) for row in answers]
    pairs = zip(compounds[0], compounds[-1])
    effect = mean_interval([[sum(high) / len(high) - sum(low) / len(low)] for low, high in pairs])
    return {coef: mean_interval(rows) for coef, rows in zip(coefs, compounds)}, effect


def _draw(result: DemoResult, trait: str, out: Path) -> None:
    from persona_vectors.cli.options import save_figure
    from persona_vectors.evaluation.plots import plot_scores
    from persona_vectors.vectors.plots import plot_vector

    save_figure(plot_vector(result.vector, layer=result.layer), out / "vector.png")
    figure = plot_scores(
        result.sentiment,
        title=f"{trait} at layer {result.layer}: held-out questions",
        ylabel="VADER sentiment, -1 to 1",
        controls=[name for name in result.sentiment if name != trait],
    )
    save_figure(figure, out / "steering.png")


def _split(values: Sequence[float], size: int) -> list[list[float]]:
    return [list(values[i : i + size]) for i in range(0, len(values), size)]
