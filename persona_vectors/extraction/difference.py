"""Extraction: rollouts, judged and filtered, become a persona vector (paper, section 2.2)."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.judge import Judge, judge_name
from persona_vectors.extraction.evidence import mean_difference, separation, split_half_cosine
from persona_vectors.extraction.filtering import judge_rollouts, pairs, passes, without_reasoning
from persona_vectors.extraction.rollouts import Rollout, RolloutFile, draw_rollouts, plan
from persona_vectors.model.blocks import Model, model_name
from persona_vectors.model.generation import generation_budget, stop_tokens
from persona_vectors.model.identity import hash_of, identity
from persona_vectors.model.pooling import POOLINGS, pool, pool_while_generating
from persona_vectors.model.wrappers import keeps_cache, unwrap
from persona_vectors.vectors.vector import PersonaVector

MIN_PAIRS = 10


@dataclass
class _Read:
    """One answer: the mean activation at every layer for each pooling, and the mean residual norm."""

    means: Float[Tensor, "pooling layer hidden"]
    norm: Float[Tensor, " layer"]


def extract(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    *,
    judge: Judge | None,
    samples: int = 10,
    first: int | None = None,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    seed: int = 0,
    pooling: str = "response_mean",
    threshold: float = 50.0,
    skip_reasoning: bool = False,
    batch_tokens: int | None = None,
    rollouts: str | Path | None = None,
    min_pairs: int = MIN_PAIRS,
) -> PersonaVector:
    """Generate answers under the trait's positive and negative instructions, and return their difference of means.

    The activations are averaged while the answers are generated, so there is no second pass; only answers that are
    read back from the file `rollouts` (a run that was killed goes on there) are passed through the model again.

    An answer pair is kept where the positive answer's trait score is at least `threshold`, the negative one's below
    it, and both are coherent (`threshold` again). Coherence is judged by the judge, or by a perplexity gate where it
    does not read rubrics; `judge=None` keeps every pair of non-empty answers. The defaults are the paper's.

    `skip_reasoning` neither judges nor averages what stands inside <think>...</think>; the answers are then read a
    second time, when they are finished.

    Raises InputError where fewer than `min_pairs` pairs are kept, saying what was dropped.
    """
    model = _checked(model, [pooling])
    tasks = plan(tokenizer, trait, first=first, samples=samples)
    settings = {
        "trait": trait.name,
        "trait_hash": hash_of(trait.model_dump()),
        **identity(model, tokenizer),
        "samples": samples,
        "questions": len(tasks) // (2 * len(trait.instruction) * samples),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_tokens": generation_budget(model, batch_tokens),
        "judge": judge_name(judge),
        "skip_reasoning": skip_reasoning or None,  # None: as in files from before there was a choice
    }
    drawing: dict[str, Any] = {name: settings[name] for name in ("max_new_tokens", "temperature", "seed")}
    drawing |= {"batch_tokens": batch_tokens, "desc": f"{trait.name}: answers"}
    if keeps_cache(model) and not skip_reasoning:
        stops = stop_tokens(model, tokenizer)
        drawing["during"] = lambda _: pool_while_generating(model, stops=stops, poolings=[pooling])
    limit = None if judge is None else threshold
    with writing(rollouts):
        file = RolloutFile(rollouts, settings)
        reads = _draw(model, tokenizer, trait, judge, tasks, file, limit, drawing)
    info = {key: value for key, value in settings.items() if key not in ("trait", "model", "questions")}
    options: dict[str, Any] = {"poolings": [pooling], "limit": limit, "min_pairs": min_pairs, "info": info}
    return _difference(model, trait, file.rollouts, reads, **options)[pooling]


def _draw(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    judge: Judge | None,
    tasks: Sequence[dict[str, Any]],
    file: RolloutFile,
    limit: float | None,
    drawing: dict[str, Any],
) -> dict[int, _Read]:
    """Add the rollouts that the file lacks, judged; return what was read of those that pass, by their index in it."""
    reads: dict[int, _Read] = {}
    for answers, pooled in draw_rollouts(model, tokenizer, tasks, file, **drawing):
        means, before = pooled() if pooled else None, len(file.rollouts)
        if file.settings.get("skip_reasoning"):
            answers = without_reasoning(tokenizer, answers)
        judged = judge_rollouts(model, tokenizer, trait, judge, answers)
        file.append(judged)
        for index, answer in enumerate(judged):
            if means and passes(answer, limit):
                reads[before + index] = _Read(means.means[index].clone(), means.norms[index].clone())
    return reads


def extract_from(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    rollouts: Sequence[Rollout],
    *,
    judge: Judge | None,
    pooling: str = "response_mean",
    threshold: float = 50.0,
    skip_reasoning: bool = False,
    batch_tokens: int | None = None,
    min_pairs: int = MIN_PAIRS,
    unfiltered: bool = False,
) -> PersonaVector:
    """Return the vector of ready-made rollouts, both sides in one list, in one pass over their text.

    Scores that the rollouts carry are used; a judge scores those that have none. `unfiltered` keeps every pair of
    non-empty answers. See `extract` for the filter and `skip_reasoning`, `extract_poolings_from` for all poolings.

    Raises InputError where there are no scores, no judge, and `unfiltered` is not asked for.
    """
    options: dict[str, Any] = {"threshold": threshold, "skip_reasoning": skip_reasoning, "batch_tokens": batch_tokens}
    options |= {"judge": judge, "min_pairs": min_pairs, "unfiltered": unfiltered}
    return extract_poolings_from(model, tokenizer, trait, rollouts, poolings=[pooling], **options)[pooling]


def extract_poolings_from(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    rollouts: Sequence[Rollout],
    *,
    judge: Judge | None,
    poolings: Sequence[str] = POOLINGS,
    threshold: float = 50.0,
    skip_reasoning: bool = False,
    batch_tokens: int | None = None,
    min_pairs: int = MIN_PAIRS,
    unfiltered: bool = False,
) -> dict[str, PersonaVector]:
    """Return a vector for each pooling, all from the same answers and from one pass over them; see `extract_from`."""
    model = _checked(model, poolings)
    if skip_reasoning:
        rollouts = without_reasoning(tokenizer, rollouts)
    scored = not unfiltered and any(rollout.trait_score is not None for rollout in rollouts)
    if not scored and not unfiltered:
        if judge is None:
            raise InputError(f"no answer has a score for {trait.name!r}: give a judge, or unfiltered=True to keep all")
        rollouts = judge_rollouts(model, tokenizer, trait, judge, rollouts)
    info = {
        **identity(model, tokenizer),
        "judge": "scores in the rollout file" if scored else judge_name(None if unfiltered else judge),
        "batch_tokens": batch_tokens,
        "skip_reasoning": skip_reasoning or None,  # None: as in files from before there was a choice
    }
    limit = None if unfiltered else threshold
    options: dict[str, Any] = {"poolings": poolings, "limit": limit, "min_pairs": min_pairs, "info": info}
    return _difference(model, trait, list(rollouts), {}, **options)


def _checked(model: Model, poolings: Sequence[str]) -> Model:
    model = unwrap(model)
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown or not poolings:
        raise InputError(f"pooling is {(unknown or ['none'])[0]!r}: give one of {', '.join(POOLINGS)}")
    if model.config.is_encoder_decoder:
        raise InputError("this is an encoder-decoder model: vectors are extracted from decoder-only language models")
    return model


def _difference(
    model: Model,
    trait: Trait,
    rollouts: list[Rollout],
    reads: dict[int, _Read],
    *,
    poolings: Sequence[str],
    limit: float | None,
    min_pairs: int,
    info: dict[str, Any],
) -> dict[str, PersonaVector]:
    kept, counts = pairs(rollouts, limit)
    if len(kept) < min_pairs:
        raise InputError(
            f"only {len(kept)} answer pairs of {counts['pos_answers']} positive and {counts['neg_answers']} negative "
            f"answers survived ({counts['pos_passed']} positive and {counts['neg_passed']} negative ones passed the "
            f"filter at {limit}, {counts['empty']} are empty), and a vector needs {min_pairs}: draw more samples, "
            "change the threshold, or take another judge"
        )
    todo = sorted({index for pair in kept for index in pair} - set(reads))
    if todo:
        rows = [(rollouts[index].prompt_ids, rollouts[index].answer_ids) for index in todo]
        counted = [rollouts[index].kept for index in todo]
        pooled = pool(model, rows, poolings=poolings, kept=counted, batch_tokens=info["batch_tokens"])
        reads = reads | {index: _Read(pooled.means[i], pooled.norms[i]) for i, index in enumerate(todo)}
    questions = [rollouts[i].question for i, _ in kept]
    numbers = torch.tensor([sorted(set(questions)).index(question) for question in questions])
    shared: dict[str, Any] = {
        "trait": trait.name,
        "model": model_name(model),
        "residual_norms": torch.stack([reads[i].norm for pair in kept for i in pair]).double().mean(dim=0).float(),
        "info": {
            **info,
            **counts,
            "threshold": limit,
            "questions": len(set(questions)),
            "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
            "date": datetime.date.today().isoformat(),
            "licence": "MIT for the format and the tools; the directions derive from the model, whose licence applies",
        },
    }
    vectors = {}
    for place, pooling in enumerate(poolings):
        pos, neg = (torch.stack([reads[pair[side]].means[place] for pair in kept]) for side in (0, 1))
        vectors[pooling] = PersonaVector(
            directions=mean_difference(pos, neg),
            split_half_cosine=split_half_cosine(pos, neg, numbers),
            separation=separation(pos, neg, numbers),
            pooling=pooling,
            **shared,
        )
    return vectors
