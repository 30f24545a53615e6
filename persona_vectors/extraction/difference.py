"""Extraction: rollouts, judged and filtered, become a persona vector (paper, section 2.2)."""

import datetime
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.traits import Trait, as_trait
from persona_vectors.evaluation.beside import score_batches
from persona_vectors.evaluation.judge import Judge, is_remote, judge_name
from persona_vectors.evaluation.served import Generate
from persona_vectors.extraction.evidence import evidence
from persona_vectors.extraction.filtering import judge_rollouts, pairs, parted
from persona_vectors.extraction.reads import Reads, no_reads
from persona_vectors.extraction.rollouts import Rollout, RolloutFile, draw_rollouts, plan
from persona_vectors.model.blocks import Model, model_name
from persona_vectors.model.generation import stop_tokens
from persona_vectors.model.identity import hash_of, identity
from persona_vectors.model.pooling import POOLINGS, pool_while_generating
from persona_vectors.model.thoughts import span_of
from persona_vectors.model.wrappers import keeps_cache, unwrap
from persona_vectors.vectors.vector import PersonaVector

MIN_PAIRS = 10


def extract(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait | str | Path,
    *,
    judge: Judge | None,
    samples: int = 10,
    first: int | None = None,
    max_new_tokens: int = 1000,
    temperature: float = 1.0,
    seed: int = 0,
    pooling: str = "response_mean",
    threshold: float = 50.0,
    positions: str = "all",
    batch_tokens: int | None = None,
    rollouts: str | Path | None = None,
    min_pairs: int = MIN_PAIRS,
    generate: Generate | None = None,
) -> PersonaVector:
    """Generate answers under the trait's positive and negative instructions, and return their difference of means.

    The activations are averaged while the answers are generated, so there is no second pass; only answers that are
    read back from the file `rollouts` (a run that was killed goes on there) are passed through the model again.

    An answer pair is kept where the positive answer's trait score is at least `threshold`, the negative one's below
    it, and both are coherent (`threshold` again). Coherence is judged by the judge, or by a perplexity gate where it
    does not read rubrics; `judge=None` keeps every pair of non-empty answers. The defaults are the paper's.

    `positions` is what of a thinking model's answers is averaged: "all", or "answer" or "reasoning" (see `Span`), which
    take one more reading and have no reasoning judged. With `generate`, say an `OpenAIGenerator`, answers come from it.

    Raises InputError where fewer than `min_pairs` pairs are kept, saying what was dropped.
    """
    model, trait, span = _checked(model, [pooling]), as_trait(trait), span_of(tokenizer, positions)
    tasks = plan(tokenizer, trait, first=first, samples=samples)
    drawing: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings = {
        "trait": trait.name,
        "trait_hash": hash_of(trait.model_dump()),
        **identity(model, tokenizer),
        "samples": samples,
        "questions": len(tasks) // (2 * len(trait.instruction) * samples),
        **drawing,
        "judge": judge_name(judge),
        "generate": generate and judge_name(generate),
        "positions": span and span.name,  # None: as in files from before there was a choice
    }
    drawing |= {"batch_tokens": batch_tokens, "desc": f"{trait.name}: answers", "generate": generate}
    if keeps_cache(model) and span is None:
        reading: dict[str, Any] = {"stops": stop_tokens(model, tokenizer), "poolings": [pooling]}
        drawing["during"] = lambda _: pool_while_generating(model, **reading)
    limit = None if judge is None else threshold
    info = {key: value for key, value in settings.items() if key not in ("trait", "model", "questions")}
    info["batch_tokens"] = batch_tokens
    options: dict[str, Any] = {"poolings": [pooling], "limit": limit, "min_pairs": min_pairs, "info": info}
    with writing(rollouts), no_reads() as reads:
        file = RolloutFile(rollouts, settings)
        _draw(model, tokenizer, trait, judge, tasks, file, reads, drawing)
        return _difference(model, trait, file.rollouts, reads, **options)[pooling]


def _draw(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    judge: Judge | None,
    tasks: Sequence[dict[str, Any]],
    file: RolloutFile,
    reads: Reads,
    drawing: dict[str, Any],
) -> None:
    """Add the rollouts that the file lacks to it, judged, and to `reads` what was read of them."""

    def drawn() -> Iterator[list[Rollout]]:
        for answers, pooled in draw_rollouts(model, tokenizer, tasks, file, **drawing):
            if pooled:
                reads.add(answers, pooled())
            del pooled  # with it what it holds, before the next answers are read
            yield parted(tokenizer, answers, file.settings.get("positions") or "all")

    def judged(answers: list[Rollout]) -> list[Rollout]:
        return judge_rollouts(model, tokenizer, trait, judge, answers)

    score_batches(drawn(), judged, lambda _, answers: file.append(answers), remote=is_remote(judge))


def extract_from(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    rollouts: Sequence[Rollout],
    *,
    judge: Judge | None,
    pooling: str = "response_mean",
    threshold: float = 50.0,
    positions: str = "all",
    batch_tokens: int | None = None,
    min_pairs: int = MIN_PAIRS,
    unfiltered: bool = False,
) -> PersonaVector:
    """Return the vector of ready-made rollouts, both sides in one list, in one pass over their text.

    Scores that the rollouts carry are used; a judge scores those that have none. `unfiltered` keeps every pair of
    non-empty answers. See `extract` for the filter and `positions`, `extract_poolings_from` for all poolings.

    Raises InputError where there are no scores, no judge, and `unfiltered` is not asked for.
    """
    options: dict[str, Any] = {"threshold": threshold, "positions": positions, "batch_tokens": batch_tokens}
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
    positions: str = "all",
    batch_tokens: int | None = None,
    min_pairs: int = MIN_PAIRS,
    unfiltered: bool = False,
) -> dict[str, PersonaVector]:
    """Return a vector for each pooling, all from the same answers and from one pass over them; see `extract_from`."""
    model = _checked(model, poolings)
    rollouts = parted(tokenizer, rollouts, positions)
    scored = not unfiltered and any(rollout.trait_score is not None for rollout in rollouts)
    if not scored and not unfiltered:
        if judge is None:
            raise InputError(f"no answer has a score for {trait.name!r}: give a judge, or unfiltered=True to keep all")
        rollouts = judge_rollouts(model, tokenizer, trait, judge, rollouts)
    info = {
        **identity(model, tokenizer),
        "judge": "scores in the rollout file" if scored else judge_name(None if unfiltered else judge),
        "batch_tokens": batch_tokens,
        "positions": None if positions == "all" else positions,  # None: as in files from before there was a choice
    }
    limit = None if unfiltered else threshold
    options: dict[str, Any] = {"poolings": poolings, "limit": limit, "min_pairs": min_pairs, "info": info}
    with no_reads() as reads:
        return _difference(model, trait, list(rollouts), reads, **options)


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
    reads: Reads,
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
    pos, neg = ([rollouts[pair[side]] for pair in kept] for side in (0, 1))
    reads.add_missing(model, [*pos, *neg], poolings=poolings, batch_tokens=info["batch_tokens"])
    questions = sorted({rollout.question for rollout in pos})
    shared: dict[str, Any] = {
        "trait": trait.name,
        "model": model_name(model),
        "residual_norms": torch.stack([reads.norm(rollout) for rollout in (*pos, *neg)]).double().mean(dim=0).float(),
        "info": {
            **info,
            **counts,
            "threshold": limit,
            "questions": len(questions),
            "architecture": model.config.model_type,
            "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
            "date": datetime.date.today().isoformat(),
            "licence": "MIT for the format and the tools; the directions derive from the model, whose licence applies",
        },
    }
    numbers = torch.tensor([questions.index(rollout.question) for rollout in pos])

    def vector(place: int, pooling: str) -> PersonaVector:
        means = partial(reads.mean, pooling=place)
        measured: dict[str, Any] = evidence(lambda: zip(map(means, pos), map(means, neg)), numbers)
        return PersonaVector(pooling=pooling, **measured, **shared)

    return {pooling: vector(place, pooling) for place, pooling in enumerate(poolings)}
