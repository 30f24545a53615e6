"""What was read of each answer, on the disk where it is much: of 2,000 answers of a 70B model it is 5 GB."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.extraction.rollouts import Rollout
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.pooling import Pooled, pool

PART = 64 * 2**20
"""How many bytes of mean activations are held in memory at a time."""


class Reads:
    """The mean activations of answers, and their residual norms, in a file."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self._places: dict[Any, int] = {}
        self._count = 0
        self._shape: tuple[int, ...] = ()

    def add(self, answers: Sequence[Rollout], pooled: Pooled) -> None:
        """Take in what was read of some answers.

        Raises InputError where the file cannot be written.
        """
        self._shape = tuple(pooled.means.shape[1:])
        self._places |= {_key(answer): self._count + i for i, answer in enumerate(answers)}
        self._count += len(answers)
        try:
            self.file.seek(0, 2)
            for means, norms in zip(pooled.means, pooled.norms):
                self.file.write(means.contiguous().numpy().data)
                self.file.write(norms.contiguous().numpy().data)
        except OSError as error:
            raise InputError(
                f"the mean activations of the answers do not fit into {tempfile.gettempdir()} ({error}): set TMPDIR to "
                f"a folder with room for {pooled.means[0].nbytes / 2**20:.1f} MB an answer"
            ) from None

    def add_missing(
        self, model: Model, answers: Sequence[Rollout], *, poolings: Sequence[str], batch_tokens: int | None
    ) -> None:
        """Read those answers that have not been read, like prompts together, some at a time."""
        todo = [answer for answer in answers if _key(answer) not in self._places]
        todo.sort(key=lambda answer: (-len(answer.prompt_ids), answer.prompt_ids))
        step = max(1, PART // (4 * len(poolings) * math.prod(model_shape(model))))
        for part in (todo[first : first + step] for first in range(0, len(todo), step)):
            rows, kept = [(answer.prompt_ids, answer.answer_ids) for answer in part], [answer.kept for answer in part]
            self.add(part, pool(model, rows, poolings=poolings, kept=kept, batch_tokens=batch_tokens))

    def mean(self, answer: Rollout, pooling: int) -> Float[Tensor, "layer hidden"]:
        """Return the mean activations of an answer, by the place of the pooling among those that were read."""
        _, layers, hidden = self._shape
        return self._at(answer, pooling * layers * hidden, layers * hidden).view(layers, hidden)

    def norm(self, answer: Rollout) -> Float[Tensor, " layer"]:
        """Return the mean residual norms of an answer."""
        return self._at(answer, math.prod(self._shape), self._shape[1])

    def _at(self, answer: Rollout, begin: int, length: int) -> Float[Tensor, " number"]:
        size = math.prod(self._shape) + self._shape[1]
        self.file.seek(4 * (self._places[_key(answer)] * size + begin))
        return torch.frombuffer(bytearray(self.file.read(4 * length)), dtype=torch.float32)


@contextmanager
def no_reads() -> Iterator[Reads]:
    """Yield empty `Reads`, whose file is in memory up to `PART` bytes and gone at the end."""
    with tempfile.SpooledTemporaryFile(max_size=PART) as file:
        yield Reads(file)


def _key(answer: Rollout) -> tuple[Any, ...]:
    """Return what an answer's activations depend on."""
    return answer.prompt_ids, answer.answer_ids, answer.outside_reasoning, answer.reasoning
