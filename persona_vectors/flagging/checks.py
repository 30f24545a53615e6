"""What a flagging run refuses before it begins."""

from pathlib import Path
from typing import Any

from persona_vectors.data.errors import InputError
from persona_vectors.data.samples import Source
from persona_vectors.model.hooks import edits_are_active
from persona_vectors.model.thoughts import span_of

SCORES = ("projection", "gradient")
BASELINES = ("generate", "prompt_last", "none")


def check(job: Any) -> None:
    """Raise InputError for a `Job` that cannot be."""
    if job.model.config.is_encoder_decoder:
        raise InputError("this is an encoder-decoder model: samples are flagged with decoder-only language models")
    if edits_are_active(job.model):
        raise InputError("flag reads the plain model: call it outside of steer, ablate, cap, floor and monitor")
    if getattr(job.model.config, "distributed_config", None) is not None:
        raise InputError("flag's parts are not read by several processes: give device_map='auto' instead of tp_plan")
    if job.score not in SCORES:
        raise InputError(f"score is {job.score!r}: give one of {', '.join(SCORES)}")
    if job.score == "gradient" and job.answers is not None:
        raise InputError("a gradient has no baseline: leave answers out, or give score='projection'")
    span_of(job.tokenizer, job.positions)  # refuses what is none
    _check_words(job.baseline, job.answers, job.on_error)
    if job.generate is not None and not job.generates:
        raise InputError(
            "generate gives the answers of baseline='generate', and another one is asked for: leave it out"
        )
    if job.threshold is not None and job.percentile is not None:
        raise InputError("threshold and percentile both say what is flagged: give one of them")
    if job.percentile is not None and not 0 <= job.percentile <= 100:
        raise InputError(f"percentile is {job.percentile:g}: give a number from 0 to 100")
    if job.max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {job.max_new_tokens}: give 1 or more, or baseline='prompt_last'")
    if job.generates and job.limit is not None and job.max_new_tokens >= job.limit // 2:
        raise InputError(
            f"max_new_tokens is {job.max_new_tokens}, and the context has {job.limit} tokens: "
            f"give less than {job.limit // 2}"
        )
    if job.controls and job.controls < 20:
        raise InputError(f"controls is {job.controls}: give 20 random directions or more, or 0 for none")
    if job.controls and not isinstance(job.reference, (str, Path, type(None))) and iter(job.reference) is job.reference:
        raise InputError(
            "the reference is read twice, and these samples only once: give a list or a file, or controls=0"
        )
    if min(job.chunk, job.workers) < 1:
        raise InputError(f"chunk is {job.chunk} and workers is {job.workers}: give 1 or more")


def _check_words(baseline: str, answers: Source | None, on_error: str) -> None:
    if baseline not in BASELINES:
        raise InputError(f"baseline is {baseline!r}: give one of {', '.join(BASELINES)}, or answers= of your own")
    if isinstance(answers, str | Path) and not Path(answers).exists():
        raise InputError(f"no file of answers {str(answers)!r}: give one with an answer of the model to each prompt")
    if on_error not in ("stop", "skip"):
        raise InputError(f"on_error is {on_error!r}: give 'stop' or 'skip'")
