"""Principled personas: whether an expert's persona helps, and whether what should not matter does not.

Luz de Araujo et al. 2025 (arXiv 2508.19764). The utility of a persona, given as a system prompt, on a domain's
questions is how much likelier the right answer is than the mean of three wrong ones, in nats a token. Expertise
advantage is the utility of "an expert in DOMAIN" less that of no persona. Robustness is the least utility over
experts with an attribute that does not matter (a name, a colour that they like) less that of the expert alone: the
worst case. Fidelity is Kendall's tau of the utilities with six levels of expertise, from "someone without schooling
in DOMAIN" to "a professor in DOMAIN".

The paper: experts help or do no harm; irrelevant attributes cost up to 30 points of accuracy; education and domain
help in some tasks and not in others.

A small model can show whether these differences are larger than those of prompts that mean the same; it cannot show
an expertise, as its knowledge ends before any level of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from persona_vectors.data.intervals import Interval, bootstrap
from persona_vectors.data.texts import assistant_prompts
from persona_vectors.data.traits import InstructionPair
from persona_vectors.evaluation.likelihood import State, Statements, likelihood_contrasts
from persona_vectors.evaluation.psychometrics import level_agreement, robustness
from persona_vectors.studies.frame import Given, Line, over, shipped, upper

VECTORS = 0
FACTS: dict[str, list[list[str]]] = shipped("facts")
"""Questions by domain, each with the right answer and three wrong ones."""
ATTRIBUTES = ("Your name is Robin.", "Your name is Alex.", "You like the colour green.", "You own a bicycle.")
LEVELS = ("someone without schooling", "a child", "a school pupil", "a student", "a teacher", "a professor")


def personas(domain: str) -> dict[str, Sequence[str | None]]:
    """Return the system prompts that are held against each other on a domain's questions."""
    expert = f"You are an expert in {domain}."
    return {
        "none": [None],
        "expert": [expert],
        "attributes": [f"{expert} {attribute}" for attribute in ATTRIBUTES],
        "levels": [f"You are {level} in {domain}." for level in LEVELS],
        "others": [f"You are an expert in {other}." for other in FACTS if other != domain],
        "same": [text for text in assistant_prompts() if text][:12],
    }


def utilities(given: Given, questions: Sequence[Sequence[str]], systems: Sequence[str | None]) -> Any:
    """Return the utility of each system prompt on each question, [system][question]."""
    pairs = tuple(InstructionPair(pos=right, neg=each) for _, right, *wrong in questions for each in wrong)
    orders = len(pairs) // len(questions)
    asked = Statements(question=tuple(q for q, *_ in questions for _ in range(orders)), pairs=pairs, orders=orders)
    states = [State(system=system) for system in systems]
    return likelihood_contrasts(given.model, given.tokenizer, asked, states).tolist()


def lines(given: Given) -> list[Line]:
    """Return advantage, robustness and fidelity over all domains; `size` questions of each, at most four."""
    found: dict[str, np.ndarray] = {}
    for domain, facts in FACTS.items():
        groups = personas(domain)
        systems = [system for group in groups.values() for system in group]
        read = given.once(domain, utilities, given, facts[: given.size], systems)
        parts = np.split(np.array(read), np.cumsum([len(group) for group in groups.values()])[:-1])
        for name, part in zip(groups, parts):
            found[name] = np.concatenate([found[name], part], axis=1) if name in found else part
    (none,), (expert,), same = found["none"], found["expert"], found["same"]
    everyone = range(len(none))

    def interval(statistic: object) -> Interval:
        return bootstrap(statistic, everyone)  # type: ignore[arg-type]

    means, order = same.mean(axis=1), range(len(LEVELS))
    apart = upper(np.abs(np.subtract.outer(means, means)), "two prompts that mean the same")
    worst = np.quantile([robustness(same[i], np.delete(same, i, axis=0)[:4]) for i in range(len(same))], 0.025)
    rng = [np.random.default_rng(i) for i in range(500)]
    ranked = upper([kendalltau(each.permutation(len(LEVELS)), order)[0] for each in rng], "shuffled levels")
    robust = interval(lambda i: robustness(expert[i], found["attributes"][:, i]))
    faithful = interval(lambda i: level_agreement(found["levels"][:, i]))
    elsewhere = over(expert - found["others"].mean(axis=0))
    most, alike = float((means - none.mean()).max()), "prompts that mean the same"
    lowest = f"2.5th percentile of the worst of four {alike}"
    return [
        Line("utility without a persona", over(none)),
        Line("expertise advantage", over(expert - none), most, f"largest of 12 {alike}"),
        Line("advantage over experts in other domains", elsewhere, *apart),
        Line("robustness, the worst of four attributes", robust, float(worst), lowest),
        Line("fidelity, tau with the level of expertise", faithful, *ranked),
    ]
