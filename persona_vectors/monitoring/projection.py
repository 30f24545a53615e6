"""Projection of finished conversations: the numbers of `monitor`, averaged over prompts, answers and turns."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.data.tables import Stored, Table
from persona_vectors.model.blocks import Layer, Model
from persona_vectors.model.hooks import EnoughRead, edit_blocks, edits_are_active
from persona_vectors.model.passes import Row, forward_passes, own_tokens, read_pass
from persona_vectors.model.pooling import POOLINGS
from persona_vectors.model.thoughts import span_of
from persona_vectors.model.tokens import Tokens
from persona_vectors.model.wrappers import unwrap
from persona_vectors.monitoring.turns import Conversation, Turn, answered_turns, shared_rows
from persona_vectors.vectors.directions import Key, layer_for, projections, unit_directions, vector_keys, vector_list
from persona_vectors.vectors.moments import Moments
from persona_vectors.vectors.nulls import Nulls, nulls_of, vectors_alone, with_nulls
from persona_vectors.vectors.shipped import VectorLike


@dataclass(frozen=True, eq=False)
class Scores(Table):
    """Projections on v/|v|, in the residual stream's units, a row for each answer."""

    keys: tuple[Key, ...]
    """The vectors' traits; "trait@layer" where several layers were read."""
    poolings: tuple[str, ...]
    values: Annotated[Float[Tensor, "row pooling key"], Stored[0], Stored[1]]
    """nan where there is nothing to average: an empty answer, or one without the span that was asked for."""
    conversation: Annotated[Int[Tensor, " row"], Stored[0], Stored[1]]
    """Which conversation the row is from, counted from 0."""
    turn: Annotated[Int[Tensor, " row"], Stored[0], Stored[1]]
    """Which of its answers the row is, counted from 0."""
    answer_tokens: Annotated[Int[Tensor, " row"], Stored[0], Stored[1]]
    """How many answer tokens were averaged."""
    reasoning_tokens: Annotated[Int[Tensor, " row"], Stored[0], Stored[1]]
    """How many of the answers' tokens are reasoning; 0 where `positions` is "all", which does not look for it."""
    positions: str = "all"
    """Which of an answer's tokens `response_mean` is over: "all", "answer" or "reasoning"."""
    nulls: Nulls | None = None
    """Where the vectors' means over the rows lie among those of random directions; None unless they were asked for."""

    def __getitem__(self, pooling: str) -> dict[Key, Float[Tensor, " row"]]:
        """Return one pooling's projections: `scores["response_mean"]["evil"]`."""
        if pooling not in self.poolings:
            raise InputError(f"these scores have no {pooling!r}: they have {', '.join(self.poolings)}")
        return dict(zip(self.keys, self.values[:, self.poolings.index(pooling)].T))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each answer and pooling, with a column for each key."""
        names = ("conversation", "turn", "answer_tokens", "reasoning_tokens")
        return [
            {**{name: int(getattr(self, name)[row]) for name in names}, "pooling": pooling}
            | dict(zip(self.keys, self.values[row, place].tolist()))
            for row in range(len(self.turn))
            for place, pooling in enumerate(self.poolings)
        ]

    def __repr__(self) -> str:
        read = f"{int(self.answer_tokens.sum())} tokens"
        if self.positions != "all":
            read += f" of the {self.positions} ({int(self.reasoning_tokens.sum())} are reasoning)"
        of = f"{len(self.turn)} answers of {len(self.conversation.unique())} conversations, {read}"
        return f"Scores({', '.join(map(str, self.keys))}: {of})"


def project(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    vectors: VectorLike | Sequence[VectorLike],
    *,
    layer: Layer | None = None,
    poolings: Sequence[str] = ("prompt_last", "response_mean"),
    by_turn: bool = False,
    positions: str = "all",
    controls: int = 0,
    reference: Moments | None = None,
    batch_tokens: int | None = None,
) -> Scores:
    """Return each conversation's projections at its last answer, or at every answer with `by_turn`.

    `prompt_last` is the last token before the answer, `prompt_mean` everything before it, `response_mean` the answer,
    or by `positions` its "answer" or "reasoning" alone, which the result names; see `Span`.
    A conversation's turns are read in one pass where the text of each continues the last one's, so that 50 turns cost
    one reading of the text; where the chat template rewrites earlier turns, each is read as its model saw it.

    Without a layer it is the one that the vectors' files recommend to monitor at.

    `controls` random directions are read in the same passes, half isotropic, half with the covariance of `reference`,
    by default `neutral_moments` of answers on plain facts: `scores.nulls` says where the vectors' means lie among them.

    Raises InputError for a conversation without an answer, and for vectors or a layer that do not fit.
    """
    model = unwrap(model)
    chosen = vector_list(vectors)
    layer = layer_for(chosen, layer, purpose="monitor")
    layers = list(unit_directions(model, chosen, layer))
    unknown = [name for name in poolings if name not in POOLINGS]
    if unknown or not poolings:
        raise InputError(f"pooling {(unknown or ['none'])[0]!r} is unknown: give one or more of {', '.join(POOLINGS)}")
    if not conversations:
        raise InputError("no conversations: give one or more")
    span = span_of(tokenizer, positions)
    turns = [
        turn
        for number, conversation in enumerate(conversations)
        for turn in answered_turns(tokenizer, number, conversation, by_turn, span)
    ]
    options: dict[str, Any] = {"layers": layers, "controls": controls, "reference": reference}
    read, source = with_nulls(model, tokenizer, chosen, **options)
    values = _pooled(model, turns, poolings, unit_directions(model, read, layer), batch_tokens)
    named: dict[str, Any] = {"traits": [vector.trait for vector in chosen], "layers": layers, "poolings": poolings}
    kept, whole = torch.tensor([[len(turn.kept), len(turn.row[1])] for turn in turns]).T
    return Scores(
        tuple(vector_keys(named["traits"], layers)),
        tuple(poolings),
        vectors_alone(values, vectors=len(chosen), layers=len(layers)),
        torch.tensor([turn.conversation for turn in turns]),
        torch.tensor([turn.turn for turn in turns]),
        kept,
        torch.zeros_like(kept) if span is None else whole - kept if span.name == "answer" else kept,
        "all" if span is None else span.name,
        nulls_of(values, **named, reference=source),
    )


def _pooled(
    model: Model,
    turns: Sequence[Turn],
    poolings: Sequence[str],
    units: dict[int, Float[Tensor, "vector hidden"]],
    batch_tokens: int | None,
) -> Float[Tensor, "turn pooling key"]:
    """Return each turn's mean projections; no token's are kept."""
    rows, place = shared_rows(turns)
    of_row: list[list[int]] = [[] for _ in rows]
    for number, row in enumerate(place):
        of_row[row].append(number)
    counts = torch.zeros(len(turns), len(poolings), 1, dtype=torch.float32)
    sums = torch.zeros(len(turns), len(poolings), sum(map(len, units.values())), dtype=torch.float32)

    def take(row: int, where: Tensor, values: Tensor) -> None:
        for number in of_row[row]:
            for way, pooling in enumerate(poolings):
                inside = turns[number].counts(where, pooling)
                sums[number, way] += values[inside].sum(dim=0)
                counts[number, way] += inside.sum()

    with bar(desc="projecting", unit="texts", total=len(rows)) as shown:
        read_projections(model, rows, units, take, batch_tokens=batch_tokens, progress=shown.update)
    return sums / counts


def token_projections(
    model: Model,
    rows: Sequence[Row],
    units: dict[int, Float[Tensor, "vector hidden"]],
    *,
    batch_tokens: int | None = None,
) -> list[Float[Tensor, "token key"]]:
    """Return every token's projections for each finished row, prompt and answer; see `read_projections`."""
    keys = sum(len(stacked) for stacked in units.values())
    found = [torch.zeros(len(prompt) + len(answer), keys, dtype=torch.float32) for prompt, answer in rows]

    def take(row: int, where: Tensor, values: Tensor) -> None:
        found[row][where] = values

    read_projections(model, rows, units, take, batch_tokens=batch_tokens)
    return found


def read_projections(
    model: Model,
    rows: Sequence[Row],
    units: dict[int, Float[Tensor, "vector hidden"]],
    take: Callable[[int, Int[Tensor, " token"], Float[Tensor, "token key"]], None],
    *,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Project every token of finished rows, in as few passes as can be: `take(row, positions, values)`, part by part.

    Nothing is computed above the deepest layer asked for, unless other edits are active.
    `units` holds the stacked unit directions of each layer; a key is a vector at a layer, in the order of both.
    """
    read: dict[int, Tensor] = {}
    deepest = -1 if edits_are_active(model) else max(units)  # an edit further up would never run, and say so

    def reader(layer: int) -> Callable[[Tensor, Tokens], None]:
        def project(hidden: Tensor, _: Tokens) -> None:
            read[layer] = projections(own_tokens(hidden, step), units[layer].to(hidden.device)).cpu()
            if layer == deepest:
                raise EnoughRead

        return project

    with edit_blocks(model, {layer: reader(layer) for layer in units}), torch.inference_mode():
        for step in forward_passes(model, rows, batch_tokens=batch_tokens, held_back=1):
            with step.attempt, suppress(EnoughRead):
                read_pass(model, step)
            if step.attempt.failed:
                continue
            values = torch.cat([read[layer] for layer in units], dim=2)
            position = step.position.cpu()
            for line, members in enumerate(step.rows):
                real = position[line] >= 0
                for row in members:
                    take(row, position[line, real], values[line, real])
            if progress and step.answers:
                progress(len(step.rows))
