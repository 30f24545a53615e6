"""Which answers make a vector: what is judged of each, which pass, and which belong together (paper, section 2.2)."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.judge import Answer, Judge
from persona_vectors.evaluation.judges import score_both
from persona_vectors.extraction.rollouts import Rollout
from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import decode
from persona_vectors.model.thoughts import outside_reasoning, span_of


def parted(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout], positions: str) -> list[Rollout]:
    """Return the rollouts marked so that no reasoning is judged, and only the answer or the reasoning averaged."""
    span = span_of(tokenizer, positions)
    if span is None:
        return list(rollouts)
    return [
        rollout.model_copy(
            update={
                "outside_reasoning": tuple(outside_reasoning(tokenizer, rollout.prompt_ids, rollout.answer_ids)),
                "reasoning": span.name == "reasoning",
            }
        )
        for rollout in rollouts
    ]


def judge_rollouts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    judge: Judge | None,
    rollouts: Sequence[Rollout],
) -> list[Rollout]:
    """Return the rollouts with their trait scores and coherence; unchanged for `judge=None`."""
    if judge is None:
        return list(rollouts)
    answers = [Answer(rollout.question, _text(tokenizer, rollout), rollout.pair) for rollout in rollouts]
    scores = score_both(model, tokenizer, judge, answers, trait.eval_prompt)
    return [
        rollout.model_copy(update={"trait_score": value, "coherence": coherence})
        for rollout, (value, coherence) in zip(rollouts, scores)
    ]


def _text(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    if rollout.outside_reasoning is None:
        return rollout.answer
    return decode(tokenizer, [rollout.answer_ids[i] for i in rollout.judged])


def passes(rollout: Rollout, limit: float | None) -> bool:
    """Say whether an answer passes its side's filter; with no limit it needs only to be not empty."""
    if _empty(rollout):
        return False
    if limit is None:
        return True
    if rollout.trait_score is None or (rollout.trait_score >= limit) != (rollout.side == "pos"):
        return False
    return rollout.coherence is not None and rollout.coherence >= limit


def _empty(rollout: Rollout) -> bool:
    return not rollout.kept or not rollout.judged or not rollout.answer.strip()


def pairs(rollouts: Sequence[Rollout], limit: float | None) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Return the kept pairs, as indices, and how many answers and pairs there were and are left."""
    sides: dict[str, dict[Any, int]] = {"pos": {}, "neg": {}}
    for index, rollout in enumerate(rollouts):
        if passes(rollout, limit):
            sides[rollout.side][rollout.key] = index
    kept = [(index, sides["neg"][key]) for key, index in sides["pos"].items() if key in sides["neg"]]
    counts = {f"{side}_answers": sum(rollout.side == side for rollout in rollouts) for side in sides}
    counts |= {f"{side}_passed": len(passed) for side, passed in sides.items()}
    counts |= {"empty": sum(_empty(rollout) for rollout in rollouts)}
    counts |= {"cut_at_limit": sum(not rollout.finished for rollout in rollouts)}
    counts |= {"retokenised": sum(rollout.retokenised for rollout in rollouts)}
    return kept, counts | {"pairs_kept": len(kept)}
