"""Answers from several copies of a model: Ray's actors, each on a GPU of its own."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.served import Completion
from persona_vectors.model.actors import Elsewhere, map_in_actors
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_batches
from persona_vectors.model.prompts import decode


@dataclass(frozen=True)
class WorkerGenerator:
    """Answers from `workers` Ray actors that each load `model`: a Hub id, a folder, or a function that loads it.

    Give it as `generate` to `extract`, `evaluate` or `flag`. An answer depends on its prompt and seed alone, so they
    are those of one process. An actor has `gpus_per_worker` GPUs, by default one where there is one.
    """

    model: str | Path | Callable[[], tuple[Any, Any]]
    _: KW_ONLY
    workers: int
    gpus_per_worker: float | None = None
    part: int = 64
    """How many answers an actor is asked for at a time."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.part < 1:
            raise InputError(f"workers is {self.workers} and part is {self.part}: give 1 or more")

    @property
    def name(self) -> str:
        """How it is named in files."""
        return "workers"

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> Iterator[list[Completion]]:
        """See `Generate`."""
        model = Elsewhere(self.model, gpus_per_worker=self.gpus_per_worker)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        rows = range(len(prompts))
        groups = [rows[i : i + self.part] for i in range(0, len(rows), self.part)]
        parts = [json.dumps([(i, list(map(int, prompts[i])), int(seeds[i])) for i in group]) for group in groups]
        for done in map_in_actors(model, partial(_answer, model.tokenizer, options), parts, workers=self.workers):
            yield [Completion(*answer) for answer in json.loads(done)]


def _answer(tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], model: Model, part: str) -> str:
    rows, prompts, seeds = zip(*json.loads(part))
    answers = []
    for batch in generate_batches(model, tokenizer, prompts, seed=seeds, **options):
        found = zip(batch.rows, batch.answers)
        answers += [(rows[i], decode(tokenizer, tokens), tokens, ended) for i, (tokens, ended) in found]
    return json.dumps(answers)
