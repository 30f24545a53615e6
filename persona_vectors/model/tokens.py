"""Which tokens a forward pass reads: padding, prompt or answer, and which of them an edit applies to."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from persona_vectors.data.errors import InputError

POSITIONS = ("all", "prompt", "response", "labels")


class Tokens:
    """What the running forward pass reads: which tokens are padding, and which belong to the answer.

    The first pass, and every pass of several tokens, reads a prompt; passes of one token that continue a cache read
    the answer. Without a cache each pass reads everything so far, and the first one's width is the prompt's.
    """

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None
        self.labels: Tensor | None = None
        """[batch, token], -100 where the loss counts no token; None where the pass was given none."""
        self.mask: Tensor | None = None
        """[batch, token], True for real tokens; None where all are."""
        self.training = False
        """True where the decoder is in training mode and gradients are recorded: a pass of a training step."""
        self.batch = self.width = 0
        self.device = torch.device("cpu")
        self.decoding = False
        """True where the pass reads one answer token a row from a cache."""
        self.starts = False
        """True where the pass begins with a prompt; False where it continues the last one, with a cache or without."""
        self.edited: set[int] = set()
        """The blocks whose output has been replaced by these edits."""
        self.fired: set[int] = set()
        """The blocks that have run in this pass."""
        self._prompt: Tensor | None = None
        self._prompt_width = 0
        self._cache: Callable[[], Any] = lambda: None
        self._last_width = 0
        self._selected: dict[str, Tensor | None] = {}
        self.paused = False

    def start(self, given: Mapping[str, Any]) -> None:
        """Take in the decoder's arguments at the start of a forward pass."""
        ids: Tensor | None = given.get("input_ids")
        read: Tensor = ids if ids is not None else given["inputs_embeds"]
        (self.batch, self.width), self.device = read.shape[:2], read.device
        self.input_ids, self.labels = ids, given.get("labels")
        self.training, self.fired = bool(given.get("training")), set()
        mask = given.get("attention_mask")
        self.mask = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= self.width:
            self.mask = mask[:, -self.width :].bool()
        cache = given.get("cache")
        continues = cache is not None and (cache is self._cache() or _holds_tokens(cache))
        self.decoding = continues and self.width == 1
        self.starts = not self.decoding and not self._grows(cache, ids)
        if self.starts:
            self._prompt, self._prompt_width = ids, self.width
        self._cache = weakref.ref(cache) if cache is not None else lambda: None
        self._last_width = self.width
        self._selected = {}

    def _grows(self, cache: Any, ids: Tensor | None) -> bool:
        """Say whether an uncached pass reads the last one's tokens and one more, as generation without a cache does."""
        if cache is not None or ids is None or self._prompt is None or self.width != self._last_width + 1:
            return False
        prompt = self._prompt
        return prompt.shape[0] == self.batch and torch.equal(ids[:, : prompt.shape[1]], prompt)

    def select(self, positions: "str | Tensor") -> Bool[Tensor, "batch token"] | None:
        """Return where an edit at `positions` applies; None means at every token."""
        if isinstance(positions, Tensor):
            if tuple(positions.shape) != (self.batch, self.width):
                raise InputError(
                    f"the positions mask is {list(positions.shape)} but the forward pass reads "
                    f"[{self.batch}, {self.width}]: give a mask of [batch, token]"
                )
            return positions.bool() if self.mask is None else positions.bool() & self.mask.to(positions.device)
        if positions not in self._selected:
            self._selected[positions] = self._find(positions)
        return self._selected[positions]

    def around(self) -> "tuple[list[Tokens], list[Tokens]]":
        """Return the other active edits of the running pass: those whose hooks run before these, and after."""
        same = [t for t in active if t is self or (t.input_ids is self.input_ids and not t.paused)]
        return same[: same.index(self)], same[same.index(self) + 1 :]

    def _find(self, positions: str) -> Tensor | None:
        if positions == "labels":
            return self._find_labels()
        if _places and positions != "all":
            place = _places[-1].to(self.device)
            wanted = place < 0 if positions == "prompt" else place >= -1
            return wanted if self.mask is None else wanted & self.mask
        if self.decoding:
            zeros = torch.zeros(self.batch, 1, dtype=torch.bool, device=self.device)
            return zeros if positions == "prompt" else None
        if positions == "all":
            return self.mask
        real = self.mask
        if real is None:
            real = torch.ones(self.batch, self.width, dtype=torch.bool, device=self.device)
        column = torch.arange(self.width, device=self.device)
        in_prompt = real & (column < self._prompt_width)
        if positions == "prompt":
            return in_prompt
        last = in_prompt & (column == torch.where(in_prompt, column, -1).amax(dim=1, keepdim=True))
        return last | (real & (column >= self._prompt_width))

    def _find_labels(self) -> Tensor:
        """Return the tokens that the loss counts, and those that predict them."""
        if self.labels is None or self.labels.shape != (self.batch, self.width):
            found = "none" if self.labels is None else list(self.labels.shape)
            raise InputError(
                f"positions='labels' needs the call to have labels [{self.batch}, {self.width}], and it has {found}: "
                "pass labels to the model (label smoothing and a compute_loss_func take them away), or give a mask"
            )
        counted = self.labels != -100
        counted = counted | nn.functional.pad(counted[:, 1:], (0, 1))
        return counted if self.mask is None else counted & self.mask


def _holds_tokens(cache: Any) -> bool:
    try:
        return cache.get_seq_length() > 0
    except (AttributeError, ValueError, TypeError):  # caches of state-space models count no tokens
        return False


def check_positions(positions: str | Tensor) -> None:
    """Raise InputError where an edit cannot be limited to `positions`."""
    if not isinstance(positions, Tensor) and positions not in POSITIONS:
        raise InputError(f"positions is {positions!r}: give one of {', '.join(POSITIONS)}, or a mask [batch, token]")


active: list[Tokens] = []
"""Those of every `edit_blocks` that is open now, the outermost first."""
_places: list[Tensor] = []


@contextmanager
def answers_at(place: Int[Tensor, "batch token"]) -> Iterator[None]:
    """Tell the edits where the answers begin in the forward pass inside, which reads finished text.

    `place` is each token's distance from its answer's first token: negative in the prompt. Without this a pass over
    finished text is all prompt to the edits.
    """
    _places.append(place)
    try:
        yield
    finally:
        _places.pop()
