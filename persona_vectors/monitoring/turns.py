"""The answers of finished conversations, and which of them one reading holds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.passes import Row
from persona_vectors.model.prompts import encode_answer, finished_turn
from persona_vectors.model.thoughts import Span, kept_tokens

Conversation = Sequence[dict[str, Any]] | tuple[str, str]
"""Chat messages, each with a role and a content; or a question and its answer."""


@dataclass
class Turn:
    """One answer: where it is from, its tokens, and which of them are to be averaged."""

    conversation: int
    turn: int
    row: Row
    kept: list[int]

    def counts(self, where: Int[Tensor, " token"], pooling: str) -> Bool[Tensor, " token"]:
        """Say which of the row's tokens, given by their places, a pooling averages."""
        place = where - len(self.row[0])
        if pooling == "response_mean":
            return torch.isin(place, torch.tensor(self.kept, dtype=torch.long))
        return place == -1 if pooling == "prompt_last" else place < 0


def shared_rows(turns: Sequence[Turn]) -> tuple[list[Row], list[int]]:
    """Return the rows to read, and for each turn the row that begins with all of its tokens."""
    rows: list[Row] = []
    place = [0] * len(turns)
    for index in reversed(range(len(turns))):
        turn = turns[index]
        own = [*turn.row[0], *turn.row[1]]
        last = rows[-1] if rows and turn.conversation == turns[index + 1].conversation else ((), ())
        if [*last[0], *last[1]][: len(own)] != own:
            rows.append(turn.row)
        place[index] = len(rows) - 1
    return rows, place


def answered_turns(
    tokenizer: PreTrainedTokenizerBase, number: int, conversation: Any, by_turn: bool, span: Span | None
) -> Iterator[Turn]:
    """Yield a conversation's last answer, or all of its answers."""
    if isinstance(conversation, str):
        raise InputError(f"conversation {number} is a text: give a question and its answer as a tuple, or messages")
    if len(conversation) == 2 and isinstance(conversation[0], str):
        conversation = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), conversation)]
    ends = [i for i, message in enumerate(conversation) if message["role"] == "assistant" and i > 0]
    if not ends:
        raise InputError(f"conversation {number} has no answer: give messages that end with role 'assistant'")
    for turn, end in enumerate(ends):
        if by_turn or end == ends[-1]:
            row = encode_answer(tokenizer, *finished_turn(tokenizer, conversation, end))
            yield Turn(number, turn, row, kept_tokens(span, *row))
