"""PersonaFuse: how much of each personality is added depends on the situation, which a probe reads from the prompt.

Tang et al. 2025 (arXiv 2509.07370) route between personality experts by the situation. Here the experts are the
first two vectors, the situations are the questions of their traits, and the gate is a logistic regression on the
state of a prompt's last token at the first vector's layer, fitted on the questions for extraction and used on those
for evaluation: with g the probability of the second situation, in tenths, the vectors are added with 1 - g and g of
their recommended coefficients. Ungated, each prompt has the mean of all gates. An effect is the change of the
likelihood contrast of statements, as answers to the question, in nats a token; selective is the effect on the
situation's own trait less that on the other. The null gives each question the gate of another one.

The paper: social and emotional understanding well above the models that it starts from, without loss of reasoning.

A small model can show whether a gate sends the right vector to a prompt, and what that is worth; it cannot show which
personality a situation asks for, as that is given by its label.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
from scipy.special import expit

from persona_vectors.data.traits import load_trait
from persona_vectors.evaluation.likelihood import likelihood_contrast, load_statements
from persona_vectors.model.pooling import prompt_states
from persona_vectors.steering.add import steer
from persona_vectors.studies.frame import Given, Line, over, upper
from persona_vectors.vectors.probes import logistic

VECTORS = 2


def gates(states: np.ndarray, kinds: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return the probability that each new prompt is of kind 1, by a probe of states [prompt, hidden] of kinds 0, 1."""
    weights, bias = logistic(states, kinds)
    return expit(new @ weights + bias)


def own_and_other(effects: np.ndarray, kinds: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return effects on the question's own trait and the other, of [question, gate, trait], with gates by `order`."""
    chosen, every = effects[np.arange(len(order)), order], np.arange(len(order))
    return chosen[every, kinds], chosen[every, 1 - kinds]


def contrasts(given: Given, question: str, shares: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the mean contrast of both traits' statements after a question, [share][trait], by the vectors' shares."""
    sets, found = [load_statements(v.trait).split()[1].part(0, 3) for v in given.vectors[:2]], []
    asked = [each.model_copy(update={"question": question}) for each in sets]
    for each in shares:
        with ExitStack() as stack:
            for (vector, layer, coef, where), share in zip(given.edits, each):
                stack.enter_context(steer(given.model, vector, layer=layer, coef=share * coef, positions=where))
            found.append([float(likelihood_contrast(given.model, given.tokenizer, text).mean()) for text in asked])
    return found


def lines(given: Given) -> list[Line]:
    """Return the gate's accuracy and what it does to both traits; on 2 `size` questions of each, at most 20."""
    traits = [load_trait(vector.trait).questions for vector in given.vectors[:2]]
    asked = [question for trait in traits for question in trait.eval[: 2 * given.size]]
    made = [question for trait in traits for question in trait.extract]
    layer = int(given.edits[0].layer)
    read = given.once("states", lambda: prompt_states(given.model, given.tokenizer, [*made, *asked])[:, layer].tolist())
    known, new = np.split(np.array(read), [len(made)])
    labels, kinds = (np.repeat([0, 1], [len(each) // 2] * 2) for each in (made, asked))
    found, rng = gates(known, labels, new), np.random.default_rng(given.seed)
    right = ((found > 0.5) == kinds).astype(float)
    permuted = [np.mean((gates(known, rng.permutation(labels), new) > 0.5) == kinds) for _ in range(100)]
    levels, order = np.unique(found.round(1), return_inverse=True)
    shares = [[1 - gate, gate] for gate in (*levels.tolist(), float(found.mean()))]
    seen = np.array([given.once(question, contrasts, given, question, [*shares, [0, 0]]) for question in asked])
    effects = seen[:, :-1] - seen[:, -1:]
    own, other = own_and_other(effects, kinds, order)
    flat, elsewhere = own_and_other(effects, kinds, np.full_like(order, len(levels)))
    shuffles = [np.subtract(*own_and_other(effects, kinds, rng.permutation(order))).mean() for _ in range(1000)]
    return [
        Line("gate right on new questions", over(right.tolist()), *upper(permuted, "permuted labels")),
        Line("effect on the situation's trait, gated", over(own)),
        Line("effect on the situation's trait, ungated", over(flat)),
        Line("effect on the other trait, gated", over(other)),
        Line("effect on the other trait, ungated", over(elsewhere)),
        Line("selective, gated", over(own - other), *upper(shuffles, "shuffled gates")),
        Line("selective, gated less ungated", over(own - other - flat + elsewhere)),
    ]
