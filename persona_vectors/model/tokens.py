"""Which tokens a forward pass reads: padding, prompt or answer, and which of them an edit applies to."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from persona_vectors.data.errors import InputError
from persona_vectors.model.calls import Call
from persona_vectors.model.packing import cached_length, packed_sequences, real_tokens

POSITIONS = ("all", "prompt", "response", "labels")
Positions = str | Tensor | Callable[["Tokens"], Tensor]
"""Where an edit applies: one of these, a mask [batch, token], or what gives one for a pass, such as a `Span`."""


class Tokens:
    """What the running forward pass reads: which tokens are padding, packed together, prompt or answer.

    Where an answer begins is known from the call of `model.generate` that a pass is in. Outside one it is known where
    the pass is given a cache: one token that continues the cache is the answer's, several are a new prompt. Finished
    text does not say where its answers begin; `answers_at` does.
    """

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None
        self.known: Tensor | None = None
        """The ids that a `Span` has been asked about, from their rows' beginning."""
        self.labels: Tensor | None = None
        """[batch, token], -100 where the loss counts no token; None where the pass was given none."""
        self.sequence: Tensor | None = None
        """[batch, token], which of the pass's sequences a token is of; None where a row is one sequence."""
        self.training = False
        """True in a pass of a training step: in training mode, outside generation, with the adapters on."""
        self.batch = self.width = 0
        self.device = torch.device("cpu")
        self.call: Call | None = None
        """The call of `generate` that the pass is in."""
        self.paged = False
        """True in a pass of continuous batching, whose sequences come and go."""
        self.begin = 0
        """How many tokens of its row the pass's first one follows."""
        self.virtual = 0
        """How many of a row's first tokens are an adapter's, and no text."""
        self.boundary: int | None = None
        """How many tokens a row's prompt has, padding included; None where the pass does not say."""
        self.starts = False
        """True where the pass begins a prompt or a text; False where it continues the last one."""
        self.edited: set[int] = set()
        """The blocks whose output has been replaced by these edits."""
        self.applies = False
        """Whether the edits apply in the running pass."""
        self.fired: set[int] = set()
        """The blocks that have run in it."""
        self.around: tuple[list[Tokens], list[Tokens]] = ([], [])
        """The other active edits of the running pass: those that come before these, and after."""
        self.kept: dict[int, Any] | None = None
        """The outputs of blocks that wait to be read together; None where the pass is wide or has gradients."""
        self.simply_kept: dict[int, Any] | None = None
        """The same, while the rest of the pass's outputs have but to be put there, and no edit is to be called."""
        self.copied: list[tuple[Tensor, Tensor]] | None = []
        """Outputs with the copies kept instead; None once it is known that nothing changes them in place in a pass."""
        self._cache: Callable[[], Any] = lambda: None
        self._seen = 0
        self._mask: Any = None
        """The pass's attention mask; `_real` its real tokens once they were asked for."""
        self._real: tuple[Tensor | None] | None = None
        self._selected: dict[Any, Tensor | None] = {}

    @property
    def mask(self) -> Bool[Tensor, "batch token"] | None:
        """True for real tokens; None where all are. The virtual tokens of an adapter are not."""
        if self._real is None:
            shape = self.batch, self.width
            self._real = (real_tokens(self._mask, shape, self.begin, self.virtual, self.device),)
        return self._real[0]

    @property
    def decoding(self) -> bool:
        """True where the pass reads nothing but answer tokens."""
        return self.boundary is not None and self.begin >= self.boundary

    def start(self, given: Mapping[str, Any]) -> None:
        """Take in the decoder's arguments at the start of a forward pass."""
        ids: Tensor | None = given.get("input_ids")
        read: Tensor = ids if ids is not None else given["inputs_embeds"]
        (self.batch, self.width), self.device = read.shape[:2], read.device
        self.input_ids, self.labels = ids, given.get("labels")
        self.training, self.fired, self._selected = bool(given.get("training")), set(), {}
        self.kept, self.simply_kept = None if self.width > 1 or torch.is_grad_enabled() else {}, None
        cache, call = given.get("cache"), given.get("call")
        self.paged = bool(given.get("paged"))
        self._place(cache, call, given.get("text_width"))
        self._mask, self._real = given.get("attention_mask"), (None,) if self.paged else None
        self.sequence = None
        if call is None and self.width > 1:
            self.sequence = packed_sequences(
                given.get("position_ids"), given.get("cu_seq_lens_q"), self.mask, read.shape
            )
        if self.sequence is not None or self.paged:
            self.boundary, self.starts = None, True

    def _place(self, cache: Any, call: Call | None, text_width: int | None) -> None:
        """Find where in its row the pass begins, and where the row's answer does."""
        length = cached_length(cache)
        same = call is self.call and (call is not None or (cache is not None and cache is self._cache()))
        if not same:
            self._seen = self.virtual = 0
        if length is not None:
            self.begin = length
        else:  # without a cache each pass reads everything so far; the state of a state-space model counts nothing
            self.begin = 0 if not same or self.width > self._seen else self._seen
        if not same and self.input_ids is None:  # prompt tuning puts virtual tokens before the text
            if call is not None and call.text and call.width is not None:
                text_width = call.width - self.begin
            self.virtual = 0 if text_width is None else max(self.width - text_width, 0)
        if call is not None:
            self.starts = not same
            if self.starts:
                self.boundary = self.begin + self.width if call.width is None else call.width + self.virtual
            call.read = self.begin + self.width
        elif cache is not None:
            continues = self.width == 1 and (same or self.begin > 0)
            self.starts = not continues
            if self.starts:
                self.boundary = self.begin + self.width
            elif not same:
                self.boundary = self.begin
        else:
            self.starts, self.boundary = True, None
        self.call, self._seen = call, self.begin + self.width
        self._cache = weakref.ref(cache) if cache is not None else lambda: None

    def unpack(self, values: Shaped[Tensor, "batch token ..."]) -> Shaped[Tensor, "sequence place ..."]:
        """Return a row for each packed sequence, padded on the right; `values` as they are where rows are sequences."""
        if self.sequence is None:
            return values
        lengths = torch.bincount(self.sequence.flatten()).tolist()
        return nn.utils.rnn.pad_sequence(list(values.flatten(0, 1).split(lengths)), batch_first=True)

    def select(self, positions: Positions) -> Bool[Tensor, "batch token"] | None:
        """Return where an edit at `positions` applies; None means at every token."""
        if isinstance(positions, Tensor):
            if tuple(positions.shape) != (self.batch, self.width):
                raise InputError(
                    f"the positions mask is {list(positions.shape)} but the forward pass reads "
                    f"[{self.batch}, {self.width}]: give a mask of [batch, token]"
                )
            given = positions.to(self.device).bool()
            return given if self.mask is None else given & self.mask
        if positions not in self._selected:
            self._selected[positions] = positions(self) if callable(positions) else self._find(positions)
        return self._selected[positions]

    def per_row(self, values: Shaped[Tensor, "row ..."], what: str) -> Shaped[Tensor, "batch token ..."]:
        """Return each token's value, where `values` has one for each row; [batch, 1, ...] where rows are sequences.

        The rows of a batch, the prompts of a `generate` call that makes several rows of each, or packed sequences.
        """
        count = len(values)
        if self.paged:
            raise InputError(f"{what} has one value a row, and continuous batching has no rows: give one for all")
        if self.sequence is not None:
            packed = int(self.sequence.max()) + 1
            if count != packed:
                raise InputError(f"{what} has {count} rows for the {packed} sequences packed here: give one for each")
            return values[self.sequence.to(values.device)]
        if count == self.batch:
            return values[:, None]
        prompts = self.call.prompts if self.call is not None else None
        if count == prompts and self.batch % count == 0:  # beams, or several samples
            return values.repeat_interleave(self.batch // count, dim=0)[:, None]
        raise InputError(f"{what} has {count} rows for a batch of {self.batch}: give one for each row, or one for all")

    def _find(self, positions: str) -> Tensor | None:
        if positions == "all":
            return None if self.decoding else self.mask
        if positions == "labels":
            return self._find_labels()
        given = places.get()
        if given is not None:
            place = nn.functional.pad(given[0].to(self.device), (self.width - given[0].shape[1], 0))  # an adapter's
            wanted = place < 0 if positions == "prompt" else place >= -1
            return wanted if self.mask is None else wanted & self.mask
        if self.boundary is None:
            what = "packs several sequences" if self.sequence is not None or self.paged else "reads finished text"
            raise InputError(
                f"positions={positions!r} is not known in a forward pass that {what}: give 'all', 'labels' where the "
                "call has labels, or a mask [batch, token]; in decoding, call model.generate or pass the cache"
            )
        if self.decoding:
            zeros = torch.zeros(self.batch, self.width, dtype=torch.bool, device=self.device)
            return zeros if positions == "prompt" else None
        real = self.mask
        if real is None:
            real = torch.ones(self.batch, self.width, dtype=torch.bool, device=self.device)
        column = torch.arange(self.begin, self.begin + self.width, device=self.device)
        in_prompt = real & (column < self.boundary)
        if positions == "prompt":
            return in_prompt
        answer = real & (column >= self.boundary)
        if self.begin + self.width < self.boundary:  # a chunk of the prompt that is not its last
            return answer
        return answer | (in_prompt & (column == torch.where(in_prompt, column, -1).amax(dim=1, keepdim=True)))

    def _find_labels(self) -> Tensor:
        """Return the tokens that the loss counts, and those that predict them."""
        if self.labels is None or self.labels.shape != (self.batch, self.width):
            found = "none" if self.labels is None else list(self.labels.shape)
            raise InputError(
                f"positions='labels' needs the call to have labels [{self.batch}, {self.width}], and it has {found}: "
                "pass labels to the model (label smoothing and a compute_loss_func take them away), or give a mask"
            )
        counted = self.labels != -100
        predicts = nn.functional.pad(counted[:, 1:], (0, 1))
        if self.sequence is not None:  # no sequence's last token predicts the next one's first
            predicts &= nn.functional.pad(self.sequence[:, 1:] == self.sequence[:, :-1], (0, 1))
        counted = counted | predicts
        return counted if self.mask is None else counted & self.mask


def check_positions(positions: Positions) -> None:
    """Raise InputError where an edit cannot be limited to `positions`."""
    if isinstance(positions, str) and positions not in POSITIONS:
        span = f", or pv.Span(tokenizer, {positions!r})" if positions in ("answer", "reasoning") else ""
        ways = f"give one of {', '.join(POSITIONS)}, or a mask [batch, token]"
        raise InputError(f"positions is {positions!r}: {ways}{span}")


places: ContextVar[tuple[Tensor, Sequence[Sequence[int]]] | None] = ContextVar("places", default=None)


@contextmanager
def answers_at(place: Int[Tensor, "batch token"], prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Tell the edits where the answers begin in the forward pass inside, which reads finished text.

    `place` is each token's distance from its answer's first token, negative in the prompt; `prompts` are the rows'
    whole prompts, of which the pass may read but the end.
    """
    before = places.set((place, prompts))
    try:
        yield
    finally:
        places.reset(before)
