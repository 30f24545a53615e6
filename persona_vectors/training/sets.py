"""Training sets with known labels: a model's own answers under a trait's instructions, the instructions dropped."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path, writing
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.judge import judge_name
from persona_vectors.evaluation.served import Generate
from persona_vectors.extraction.rollouts import Rollout, RolloutFile, draw_rollouts, plan
from persona_vectors.model.blocks import Model
from persona_vectors.model.identity import identity
from persona_vectors.model.prompts import chat_prompt, encode

SIDES = {"positive": "pos", "negative": "neg", "plain": "none"}
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def make_training_sets(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    *,
    out: str | Path,
    questions: Sequence[str] | None = None,
    samples: int = 2,
    fractions: Sequence[float] = FRACTIONS,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    generate: Generate | None = None,
) -> dict[str, int]:
    """Write labelled JSONL sets to the folder `out`; returns each file's number of samples.

    positive.jsonl and negative.jsonl hold answers under each pair of the trait's instructions, plain.jsonl as many
    without a system prompt; mixed-050.jsonl has half of its samples from the positive set and the others from the
    negative one, at the same questions. No sample holds a system prompt. Each line has `messages`, and `label` (1 for
    the trait, 0 for its opposite, null for plain answers), `trait`, `question`, `side`, `pair` and `sample`.

    `questions` are the trait's evaluation questions unless given: the vector should not have seen them. Empty answers
    are left out, with the answer that they are paired with. A killed run goes on from `out`/rollouts.jsonl. With
    `generate`, say an `OpenAIGenerator`, the answers come from there.

    Raises InputError where there is no question, or a fraction is not between 0 and 1.
    """
    out = Path(out)
    asked = list(trait.questions.eval if questions is None else questions)
    if not asked:
        raise InputError(f"trait {trait.name!r} has no evaluation questions: give some with questions=")
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise InputError(f"fractions are {list(fractions)}: give numbers from 0 to 1")
    drawing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings = {
        "trait": trait.model_dump(mode="json"),
        **identity(model, tokenizer),
        "questions": asked,
        "samples": samples,
        **drawing,
        "generate": generate and judge_name(generate),
    }
    drawing |= {"batch_tokens": batch_tokens, "desc": f"{trait.name}: training answers", "generate": generate}
    with writing(out / "rollouts.jsonl"):
        file = RolloutFile(out / "rollouts.jsonl", settings)
        for rollouts, _ in draw_rollouts(model, tokenizer, _tasks(tokenizer, trait, asked, samples), file, **drawing):
            file.append(rollouts)
    return _write_sets(file.rollouts, trait.name, out, fractions, seed)


def _tasks(
    tokenizer: PreTrainedTokenizerBase, trait: Trait, asked: Sequence[str], samples: int
) -> list[dict[str, Any]]:
    """Return what is to be generated: answers under each side of the trait's pairs, and as many without."""
    held_out = trait.model_copy(update={"questions": type(trait.questions)(extract=tuple(asked))})
    tasks = plan(tokenizer, held_out, first=None, samples=samples)
    for question in asked:
        prompt = chat_prompt(tokenizer, question)
        shared = {"side": "none", "pair": -1, "question": question, "prompt": prompt}
        ids = tuple(encode(tokenizer, prompt))
        count = len(trait.instruction) * samples
        tasks += [{**shared, "prompt_ids": ids, "sample": sample} for sample in range(count)]
    return tasks


def _write_sets(
    rollouts: Sequence[Rollout], trait: str, out: Path, fractions: Sequence[float], seed: int
) -> dict[str, int]:
    sides: dict[str, dict[Any, Rollout]] = {side: {} for side in SIDES.values()}
    for rollout in rollouts:
        if rollout.answer.strip():
            sides[rollout.side][rollout.key] = rollout
    both = sorted(set(sides["pos"]) & set(sides["neg"]))
    sets = {name: [sides[side][key] for key in both] for name, side in SIDES.items() if side != "none"}
    sets["plain"] = list(sides["none"].values())
    random.Random(seed).shuffle(both)
    for fraction in fractions:
        count = round(fraction * len(both))
        mixed = [sides["pos" if i < count else "neg"][key] for i, key in enumerate(both)]
        random.Random(seed + 1).shuffle(mixed)
        sets[f"mixed-{round(100 * fraction):03d}"] = mixed
    for name, members in sets.items():
        with atomic_path(out / f"{name}.jsonl") as temporary:
            lines = (json.dumps(_line(rollout, trait), ensure_ascii=False) + "\n" for rollout in members)
            temporary.write_text("".join(lines), encoding="utf-8")
    return {name: len(members) for name, members in sets.items()}


def _line(rollout: Rollout, trait: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": rollout.question}, {"role": "assistant", "content": rollout.answer}]
    return {
        "messages": messages,
        "label": {"pos": 1, "neg": 0}.get(rollout.side),
        "trait": trait,
        "question": rollout.question,
        "side": rollout.side,
        "pair": rollout.pair,
        "sample": rollout.sample,
    }
