"""Monitoring: read projections on persona vectors inside a `with`, token by token (paper, section 3.3)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.data.tables import Table
from persona_vectors.model.blocks import Layer, Model
from persona_vectors.model.hooks import pause_edits
from persona_vectors.model.reads import read_blocks
from persona_vectors.model.thoughts import Span
from persona_vectors.model.tokens import Tokens
from persona_vectors.model.wrappers import unwrap
from persona_vectors.monitoring.columns import Columns
from persona_vectors.monitoring.percentiles import Calibration
from persona_vectors.monitoring.readings import Readings
from persona_vectors.vectors.directions import Key, layer_for, projections, unit_directions, vector_keys, vector_list
from persona_vectors.vectors.shipped import VectorLike


class _Call:
    """What is recorded of one call."""

    def __init__(self, tokens: Tokens, project: Callable[[Tensor], Tensor]) -> None:
        self.batch, self.begin, self.generate = tokens.batch, tokens.begin, tokens.call
        self.virtual, self.around = tokens.virtual, tokens.around
        self.prompt_width = (tokens.width if tokens.boundary is None else tokens.boundary) - self.begin
        if tokens.boundary is None:
            self.prompt_width = tokens.unpack(torch.zeros(tokens.batch, tokens.width)).shape[1]
        self.tokens, self.real, self.values = Columns(), Columns(), Columns(project)
        self.parts: list[Float[Tensor, "row token layer vector"]] = []  # of the running pass, until every layer's

    def new(self, columns: Columns, tokens: Tokens) -> int:
        """Return where in a pass what is new begins: an uncached one reads again what is known."""
        place = tokens.begin - self.begin
        if 0 < place < columns.width:
            columns.crop(place)  # drafts that were not accepted
        return 0 if place else columns.width

    def add_tokens(self, tokens: Tokens) -> None:
        """Take in the ids of a pass, and which of a prompt's tokens are real."""
        ids, shape = tokens.input_ids, (tokens.batch, tokens.width)
        if ids is None:
            ids = torch.full(shape, -1, device=tokens.device)
        new = self.new(self.tokens, tokens)
        self.tokens.add(tokens.unpack((ids[:, new:] if new else ids).clone()))  # a view would keep all of it
        if self.real.width < self.prompt_width:
            real = torch.ones(shape, dtype=torch.bool) if tokens.mask is None else tokens.mask
            self.real.add(tokens.unpack(real[:, new:]))

    @property
    def width(self) -> int:
        """How many tokens every layer has read: drafts may not have been accepted."""
        if self.generate is None or self.generate.length is None:
            return self.values.width
        return min(self.values.width, self.generate.length - 1 + self.virtual - self.begin)

    def saw(self, layer: int) -> str:
        """Return "unedited", or where the values stand to the edits: an edit of a lower block comes before them."""
        before, after = self.around
        edited_before = any(min(t.edited, default=layer + 1) <= layer for t in before)
        edited_before |= any(min(t.edited, default=layer) < layer for t in after)
        edited_after = any(max(t.edited, default=layer) > layer for t in before)
        edited_after |= any(max(t.edited, default=-1) >= layer for t in after)
        words = ["after one edit and before another", "after the edit", "before the edit", "unedited"]
        return words[2 * (not edited_before) + (not edited_after)]


class Trace:
    """What a `monitor` has read so far: its `calls`, and the last one's values under its own name.

    Reading it moves the new values from the device, once; it can be read at any time, also after an error.
    """

    def __init__(
        self,
        names: Sequence[str],
        units: dict[int, Float[Tensor, "vector hidden"]],
        stops: Sequence[int],
        span: Span | None = None,
    ) -> None:
        self.names, self.layers, self.stops, self.span = list(names), list(units), tuple(stops), span
        self.keys: tuple[Key, ...] = tuple(vector_keys(names, self.layers))
        self._units = units
        self._stacked: dict[tuple[int, int, torch.device], Float[Tensor, "layer vector hidden"]] = {}
        self._calls: list[_Call] = []

    def __repr__(self) -> str:
        where = f"{', '.join(self.names)} at layer {', '.join(map(str, self.layers))}"
        if not self._begun:
            return f"Trace({where}: nothing read yet)"
        last = self.last
        rows, width = last.real.shape
        saw = " / ".join(dict.fromkeys(last.saw.values()))
        tokens = f"{rows} rows x {width} tokens, {last.prompt_width} of them the prompt's"
        means = f"; means over the {self.span.name}" if self.span else ""
        return f"Trace({where}: {len(self._begun)} calls, the last one {tokens}; {saw}{means})"

    @property
    def calls(self) -> list[Readings]:
        """The readings of each call to the model, in order."""
        return [self._readings(call) for call in self._begun]

    @property
    def last(self) -> Readings:
        """The readings of the last call; raises InputError where there was none."""
        if not self._begun:
            raise InputError("this trace is empty: call the model, or its generate, inside the `with pv.monitor(...)`")
        return self._readings(self._begun[-1])

    def __getitem__(self, key: Key) -> Float[Tensor, "batch token"]:
        """Return the last call's projections on one vector, a column for each token read; nan for padding."""
        return self.last[key]

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of every call, one for each token that was read; `call` counts the calls from 0."""
        return [{"call": call, **row} for call, readings in enumerate(self.calls) for row in readings.rows()]

    to_pandas = Table.to_pandas

    @property
    def mean(self) -> dict[Key, Float[Tensor, " batch"]]:
        """The last call's mean over each answer's tokens, or over the span of them that was asked for."""
        return self.last.mean

    @property
    def prompt_last(self) -> dict[Key, Float[Tensor, " batch"]]:
        """The last call's values at the last token of each prompt."""
        return self.last.prompt_last

    def percentiles(self, calibration: Calibration | Sequence[Calibration]) -> dict[Key, Float[Tensor, "batch token"]]:
        """Return the last call's projections as percentiles of neutral answers' tokens."""
        return self.last.percentiles(calibration)

    @property
    def _begun(self) -> list[_Call]:
        """The calls of which every layer has read something."""
        return [call for call in self._calls if call.width]

    def _read(self, layers: Sequence[int], states: Float[Tensor, "layer batch token hidden"], tokens: Tokens) -> int:
        """Take in blocks' outputs, only new columns; return how many answer tokens a row has, -1 before all layers."""
        if layers[0] == self.layers[0]:
            if tokens.paged:
                raise InputError(
                    "monitor does not follow continuous batching, whose requests come and go: use generate"
                )
            if not self._calls or tokens.starts or tokens.batch != self._calls[-1].batch:
                if self._calls:
                    self._calls[-1].values.settle()  # its numbers are kept, and no states
                self._calls.append(_Call(tokens, partial(self._project, self.layers)))
            self._calls[-1].add_tokens(tokens)
            self._calls[-1].parts = []
        call = self._calls[-1]
        known = call.new(call.values, tokens)
        new = states[:, :, known:] if known else states
        if tokens.kept is not None and len(layers) == len(self.layers):
            call.values.wait(new)
        else:
            call.parts.append(tokens.unpack(self._project(layers, new)))
            if layers[-1] != self.layers[-1]:
                return -1
            call.values.add(torch.cat([part.to(states.device) for part in call.parts], dim=2))
        return call.values.width - call.prompt_width

    def _project(
        self, layers: Sequence[int], states: Float[Tensor, "layer batch token hidden"]
    ) -> Float[Tensor, "batch token layer vector"]:
        key = layers[0], len(layers), states.device
        if key not in self._stacked:
            self._stacked[key] = torch.stack([self._units[layer] for layer in layers]).to(states.device)
        values = projections(states.flatten(1, 2), self._stacked[key])
        return values.view(*states.shape[:3], len(self.names)).permute(1, 2, 0, 3)

    def _readings(self, call: _Call) -> Readings:
        width = call.width
        values = call.values.read()[:, :width]
        known = call.real.read() if call.real.width else torch.zeros(len(values), 0, dtype=torch.bool)
        real = torch.ones(len(values), width, dtype=torch.bool)
        real[:, : known.shape[1]] = known[:, :width]
        return Readings(
            self.keys,
            values.permute(2, 3, 0, 1).flatten(0, 1),
            call.tokens.read()[:, :width],
            real,
            call.prompt_width,
            self.stops,
            {layer: call.saw(layer) for layer in self.layers},
            self.span,
        )


@contextmanager
def monitor(
    model: Model,
    vectors: VectorLike | Sequence[VectorLike],
    *,
    layer: Layer | None = None,
    positions: str | Span = "all",
    every: int = 1,
    callback: Callable[[Trace], object] | None = None,
    stops: Sequence[int] | None = None,
) -> Iterator[Trace]:
    """Record every token's projection on v/|v| in each `model.generate` or forward call inside the `with`.

    Yields a `Trace`: `trace["evil"]` is [batch, token] of the last call, `trace.calls` holds them all. One number a
    token, vector and layer is kept, on the device until the trace is read, and of the last few decoding steps the
    states. `callback(trace)` is run once a prompt was read and after every `every` answer tokens: each reading waits
    for the device, and an error that it raises ends the generation. Edits are suspended inside it.

    Without `layer` it is the recommended one. `stops` are the tokens that end an answer; by default the model's own.
    `positions=pv.Span(tokenizer, "answer")`, or "reasoning", has `trace.mean` be over that part of each answer alone.

    A monitor opened inside a `steer` reads after its edit, one opened outside it before; `trace.calls[i].saw` says
    which. After beam search use `trace.last.follow_beams`. The sequences of a packed pass are a row each. Virtual
    tokens of prompt tuning have columns like padding, nan.

    Raises InputError for vectors or a layer that do not fit, and where the model was not called.
    """
    model = unwrap(model)
    chosen = vector_list(vectors)
    units = unit_directions(model, chosen, layer_for(chosen, layer, purpose="monitor"))
    if every < 1:
        raise InputError(f"every is {every}: give the number of tokens between two callbacks, 1 or more")
    if stops is None:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        stops = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if isinstance(positions, str) and positions != "all":
        raise InputError(f"positions is {positions!r}: give 'all', or pv.Span(tokenizer, 'answer') or 'reasoning'")
    span = None if isinstance(positions, str) else positions
    trace = Trace([vector.trait for vector in chosen], units, stops, span)

    def read(layers: Sequence[int], states: Tensor, tokens: Tokens) -> None:
        answered = trace._read(layers, states, tokens)
        if callback and answered >= 0 and answered % every == 0:
            with pause_edits(model):
                callback(trace)

    with read_blocks(model, trace.layers, read):
        yield trace
        if not trace._calls:
            raise InputError("the monitor saw no forward pass: call this same model inside the `with`")
        trace._calls[-1].values.settle()
