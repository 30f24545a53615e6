"""Readings: projections of the tokens of one call, read-only, and what can be asked of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.data.tables import Table
from persona_vectors.model.thoughts import Span
from persona_vectors.monitoring.percentiles import Calibration, calibration_of
from persona_vectors.vectors.directions import Key


@dataclass(frozen=True, eq=False)
class Readings:
    """The projections of every token of one call: a prompt and the passes that continued it, or one forward pass."""

    keys: tuple[Key, ...]
    values: Float[Tensor, "key batch token"]
    """Projections on v/|v|, in the residual stream's units, also where a row has nothing to read."""
    tokens: Int[Tensor, "batch token"]
    """The ids that were read; -1 where the model was given embeddings."""
    real: Bool[Tensor, "batch token"]
    """False for padding."""
    prompt_width: int
    """How many of the columns, the first ones, hold the prompt."""
    stops: tuple[int, ...]
    """The tokens that end an answer."""
    saw: dict[int, str]
    """For each layer, whether the values are from before or after a steer's edit, or the model's own: "unedited"."""
    span: Span | None = None
    """The part of the answers that `mean` is over; None for all of them."""

    def __getitem__(self, key: Key) -> Float[Tensor, "batch token"]:
        """Return one vector's projections; nan for padding, also that which follows a finished answer."""
        if key not in self.keys:
            raise InputError(f"this trace has no {key!r}: it has {', '.join(map(repr, self.keys))}")
        past = self._ended().cumsum(dim=1) > 1  # the end token itself was read
        return self.values[self.keys.index(key)].masked_fill(~self.real | past, torch.nan)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each token that was read, with a column for each key; padding is left out."""
        values = torch.stack([self[key] for key in self.keys])
        position, thought = self.real.cumsum(dim=1) - 1, torch.zeros_like(self.real)
        if self.span is not None:
            thought = self.averaged if self.span.name == "reasoning" else self.answer & ~self.averaged
        return [
            {
                "row": row,
                "position": int(position[row, column]),
                "token": int(self.tokens[row, column]),
                "part": "prompt" if column < self.prompt_width else "reasoning" if thought[row, column] else "answer",
            }
            | dict(zip(self.keys, values[:, row, column].tolist()))
            for row, column in (~values[0].isnan()).nonzero().tolist()
        ]

    to_pandas = Table.to_pandas

    @property
    def answer(self) -> Bool[Tensor, "batch token"]:
        """The answers' tokens, without the end token and what follows it."""
        column = torch.arange(self.real.shape[1])
        return self.real & (column >= self.prompt_width) & ~self._ended()

    @property
    def averaged(self) -> Bool[Tensor, "batch token"]:
        """The answers' tokens, or those of them that lie in the span that was asked for."""
        return self.answer if self.span is None else self.span.within(self.tokens, self.answer)

    @property
    def mean(self) -> dict[Key, Float[Tensor, " batch"]]:
        """Each answer's mean over its tokens; nan where it has none. The last token sampled is never read."""
        values = self.values.masked_fill(~self.averaged, torch.nan)
        return dict(zip(self.keys, values.nanmean(dim=2)))

    @property
    def prompt_last(self) -> dict[Key, Float[Tensor, " batch"]]:
        """The value at each prompt's last token, before the answer: it predicts the answer's trait score."""
        real = self.real[:, : self.prompt_width]
        last = torch.where(real, torch.arange(real.shape[1]), -1).amax(dim=1) if self.prompt_width else None
        if last is None:
            return dict.fromkeys(self.keys, torch.full((len(real),), torch.nan, dtype=torch.float32))
        values = self.values[:, torch.arange(len(real)), last].masked_fill(last < 0, torch.nan)
        return dict(zip(self.keys, values))

    def percentiles(self, calibration: Calibration | Sequence[Calibration]) -> dict[Key, Float[Tensor, "batch token"]]:
        """Return each vector's projections as percentiles of neutral answers' tokens; nan for padding.

        Give the `calibrate` of each vector at the layers that were read. 50 is an answer token as neutral as any.
        """
        layers = list(self.saw)
        count = len(self.keys) // len(layers)
        found = {}
        for number, key in enumerate(self.keys):
            layer = layers[number // count]
            trait = key if len(layers) == 1 else key.removesuffix(f"@{layer}")
            found[key] = calibration_of(trait, calibration).percentile(self[key], layer=layer)
        return found

    def follow_beams(self, beam_indices: Int[Tensor, "sequence step"]) -> "Readings":
        """Return the readings of beam search's answers, in the order of its `sequences`.

        While it searches, `generate` moves rows from one beam to another, so a column's rows are those of that step.
        Give the `beam_indices` of its output (`return_dict_in_generate=True`): the row that each token came from.
        """
        beams, width = beam_indices.cpu(), self.prompt_width
        columns = min(self.real.shape[1], width - 1 + beams.shape[1])
        rows = torch.cat([beams[:, :1].expand(-1, width), beams[:, 1:]], dim=1)[:, :columns]
        if rows.max() >= len(self.real):
            raise InputError(f"beam_indices names row {int(rows.max())}, and this call read {len(self.real)} rows")
        chosen, column = rows.clamp(min=0), torch.arange(columns)
        return Readings(
            self.keys,
            self.values[:, chosen, column],
            self.tokens[chosen, column],
            self.real[chosen, column] & (rows >= 0),
            width,
            self.stops,
            self.saw,
            self.span,
        )

    def _ended(self) -> Bool[Tensor, "batch token"]:
        """Return True from each answer's end token on."""
        stop = torch.isin(self.tokens, torch.tensor(self.stops, dtype=torch.long))
        stop[:, : self.prompt_width] = False
        return stop.cumsum(dim=1) > 0
