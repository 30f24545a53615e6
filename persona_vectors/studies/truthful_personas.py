"""Truthful personas: whether it can be read before an answer that it will be right, and what facts teach elsewhere.

Joshi et al. 2023 (arXiv 2310.18168). Short questions on eight topics are answered greedily, and an answer is right
that holds the expected word. A ridge probe of the state at the prompt's last token is fitted to seven topics and
scores the questions of the eighth; it is measured by the AUROC within each topic, as topics differ in how hard they
are, at the layer where the mean over topics is best. Its null permutes which of a topic's answers are right, and
takes the best layer again. Beside it stands the same probe of the questions' TF-IDF: what the words alone tell. Then
a LoRA is trained on the answers to all of one topic's questions, for each of some topics: on the right ones, or on
the next question's, which are wrong. A preference is by how much likelier a question's right answer is than the next
two of its topic, in nats a token; what matters is its change on the other topics, beside that of the wrong answers.

The paper: whether an answer will be true can be told from the model's state before it is given; training on some
topics' facts makes a model more truthful on others.

A small model can show whether its state knows what it will get wrong across topics, better than the question's words
do, and whether facts of one topic move another's; it cannot show that this is a truthful persona, as what it reads may
be how common a question is.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.generation import generate
from persona_vectors.model.pooling import prompt_states
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.studies.frame import Given, Line, over, shipped, upper
from persona_vectors.training.finetuning import training_rows
from persona_vectors.training.tuned import tuned
from persona_vectors.vectors.nulls import random_null
from persona_vectors.vectors.probes import auroc_within, held_out

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
        shuffled.append([float(np.mean(auroc_within(way, labels[order], of))) for way in ways])
    return {"own": [auroc_within(way, labels, of) for way in ways], "permuted": shuffled}


def preferences(given: Given, facts: dict[str, list[list[str]]]) -> list[float]:
    """Return by how much likelier each topic's right answers are than those of the next two questions."""
    rows = []
    for each in facts.values():
        for i, (question, *_) in enumerate(each):
            prompt, others = chat_prompt(given.tokenizer, question), [each[(i + k) % len(each)][1] for k in range(3)]
            rows += [encode_answer(given.tokenizer, prompt, text) for text in others]
    found = answer_logprobs(given.model, rows).view(len(facts), -1, 3)
    return (found[..., 0] - found[..., 1:].mean(dim=-1)).mean(dim=1).tolist()


def trained(given: Given, facts: dict[str, list[list[str]]], topic: str, wrong: int) -> list[float]:
    """Return the preferences after training on one topic's answers, or on those of `wrong` questions further."""
    said = [facts[topic][(i + wrong) % len(facts[topic])][1] for i in range(len(facts[topic]))]
    texts = [(question, text) for (question, *_), text in zip(facts[topic], said)]
    with tuned(given.model, training_rows(given.tokenizer, texts, max_length=256), seed=given.seed):
        return preferences(given, facts)


def lines(given: Given) -> list[Line]:
    """Return what states say of answers, on 3 `size` questions a topic, at most 12, and what `size` + 1 of 8 teach."""
    facts = {topic: each[: 3 * given.size] for topic, each in TRUTHS.items()}
    right = {topic: given.once(topic, answered, given, each) for topic, each in facts.items()}
    rows = [(q, yes, topic) for topic in facts for (q, *_), yes in zip(facts[topic], right[topic])]
    found = given.once("probes", probed, given, *map(list, zip(*rows)))
    (*own, words), permuted = np.array(found["own"]), torch.tensor(found["permuted"])
    null = random_null(torch.tensor([each.mean() for each in own]), permuted[:, :-1])
    words_null, of = permuted[:, -1].numpy(), "permuted labels"
    plain, chosen = np.array(given.once("preferences", preferences, given, facts)), list(facts)[: given.size + 1]
    here = np.arange(len(chosen)), np.arange(len(chosen))
    moved = []
    for wrong in (0, 1):
        seen = [given.once(f"{topic} {wrong}", trained, given, facts, topic, wrong) for topic in chosen]
        moved.append(np.array(seen) - plain)
    elsewhere = [(each.sum(axis=1) - each[here]) / (len(facts) - 1) for each in moved]
    nulls = [(float(each.mean()), "trained on wrong answers") for each in (moved[1][here], elsewhere[1])]
    return [
        Line("questions answered right", over(np.mean(each) for each in right.values())),
        Line(f"AUROC of the state at layer {null.layer}, the best", over(own[null.layer]), *upper(null.random, of)),
        Line("AUROC of the question's TF-IDF", over(words), *upper(words_null, of)),
        Line("state less TF-IDF", over(own[null.layer] - words), *upper(null.random.numpy() - words_null, of)),
        Line("preference for right answers", over(plain)),
        Line("its change on the topic that was trained on", over(moved[0][here]), *nulls[0]),
        Line("its change on other topics", over(elsewhere[0]), *nulls[1]),
        Line("its change on other topics, less wrong answers'", over(elsewhere[0] - elsewhere[1])),
    ]
