"""What a flagging run's numbers depend on: kept in its file, and compared when it goes on."""

import hashlib
import json
from typing import Any

from persona_vectors.evaluation.judge import judge_name
from persona_vectors.flagging.plan import source_name
from persona_vectors.model.identity import fingerprint, identity
from persona_vectors.model.prompts import batch_tokens_for


def settings_of(job: Any) -> dict[str, Any]:
    """Return what the numbers of a `Job` depend on."""
    return {
        **identity(job.model, job.tokenizer),
        "weights": job.ask(fingerprint),
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "vectors": {vector.trait: hash_of_json(vector.directions[job.layers].tolist()) for vector in job.vectors},
        "layers": job.layers,
        "controls": job.controls,
        "controls_reference": job.controls_reference if job.controls else None,
        "score": None if job.score == "projection" else job.score,
        "baseline": job.baseline if job.answers is None else source_name(job.answers),
        "max_new_tokens": job.max_new_tokens if job.generates else None,
        "generate": job.generate and judge_name(job.generate),
        "positions": None if job.positions == "all" else job.positions,
        "data": source_name(job.data),
        "columns": None if job.columns is None else list(job.columns),
        "split": job.split,
        "turns": job.turns,
        "on_error": job.on_error,
        "labels": job.labels,
        "max_length": job.limit,
        "batch_tokens": job.batch_tokens or job.ask(batch_tokens_for),
        "chunk": job.chunk,
    }


def judged_by(job: Any) -> dict[str, Any]:
    """Return what its percentiles and flags depend on besides."""
    default = 95.0 if job.reference is not None and job.threshold is None else None
    return {
        "reference": None if job.reference is None else source_name(job.reference),
        "threshold": job.threshold,
        "percentile": default if job.percentile is None else job.percentile,
    }


def hash_of_json(value: Any) -> str:
    """Return 16 hexadecimal digits that tell one value from another."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
