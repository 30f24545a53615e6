from itertools import product

import numpy as np
import pytest

from persona_vectors.evaluation.policies import (
    answers,
    frequencies,
    judged,
    judged_token,
    overlap,
    ranks,
    total_variation,
    two_samples,
)

DRAFT, JUDGE = np.array([0.5, 0.3, 0.2, 0.0]), np.array([0.1, 0.3, 0.2, 0.4])


def test_the_chance_to_be_accepted_is_one_less_the_total_variation():
    assert overlap(DRAFT, JUDGE) == pytest.approx(0.6) == 1 - total_variation(DRAFT, JUDGE)
    assert overlap(DRAFT, DRAFT) == pytest.approx(1)
    assert overlap(np.array([1.0, 0]), np.array([0, 1.0])) == 0
    rng = np.random.default_rng(0)
    accepted = np.mean([judged_token(DRAFT, JUDGE, rng)[1] for _ in range(4000)])
    assert accepted == pytest.approx(0.6, abs=0.025)


def test_each_token_s_distribution_is_the_judge_s_by_enumeration():
    residue = np.maximum(JUDGE - DRAFT, 0)
    refused = 1 - overlap(DRAFT, JUDGE)
    np.testing.assert_allclose(np.minimum(DRAFT, JUDGE) + refused * residue / residue.sum(), JUDGE)


def test_answers_have_the_judge_s_distribution_and_not_the_draft_s():
    """Three tokens whose chances depend on the ones before: 27 answers, all of whose probabilities are known."""

    def policy(seed):
        def after(prefix):
            return np.random.default_rng([seed, *prefix]).dirichlet(np.ones(3))

        known = {prefix: after(prefix) for length in range(3) for prefix in product(range(3), repeat=length)}
        return lambda prefixes: [known[prefix] for prefix in prefixes]

    def exact(of):
        steps = [of([(), (a,), (a, b)]) for a, b, _ in product(range(3), repeat=3)]
        return np.array([p[a] * q[b] * r[c] for (p, q, r), (a, b, c) in zip(steps, product(range(3), repeat=3))])

    draft, judge, rng = policy(1), policy(2), np.random.default_rng(3)
    drawn = np.array(judged(draft, judge, 4000, 3, rng)) @ [9, 3, 1]
    alone = np.array(answers(draft, 4000, 3, rng)) @ [9, 3, 1]
    assert total_variation(frequencies(drawn, 27), exact(judge)) < 0.05
    assert total_variation(frequencies(alone, 27), exact(draft)) < 0.05
    assert total_variation(exact(draft), exact(judge)) > 0.3


def test_two_samples_of_one_distribution_are_as_far_apart_as_shuffled_ones_and_others_further():
    rng = np.random.default_rng(0)
    first, second = ([(int(x),) for x in rng.choice(4, 200, p=JUDGE)] for _ in range(2))
    near, null = two_samples(first, second, rng)
    assert near <= np.quantile(null, 0.975)
    far, null = two_samples(first, [(int(x),) for x in rng.choice(4, 200, p=DRAFT)], rng)
    assert far > max(null) and far == pytest.approx(0.4, abs=0.1)
    assert two_samples([(1,)], [(2,)], rng)[0] == 1


def test_tokens_are_known_by_their_ranks():
    assert ranks(lambda prefixes: [JUDGE] * len(prefixes), (3, 1, 2, 0)) == (0, 1, 2, 3)
    assert ranks(lambda prefixes: [JUDGE] * len(prefixes), (3, 1, 2, 0), most=1) == (0, 1, 1, 1)
