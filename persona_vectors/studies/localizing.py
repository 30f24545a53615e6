"""Localizing persona representations: in which layers and units a persona's statements part from their opposites.

Cintas et al. 2025 (arXiv 2505.24539). A statement's state is the mean over its tokens at each block. Told apart is a
pair of statements, one that shows the persona and its opposite, whose difference has a positive projection on the
mean difference of all other pairs; random directions with the covariance of the states are taken at their own best
layer and with their better sign. The units that carry a persona are found by a scan over the last block's units:
each has a p-value, of a t-test of the pairs' differences, and the subset of those at most alpha is the one that
maximises Berk and Jones's N * KL(share at most alpha, alpha). Its null flips the pairs' signs. Overlap is the
Jaccard index of two personas' subsets, beside that of random subsets of their sizes.

The paper: personas part much only in the final third of the layers; units of some ethical views overlap, those of
political ones less.

A small model can show whether statements part in it, where, and in how many units; it cannot show that a persona is
more than what these statements have in common.
"""

from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.stats import ttest_1samp

from persona_vectors.evaluation.likelihood import load_statements
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.studies.frame import Given, Line, over
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.nulls import random_null
from persona_vectors.vectors.probes import jaccard, jaccard_by_chance, scan, told_apart
from persona_vectors.vectors.vector import PersonaVector

VECTORS = 0
SETS = ("optimistic", "humorous", "apathetic", "impolite")


def measure(given: Given, name: str) -> dict[str, Any]:
    """Return what layers and units tell a persona's statements apart, and what random directions and signs do."""
    statements = load_statements(name).part(0, 4 * given.size)
    prompts = [chat_prompt(given.tokenizer, question) for question in statements.questions]
    said = [(p, text) for p, pair in zip(prompts, statements.pairs) for text in (pair.pos, pair.neg)]
    states = pool(given.model, [encode_answer(given.tokenizer, p, text) for p, text in said]).means[:, 0]
    differences = states[0::2] - states[1::2]
    mean = PersonaVector(trait=name, model="", directions=differences.mean(dim=0))
    noise = torch.stack([random_vector(mean, seed=given.seed + i, like=states).directions for i in range(100)])
    right = (torch.einsum("plh,rlh->rpl", differences, noise) > 0).float()
    random = torch.maximum(right.mean(dim=1), 1 - right.mean(dim=1))
    own, final = told_apart(differences), 2 * differences.shape[1] // 3
    null = random_null(own.mean(dim=0), random)
    last, rng = differences[:, -1].numpy(), np.random.default_rng(given.seed)
    flips = [last * rng.choice([-1, 1], (len(last), 1)) for _ in range(100)]
    score, subset = scan(ttest_1samp(last, 0).pvalue)
    return {
        "layer": null.layer,
        "best": own[:, null.layer].tolist(),
        "random": null.at(97.5),
        "later": (own[:, final:].mean(dim=1) - own[:, :final].mean(dim=1)).tolist(),
        "later random": (random[:, final:].mean(dim=1) - random[:, :final].mean(dim=1)).tolist(),
        "score": score,
        "scores flipped": [scan(ttest_1samp(each, 0).pvalue)[0] for each in flips],
        "subset": subset.tolist(),
        "units": last.shape[1],
    }


def lines(given: Given) -> list[Line]:
    """Return where each of four personas' statements part; 4 `size` pairs of each, at most all 24."""
    found = {name: given.once(name, measure, given, name) for name in SETS}
    result = []
    for name, each in found.items():
        later = float(np.quantile(each["later random"], 0.975))
        flipped = float(np.quantile(each["scores flipped"], 0.975))
        best, randoms = over(each["best"]), "97.5th percentile of 100 random directions"
        signs = "97.5th percentile of flipped signs"
        result += [
            Line(f"{name}: pairs told apart at layer {each['layer']}, the best", best, each["random"], randoms),
            Line(f"{name}: final third of the layers less the others", over(each["later"]), later, randoms),
            Line(f"{name}: scan of {each['units']} units", over([each["score"]]), flipped, signs),
            Line(f"{name}: share of units in the subset", over([len(each["subset"]) / each["units"]])),
        ]
    for one, other in combinations(SETS, 2):
        a, b, units = (np.array(found[one]["subset"]), np.array(found[other]["subset"]), found[one]["units"])
        chance = jaccard_by_chance(len(a), len(b), units)
        result.append(Line(f"overlap of {one} and {other}", over([jaccard(a, b)]), chance, "random subsets"))
    return result
