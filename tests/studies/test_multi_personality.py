from itertools import product

import numpy as np
import pytest
import torch

from persona_vectors.data.ledger import Ledger
from persona_vectors.evaluation.likelihood import State, likelihood_contrasts, load_statements
from persona_vectors.evaluation.policies import (
    acceptance,
    accepted,
    combined,
    combined_contrasts,
    frequencies,
    total_variation,
)
from persona_vectors.studies.frame import Given


def policies():
    """A reference and two parts over two tokens, whose chances depend on the ones before; 16 answers of four tokens."""
    rng = np.random.default_rng(5)
    prefixes = [prefix for length in range(4) for prefix in product(range(2), repeat=length)]
    return [{prefix: rng.dirichlet([2, 2]) for prefix in prefixes} for _ in range(3)]


def chance(policy, prefix, chunk):
    return np.prod([policy[prefix + chunk[:i]][token] for i, token in enumerate(chunk)])


CHUNKS = list(product(range(2), repeat=2))


def exact(reference, *parts, weights=(1.0, 0.5)):
    """The target by enumeration: each chunk's own, over one for all chunks that may follow its prefix."""

    def of(prefix):
        ratios = [
            chance(reference, prefix, c)
            * np.prod([(chance(p, prefix, c) / chance(reference, prefix, c)) ** a for p, a in zip(parts, weights)])
            for c in CHUNKS
        ]
        return np.array(ratios) / sum(ratios)

    return np.concatenate([of(())[i] * of(first) for i, first in enumerate(CHUNKS)])


@pytest.mark.parametrize("known", [True, False], ids=["largest-known", "window"])
def test_accepted_chunks_have_the_exact_target_s_distribution(known):
    reference, *parts = policies()
    rng, weights = np.random.default_rng(0), (1.0, 0.5)

    def log_ratios(prefix):
        logs = [[np.log(chance(p, prefix, c) / chance(reference, prefix, c)) for c in CHUNKS] for p in parts]
        return np.dot(weights, logs)

    def step(prefix):
        ratios, chances = log_ratios(prefix), [chance(reference, prefix, c) for c in CHUNKS]
        while True:
            window = rng.choice(4, 64, p=chances)
            taken = accepted(ratios[window], rng, ratios.max() if known else None)
            if taken is not None:
                return int(window[taken])

    drawn = []
    for _ in range(3000):
        first = step(())
        drawn.append(4 * first + step(CHUNKS[first]))
    target, plain = exact(reference, *parts), exact(reference)
    assert total_variation(frequencies(np.array(drawn), 16), target) < 0.05
    assert total_variation(plain, target) > 0.15


def test_a_chunk_s_acceptance_is_its_ratio_over_the_largest():
    assert acceptance(np.log([1.0, 2.0, 4.0, 1.0])) == pytest.approx((0.25 + 0.5 + 1 + 0.25) / 4)
    assert acceptance(np.zeros(8)) == 1
    rng = np.random.default_rng(0)
    assert accepted(np.full(5, -800.0), rng, largest=0.0) is None
    assert accepted(np.array([-800.0, 0, -800.0]), rng) == 1


def test_the_target_of_one_token_is_the_product_normalised():
    reference, part = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.2, 0.6])
    tilted = reference * (part / reference) ** 2
    found = combined(reference.log(), [part.log()], [2.0]).exp()
    torch.testing.assert_close(found, tilted / tilted.sum())
    torch.testing.assert_close(combined(reference.log(), [part.log()], [1.0]).exp(), part)
    torch.testing.assert_close(combined(reference.log(), [], []).exp(), reference)


def test_the_target_of_one_part_has_that_part_s_contrast_on_statements(model, tokenizer, vectors):
    statements = load_statements("optimistic").part(0, 3)
    given = Given(model, tokenizer, tuple(vectors), 1, 0, Ledger(None))
    found = combined_contrasts(model, tokenizer, statements, given.edits, [(), (1,)])
    plain = likelihood_contrasts(model, tokenizer, statements, [State(), State(given.edits[1])])
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-3, check_dtype=False)
