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
from persona_vectors.evaluation.policies import Policy, Tokens, answers, draw, frequencies, policy, total_variation
from persona_vectors.studies.frame import Given, Line, over

VECTORS = 1


def judged_token(draft: np.ndarray, judge: np.ndarray, rng: np.random.Generator) -> tuple[int, bool]:
    """Return the token that follows, of two distributions [vocab], and whether it is the drafted one."""
    token = draw(draft, rng)
    if rng.random() * draft[token] < judge[token]:
        return token, True
    return draw(np.maximum(judge - draft, 0), rng), False


def acceptance(draft: np.ndarray, judge: np.ndarray) -> float:
    """Return the probability that a drafted token is accepted: 1 - TV."""
    return float(np.minimum(draft, judge).sum(dtype=np.float64))


def judged(draft: Policy, judge: Policy, count: int, length: int, rng: np.random.Generator) -> list[Tokens]:
    """Return first tokens of answers. What follows a refused token is drafted anew, as in chunks of any length."""
    found: list[Tokens] = [()] * count
    for _ in range(length):
        both = zip(found, draft(found), judge(found))
        found = [(*tokens, judged_token(drafted, wanted, rng)[0]) for tokens, drafted, wanted in both]
    return found


def ranks(judge: Policy, tokens: Tokens, most: int = 7) -> Tokens:
    """Return each token's rank among the judge's likeliest after its prefix, from 0; `most` for all others."""
    chances = zip(judge([tokens[:i] for i in range(len(tokens))]), tokens)
    return tuple(min(int((after > after[token]).sum()), most) for after, token in chances)


def two_samples(
    one: list[Tokens], other: list[Tokens], rng: np.random.Generator, shuffles: int = 400
) -> tuple[float, list[float]]:
    """Return the total variation of two samples, and those of the two thrown together and parted at random."""
    kinds = {answer: i for i, answer in enumerate(dict.fromkeys([*one, *other]))}
    both = np.array([kinds[answer] for answer in [*one, *other]])

    def parted(order: np.ndarray) -> float:
        return total_variation(*(frequencies(part, len(kinds)) for part in np.split(order, [len(one)])))

    return parted(both), [parted(rng.permutation(both)) for _ in range(shuffles)]


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
        randoms = [acceptance(drafted, policy(given.model, given.tokenizer, question, each)([()])[0]) for each in noise]
        rng = np.random.default_rng([given.seed, *question.encode()])
        count = 10 * given.size
        samples = [judged(draft, judge, count, 2, rng), answers(judge, count, 2, rng), answers(draft, count, 2, rng)]
        known = [[ranks(judge, tokens) for tokens in sample] for sample in samples]
        near, far = two_samples(known[0], known[1], rng), two_samples(known[0], known[2], rng)
        return {"accepted": acceptance(drafted, wanted), "random": randoms, "judge": near, "draft": far}

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
