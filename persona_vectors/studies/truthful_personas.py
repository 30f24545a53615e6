"""Truthful personas: whether it can be read before an answer begins that it will be right.

Joshi et al. 2023 (arXiv 2310.18168). Short questions on eight topics are answered greedily, and an answer is right
that holds the expected word. A ridge probe of the state at the prompt's last token is fitted to seven topics and
scores the questions of the eighth; it is measured by the AUROC within each topic, as topics differ in how hard they
are, at the layer where the mean over topics is best. Its null permutes which of a topic's answers are right, and
takes the best layer again. Beside it stands the same probe of the questions' TF-IDF: what the words alone tell.

The paper: whether an answer will be true can be told from the model's state before it is given; training on some
topics' facts makes a model more truthful on others.

A small model can show whether its state knows what it will get wrong across topics, better than the question's words
do; it cannot show that this is a truthful persona, as what it reads may be how common a question is.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from persona_vectors.model.generation import generate
from persona_vectors.model.pooling import prompt_states
from persona_vectors.studies.frame import Given, Line, over, shipped, upper
from persona_vectors.vectors.nulls import random_null
from persona_vectors.vectors.probes import auroc, held_out

VECTORS = 0
TRUTHS: dict[str, list[list[str]]] = shipped("truths")
"""Questions by topic, each with the words of which a right answer holds one."""


def is_right(answer: str, expected: Sequence[str]) -> bool:
    """Return whether an answer holds one of the expected words, whatever their case."""
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in expected)


def answered(given: Given, facts: Sequence[Sequence[str]]) -> list[bool]:
    """Return whether the greedy answer to each question is right."""
    texts = generate(given.model, given.tokenizer, [q for q, *_ in facts], max_new_tokens=24, temperature=0)
    return [is_right(text, expected) for text, (_, *expected) in zip(texts, facts)]


def within(smoother: np.ndarray, labels: np.ndarray, topics: np.ndarray) -> list[float]:
    """Return the AUROC within each topic of the scores that a probe held out by topic gives."""
    scores = smoother @ labels
    return [auroc(scores[topics == topic], labels[topics == topic]) for topic in np.unique(topics)]


def probed(given: Given, questions: Sequence[str], right: Sequence[bool], topics: Sequence[str]) -> dict[str, Any]:
    """Return the AUROCs of probes at each layer and of TF-IDF, [layer, topic], and the means of permuted labels."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    states = prompt_states(given.model, given.tokenizer, questions).double().numpy()
    words = TfidfVectorizer().fit_transform(questions).toarray()
    labels, of, rng = np.array(right), np.array(topics), np.random.default_rng(given.seed)
    scaled = states / np.maximum(states.std(axis=0), 1e-12)
    ways = [held_out(each, of) for each in (*scaled.swapaxes(0, 1), words)]
    shuffled = []
    for _ in range(200):
        order = np.concatenate([rng.permutation(np.flatnonzero(of == topic)) for topic in dict.fromkeys(topics)])
        shuffled.append([float(np.mean(within(way, labels[order], of))) for way in ways])
    return {"own": [within(way, labels, of) for way in ways], "permuted": shuffled}


def lines(given: Given) -> list[Line]:
    """Return what the state before an answer says of it, on 3 `size` questions of each topic, at most twelve."""
    facts = {topic: each[: 3 * given.size] for topic, each in TRUTHS.items()}
    right = {topic: given.once(topic, answered, given, each) for topic, each in facts.items()}
    rows = [(q, yes, topic) for topic in facts for (q, *_), yes in zip(facts[topic], right[topic])]
    found = given.once("probes", probed, given, *map(list, zip(*rows)))
    (*own, words), permuted = np.array(found["own"]), torch.tensor(found["permuted"])
    null = random_null(torch.tensor([each.mean() for each in own]), permuted[:, :-1])
    words_null, of = permuted[:, -1].numpy(), "permuted labels"
    return [
        Line("questions answered right", over(np.mean(each) for each in right.values())),
        Line(f"AUROC of the state at layer {null.layer}, the best", over(own[null.layer]), *upper(null.random, of)),
        Line("AUROC of the question's TF-IDF", over(words), *upper(words_null, of)),
        Line("state less TF-IDF", over(own[null.layer] - words), *upper(null.random.numpy() - words_null, of)),
    ]
