"""Editing personality: an opinion on one topic is edited, and what it costs on others.

Mao et al. 2023 (arXiv 2310.02168). For a statement that shows the wanted opinion of the topic, of mean log-
probability lp+, and its opposite's lp-: ES = sigmoid(lp+ - lp-) * min(1, exp(lp+ - lp+ before)), which a model that
says neither any more does not raise; DD = the mean over tokens of KL(before | after) on statements about other
topics. The edit is the first vector, added everywhere, or only at tokens whose projection on the topic's direction
(mean activation of statements about it, less that of the others) is above a threshold: the 25th percentile of the
topic's own tokens. Both are given the same ES, by coefficient, and their DD compared; gates by random directions
that open as often are the null. Directions and thresholds are made of other statements than those that are measured.
The change of ratings is that of the expected agreement, 1 to 5, with "Like TOPIC.".

The paper: a benchmark of opinions on topics with three personality traits, which methods that edit knowledge find
hard.

A small model can show whether a gate on the topic saves drawdown at equal success; it cannot show whether its
opinions are a personality.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_vectors.evaluation.cost import coef_at, edit_success, next_logprobs, token_kls
from persona_vectors.evaluation.inventory import item_scores
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.steering.bounds import steer_where
from persona_vectors.studies.frame import Given, Line, over
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.vector import PersonaVector

VECTORS = 1
Gate = tuple[PersonaVector, float]
"""The direction that is watched, and the projection above which the gate is open."""
TOPICS = ("coffee", "jazz", "football", "Paris", "chess", "gardening", "winter", "trains")
MADE = (("{} is a fine thing.", "{} is a poor thing."), ("I know a lot about {}.", "I know little about {}."))
MEASURED = (
    ("I am sure that {} will bring you joy.", "I am afraid that {} will bring you trouble."),
    ("There is so much to love about {}.", "There is so little to love about {}."),
)


class Topic:
    """One topic's statements, and what interventions do to them and to others'."""

    def __init__(self, given: Given, topic: str) -> None:
        self.given, self.edit = given, given.edits[0]
        self.others = [other for other in TOPICS if other != topic]
        self.made = self.rows(topic, MADE)
        self.measured, self.elsewhere = self.rows(topic, MEASURED), [self.rows(t, MEASURED)[0] for t in self.others]
        self.before = answer_logprobs(given.model, self.measured)
        self.plain = next_logprobs(given.model, self.elsewhere)

    def rows(self, topic: str, texts: Sequence[tuple[str, str]]) -> list[Row]:
        """Return statements about a topic, wanted ones and their opposites in turn."""
        prompt = chat_prompt(self.given.tokenizer, f"What do you say about {topic}?")
        said = [text.format(topic) for pair in texts for text in pair]
        return [encode_answer(self.given.tokenizer, prompt, text[0].upper() + text[1:]) for text in said]

    def direction(self) -> PersonaVector:
        """Return the topic's direction at every layer."""
        elsewhere = [row for other in self.others for row in self.rows(other, MADE)]
        means = pool(self.given.model, self.made + elsewhere).means[:, 0]
        here, there = means.split([len(self.made), len(elsewhere)])
        return self.edit.vector._derived("topic", here.mean(dim=0) - there.mean(dim=0))

    def projections(self, watch: PersonaVector, rows: Sequence[Row]) -> Tensor:
        """Return the projections of all tokens of some rows, [token]."""
        units = unit_directions(self.given.model, [watch], self.edit.layer)
        return torch.cat(token_projections(self.given.model, rows, units))[:, 0]

    def gates(self, count: int) -> list[Gate]:
        """Return the gate that is always open, the topic's, and random ones that open as often as it does."""
        own, everywhere = self.direction(), [*self.measured, *self.elsewhere]
        level = float(self.projections(own, self.made).quantile(0.25))
        shut = float((self.projections(own, everywhere) <= level).float().mean())
        noise = [random_vector(own, seed=self.given.seed + i) for i in range(count)]
        shut_at = [self.projections(each, everywhere).quantile(shut) for each in noise]
        return [(own, -math.inf), (own, level), *zip(noise, map(float, shut_at))]

    def steered(self, gate: Gate, coef: float) -> AbstractContextManager[None]:
        """Return the edit at a coefficient, at tokens where the gate is open."""
        watch, level = gate
        options: dict[str, Any] = {"when": lambda found: found > level, "watch": watch}
        return steer_where(self.given.model, self.edit.vector, layer=self.edit.layer, coef=coef, **options)

    def success(self, gate: Gate, coef: float) -> float:
        """Return the mean ES over the topic's statements."""
        with self.steered(gate, coef):
            return self._success(answer_logprobs(self.given.model, self.measured))

    def _success(self, found: Tensor) -> float:
        return float(edit_success(found[0::2], found[1::2], self.before[0::2]).mean())

    def random_success(self, count: int) -> list[float]:
        """Return the ES of random vectors in the edit's place."""
        edits = [edit for edit in self.given.random_edits(self.edit, count) for _ in self.measured]
        found = answer_logprobs(self.given.model, self.measured * count, edits=edits).view(count, -1)
        return [self._success(each) for each in found]

    def drawdown(self, gate: Gate, coef: float) -> float:
        """Return DD on the other topics; nan for a coefficient that is."""
        if math.isnan(coef):
            return math.nan
        with self.steered(gate, coef):
            return float(token_kls(self.plain, next_logprobs(self.given.model, self.elsewhere)).mean())


def measure(given: Given, name: str) -> dict[str, Any]:
    """Return a topic's ES and DD: of the edit everywhere, behind the topic's gate, and behind random ones."""
    topic, full = Topic(given, name), given.edits[0].coef
    ways = topic.gates(4)
    wanted = min(topic.success(way, full) for way in ways[:2])
    coefs = [coef_at(partial(topic.success, way), wanted, full) for way in ways]
    found: dict[str, Any] = {"before": topic.success(ways[0], 0.0), "everywhere": topic.success(ways[0], full)}
    found |= {"gated": topic.success(ways[1], full), "random": topic.random_success(10)}
    ratings = []
    for way, coef in [(ways[0], 0.0), *zip(ways, coefs)][:3]:
        with topic.steered(way, coef):
            ratings.append(float(item_scores(given.model, given.tokenizer, [f"Like {name}."]).mean()))
    return found | {"drawdown": [topic.drawdown(*each) for each in zip(ways, coefs)], "ratings": ratings}


def lines(given: Given) -> list[Line]:
    """Return ES, and DD at equal ES; of the first `size` + 1 topics."""
    found = [given.once(name, measure, given, name) for name in TOPICS[: given.size + 1]]
    randoms = float(np.mean([each["random"] for each in found], axis=0).max())
    costs = np.array([each["drawdown"] for each in found], dtype=float)
    saved = costs[:, 1:] - costs[:, :1]
    gates = float(np.nanmin(np.nanmean(saved[:, 1:], axis=0)))
    ratings = np.array([each["ratings"] for each in found])
    return [
        Line("ES before", over(each["before"] for each in found)),
        Line("ES, added everywhere", over(each["everywhere"] for each in found), randoms, "most of 10 random vectors"),
        Line("ES, added where the gate is open", over(each["gated"] for each in found), randoms, "the same"),
        Line("DD at equal ES, everywhere", over(costs[:, 0])),
        Line("DD at equal ES, gated", over(costs[:, 1])),
        Line("DD, gated less everywhere", over(saved[:, 0]), gates, "least of 4 random gates that open as often"),
        Line("rating's change at equal ES, everywhere", over(ratings[:, 1] - ratings[:, 0])),
        Line("rating's change at equal ES, gated", over(ratings[:, 2] - ratings[:, 0])),
    ]
