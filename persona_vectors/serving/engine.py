"""The thread that runs the model: it takes jobs in between decoding steps, as many at once as there are rows."""

import threading
import time
from collections import deque
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import stop_tokens
from persona_vectors.serving.batch import Batch, Values
from persona_vectors.serving.rows import Job, Row
from persona_vectors.vectors.vector import PersonaVector


class Full(Exception):
    """Raised where no more jobs may wait."""


class Engine:
    """Answers jobs, `rows` at once; `waiting` more may wait for a place. `figures` counts what it has done."""

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        vectors: Sequence[PersonaVector],
        *,
        rows: int = 16,
        waiting: int = 64,
    ) -> None:
        if rows < 1 or waiting < 0:
            raise InputError(f"rows is {rows} and waiting {waiting}: give 1 or more, and 0 or more")
        self.model, self.tokenizer, self.size, self.waiting = model, tokenizer, rows, waiting
        self.figures = {"tokens": 0, "steps": 0, "errors": 0}
        self._batch = Batch(model, vectors)
        self._stops = stop_tokens(model, tokenizer)
        self._rows: list[Row] = []
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="persona-vectors", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """How many jobs are being answered, and how many wait."""
        return len(self._rows), len(self._queue)

    @property
    def room(self) -> int:
        """How many more jobs can be taken."""
        return self.size - len(self._rows) + self.waiting - len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs answered, all or none; raises Full where they cannot wait."""
        with self._wake:
            if self._closing or len(jobs) > self.room:
                raise Full
            self._queue.extend(jobs)
            self._wake.notify()

    def close(self) -> None:
        """Answer what was submitted, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._rows:
                    if self._closing:
                        return
                    self._wake.wait()
            self._admit()
            if self._rows:
                self._step()

    def _admit(self) -> None:
        """Read the prompts of jobs that find a place, the oldest first; those that nobody waits for lose theirs."""
        with self._wake:
            over = [job for job in self._queue if job.cancelled or time.monotonic() > job.deadline]
            self._queue = deque(job for job in self._queue if job not in over)
        for job in over:
            self._given_up(Row(job, self.tokenizer, self._stops))
        while self._queue and len(self._rows) < self.size:
            with self._wake:
                job = self._queue.popleft()
            row = Row(job, self.tokenizer, self._stops)
            try:
                passed = self._batch.join(row)
            except Exception as error:  # this row's fault alone: the others are as they were
                self._fail([row], error)
                continue
            self._rows.append(row)
            self._advance([row], *passed)
        self._leave()

    def _step(self) -> None:
        try:
            passed = self._batch.step([row.tokens[-1] for row in self._rows])
        except Exception as error:
            self._batch.fail(error)
            rows, self._rows = self._rows, []
            self._fail(rows, error)
            return
        self.figures["steps"] += 1
        self._advance(self._rows, *passed)
        self._leave()

    def _advance(self, rows: Sequence[Row], logits: torch.Tensor, values: Values) -> None:
        """Have rows take in what a pass says of their next tokens."""
        greedy, found = logits.argmax(dim=1).tolist(), {layer: each.tolist() for layer, each in values.items()}
        for index, row in enumerate(rows):
            if not self._given_up(row):
                row.read(found, index)
            if not row.ended:
                row.choose(logits[index], greedy[index])
                self.figures["tokens"] += 1

    def _given_up(self, row: Row) -> bool:
        """End a row that nobody waits for, or that has run out of time."""
        if row.job.cancelled:
            row.ended = True
        elif time.monotonic() > row.job.deadline:
            row.end("error", error="the request took longer than the server's time limit")
        return row.ended

    def _leave(self) -> None:
        kept = [index for index, row in enumerate(self._rows) if not row.ended]
        if len(kept) < len(self._rows):
            self._batch.keep(kept)
            self._rows = [self._rows[index] for index in kept]

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        """End rows whose pass failed: what the user can mend is said, and of anything else its kind alone."""
        self.figures["errors"] += 1
        said = str(error) if isinstance(error, InputError) else f"the model failed ({type(error).__name__})"
        for row in rows:
            row.end("error", error=said)
