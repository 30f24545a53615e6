"""Diagnosis: by layer, how far the answer pairs that a vector is of, or others, agree with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.tables import Table
from persona_vectors.extraction.evidence import agreement, difference, other_questions, split_half_cosine
from persona_vectors.extraction.filtering import pairs, parted
from persona_vectors.extraction.reads import no_reads
from persona_vectors.extraction.rollouts import Rollout, read_jsonl
from persona_vectors.model.blocks import Model
from persona_vectors.model.pooling import POOLINGS
from persona_vectors.model.wrappers import unwrap
from persona_vectors.vectors.shipped import VectorLike, as_vector

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAME = 0.999
"""From this cosine on, at every layer, a vector is the difference of the rollouts that it is held against."""


@dataclass(frozen=True)
class Diagnosis(Table):
    """How far answer pairs agree with a vector, one value a layer. Chance: cosines 0, separation and wrong_way 0.5."""

    trait: str
    model: str
    pairs: int
    questions: int
    own: bool
    """Whether the vector is the difference of these pairs. Then each pair is held against that of other questions."""
    pair_cosine: tuple[float, ...]
    """Mean cosine of the pairs' differences, positive less negative answer, with the vector."""
    separation: tuple[float, ...]
    """AUROC of positive against negative answers, projected on it."""
    wrong_way: tuple[float, ...]
    """The share of questions whose pairs' mean difference points against it."""
    split_half_cosine: tuple[float, ...]
    """Of the pairs alone: the cosine between the vectors of two halves of their questions, averaged over splits."""

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a layer."""
        names = ("pair_cosine", "separation", "wrong_way", "split_half_cosine")
        columns = zip(*(getattr(self, name) for name in names))
        return [{"layer": layer, **dict(zip(names, values))} for layer, values in enumerate(columns)]

    def plot(self) -> "Figure":
        """Plot the four by layer."""
        from persona_vectors.vectors.drawing import BLUE, GREY, ORANGE, Figure, bare

        figure = Figure(figsize=(10, 3.8), layout="constrained")
        cosines, shares = figure.subplots(1, 2)
        style: dict[str, Any] = {"marker": "o", "markersize": 3}
        cosines.plot(self.pair_cosine, color=BLUE, label="pairs' differences with the vector, mean", **style)
        cosines.plot(self.split_half_cosine, color=ORANGE, label="halves of the questions", **style)
        cosines.axhline(0, color=GREY, linewidth=0.8)
        cosines.set(title=f"{self.trait}: {self.pairs} pairs, {self.questions} questions", ylabel="cosine")
        shares.plot(self.separation, color=BLUE, label="separation: AUROC", **style)
        shares.plot(self.wrong_way, color=ORANGE, label="questions that move the wrong way", **style)
        shares.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        last = len(self.separation) - 1
        shares.text(last, 0.51, "chance, of both", color=GREY, fontsize=8, va="bottom", ha="right")
        against = "the vector of other questions" if self.own else "the vector"
        shares.set(title=f"each pair against {against}", ylabel="AUROC, share", ylim=(-0.02, 1.02))
        for axes in (cosines, shares):
            axes.set_xlabel("layer (decoder block, from 0)")
            axes.legend(frameon=False, fontsize=9)
            bare(axes)
        return figure


def diagnose(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: VectorLike,
    *,
    rollouts: str | Path | Sequence[Rollout],
    batch_tokens: int | None = None,
) -> Diagnosis:
    """Return by layer how far the answer pairs of `rollouts`, or of the file that `extract` wrote, agree with a vector.

    The answers are read once, with the vector's pooling, and filtered by their scores at its threshold as when it was
    extracted. Where it is the difference of these very pairs, each is held against the vector of other questions, in
    five folds, as no vector is a surprise to what it was made of; other rollouts, say of the evaluation questions, are
    held against the vector as it is. One that is only partly made of these pairs looks better than it is.

    Raises InputError where the pairs that pass are of fewer than two questions.
    """
    vector, model = as_vector(vector), unwrap(model)
    vector.check_fits(model)
    answers = list(_read(rollouts) if isinstance(rollouts, (str, Path)) else rollouts)
    answers = parted(tokenizer, answers, vector.info.get("positions") or "all")
    limit = vector.info.get("threshold")
    kept, counts = pairs(answers, limit)
    pos, neg = ([answers[pair[side]] for pair in kept] for side in (0, 1))
    names = sorted({answer.question for answer in pos})
    if len(names) < 2:
        raise InputError(
            f"{len(kept)} answer pairs of {counts['pos_answers']} positive and {counts['neg_answers']} negative "
            f"answers pass the filter at {limit}, of {len(names)} questions, and a diagnosis needs two: give the "
            "rollouts file of extract, or others with scores"
        )
    question = torch.tensor([names.index(answer.question) for answer in pos])
    pooling = vector.pooling if vector.pooling in POOLINGS else POOLINGS[0]
    with no_reads() as reads:
        reads.add_missing(model, [*pos, *neg], poolings=[pooling], batch_tokens=batch_tokens)

        def means() -> Any:
            return ((reads.mean(one, 0), reads.mean(other, 0)) for one, other in zip(pos, neg))

        direction = difference(means, question)
        whole = direction(torch.ones(len(names), dtype=torch.bool))
        own = bool((torch.nn.functional.cosine_similarity(whole, vector.directions, dim=1) > SAME).all())
        along = other_questions(direction, len(names)) if own else [vector.directions.float()]
        found = agreement(along, means, question)
        found["split_half_cosine"] = split_half_cosine(direction, len(names))
    by_layer = {name: tuple(values.tolist()) for name, values in found.items()}
    return Diagnosis(vector.trait, vector.model, len(pos), len(names), own, **by_layer)


def _read(path: str | Path) -> list[Rollout]:
    if not Path(path).is_file():
        raise InputError(f"no rollouts file {path}: give the one that extract wrote, rollouts=")
    return read_jsonl(Path(path))[1]
