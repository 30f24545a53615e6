"""Persona-judge: tokens drafted under one preference and accepted under another.

Zhang et al. 2025 (arXiv 2504.12663). Here the draft is the plain model and the judge the model under the first
vector. A drafted token x is accepted with probability min(1, judge(x) / draft(x)); else one is drawn from max(judge
- draft, 0). That is speculative sampling: whatever the draft, each token has the judge's own distribution, and is
accepted with probability 1 - TV, TV being the total variation of the two. The acceptance is read exactly, at the
first token of each question's answer. Four thousand first tokens are held against both exact distributions, and
pairs of the first two tokens against as many of the judge's own and of the draft's own. A token counts as one of the
judge's seven likeliest after its prefix, or as another.

The paper: answers that fit preferences which no model was trained for, with no training and no reward model, from
one model that drafts and judges under different prompts.

A small model can show what the distribution is, and how seldom a steered judge refuses; it cannot show which answers
people would prefer.
"""

import numpy as np

from persona_vectors.data.intervals import Interval
from persona_vectors.data.traits import list_traits, load_trait
from persona_vectors.evaluation.policies import (
    answers,
    frequencies,
    judged,
    judged_token,
    overlap,
    policy,
    ranks,
    total_variation,
    two_samples,
)
from persona_vectors.studies.frame import Given, Line, over

VECTORS = 1


def lines(given: Given) -> list[Line]:
    """Return the acceptance beside random judges', and both samples' distance beside shuffled ones'.

    There are `size` + 2 questions, and of each 10 `size` pairs of tokens each way.
    """
    edit = given.edits[0]
    trait = edit.vector.trait
    questions = load_trait(trait if trait in list_traits() else "optimistic").questions.eval
    noise = given.random_edits(edit, 20)

    def ask(question: str) -> dict[str, object]:
        draft, judge = (
            policy(given.model, given.tokenizer, question, None),
            policy(given.model, given.tokenizer, question, edit),
        )
        (drafted,), (wanted,) = draft([()]), judge([()])
        randoms = [overlap(drafted, policy(given.model, given.tokenizer, question, each)([()])[0]) for each in noise]
        rng = np.random.default_rng([given.seed, *question.encode()])
        count = 10 * given.size
        samples = [judged(draft, judge, count, 2, rng), answers(judge, count, 2, rng), answers(draft, count, 2, rng)]
        known = [[ranks(judge, tokens) for tokens in sample] for sample in samples]
        near, far = two_samples(known[0], known[1], rng), two_samples(known[0], known[2], rng)
        return {"accepted": overlap(drafted, wanted), "random": randoms, "judge": near, "draft": far}

    def first(question: str) -> dict[str, object]:
        drafted, wanted = (policy(given.model, given.tokenizer, question, each)([()])[0] for each in (None, edit))
        rng = np.random.default_rng([given.seed, *question.encode()])
        kind = np.minimum((-wanted).argsort().argsort(), 7)
        exact, other = (np.bincount(kind, weights=each) for each in (wanted, drafted))
        shares = frequencies(kind[[judged_token(drafted, wanted, rng)[0] for _ in range(4000)]], 8)
        own = [total_variation(rng.multinomial(4000, exact / exact.sum()) / 4000, exact) for _ in range(400)]
        return {"judge": (total_variation(shares, exact), own), "draft": (total_variation(shares, other), own)}

    asked = questions[: given.size + 2]
    found = [given.once(question, ask, question) for question in asked]
    firsts = [given.once(f"first: {question}", first, question) for question in asked]

    def distance(read: list[dict], name: str) -> tuple[Interval, float]:
        null = np.mean([each[name][1] for each in read], axis=0)
        return over(each[name][0] for each in read), float(np.quantile(null, 0.975))

    of_random = float(np.mean([each["random"] for each in found], axis=0).min())
    exactly, shuffled = "97.5th percentile of the judge's own draws", "97.5th percentile of shuffled samples"
    accepted = over(each["accepted"] for each in found)
    return [
        Line("acceptance of a drafted token", accepted, of_random, f"least of {len(noise)} random vectors as judges"),
        Line("TV of first tokens to the judge's exact distribution", *distance(firsts, "judge"), exactly),
        Line("TV of first tokens to the draft's exact distribution", *distance(firsts, "draft"), exactly),
        Line("TV of accepted pairs to the judge's own", *distance(found, "judge"), shuffled),
        Line("TV of accepted pairs to the draft's own", *distance(found, "draft"), shuffled),
    ]
