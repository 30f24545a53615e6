"""What one `edit_blocks` knows over its passes: where it applies, and that its hooks fire."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_vectors.data.errors import InputError
from persona_vectors.model.tokens import Tokens

Edit = Callable[[Float[Tensor, "batch token hidden"], Tokens], Float[Tensor, "batch token hidden"] | None]


class EnoughRead(Exception):
    """Raised by an edit to end the forward pass at its block, and caught around the call: nothing above it is run."""


class _Local(threading.local):
    def __init__(self, every: WeakSet[Tokens]) -> None:
        self.tokens = Tokens()
        every.add(self.tokens)


class Run:
    """One `edit_blocks` that is open on a model."""

    def __init__(self, model: Any, edits: dict[int, Edit], during: str) -> None:
        self.model, self.decoder, self.edits, self.during = model, model.get_decoder(), edits, during
        self.fired: set[int] = set()
        """The blocks that have been hooked to some effect inside the `with`."""
        self.since_step: set[int] = set()
        """The same since the last optimizer step."""
        self.trained: Tokens | None = None
        """The last training pass's tokens."""
        self.read: dict[tuple[int, int], Tokens] = {}
        """The tokens of the training passes since the last step, by block and by the address of the block's input."""
        self.elsewhere = False
        """Whether the model has run in a thread that has no edits of its own."""
        self._every: WeakSet[Tokens] = WeakSet()
        """Each thread's tokens."""
        self._local = _Local(self._every)

    @property
    def tokens(self) -> Tokens:
        """What this thread's running pass reads."""
        return self._local.tokens

    def start_pass(self, given: Mapping[str, Any], before: list[Tokens], after: list[Tokens]) -> None:
        """Take in the decoder's arguments; `before` and `after` are the other edits' tokens."""
        tokens = self.tokens
        self._note(tokens)
        tokens.start(given)
        tokens.around = before, after
        tokens.applies = tokens.training or self.during == "always" or (self.during == "auto" and self.trained is None)
        if not tokens.training:
            return
        if self.during == "auto" and self.trained is None and self.fired:
            raise InputError(
                "this `with` has edited passes before its first training pass, and would leave such passes alone from "
                "now on: give during='training' to leave evaluation and generation alone, or during='always'"
            )
        self.trained = copy.copy(tokens)

    def start_trained_block(self, tokens: Tokens, layer: int, args: tuple) -> Tokens:
        """Return the tokens of the pass that a block runs in, once there has been training."""
        assert self.trained is not None
        address = address_of(args)
        if layer in tokens.fired:  # checkpointing runs the block again, in `backward`
            tokens = self.read.get((layer, address), self.trained)
        elif tokens.training:
            self.read[layer, address] = self.trained
        tokens.fired.add(layer)
        return tokens

    def _note(self, tokens: Tokens) -> None:
        """Take in which blocks a pass has been hooked in, once: at its end, or after it where it was cut off."""
        if tokens.applies:
            self.fired |= tokens.fired
            self.since_step |= tokens.fired
            tokens.applies = False

    def end_pass(self) -> None:
        """Check that every block was hooked in this pass."""
        when = "in this training step" if self.tokens.training else "in this forward pass"
        _check(self.edits.keys() - self.tokens.fired, when)
        self._note(self.tokens)

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Check, before an optimizer's step, that the edits took part in what led to it."""
        if self not in active.get():
            return
        self._note(self.tokens)
        own = {id(parameter) for parameter in self.model.parameters()}
        if not self.fired or any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            _check(self.edits.keys() - self.since_step, "before this optimizer step")
            self.since_step.clear()
            self.read.clear()

    def end(self) -> None:
        """Check that every block was hooked inside the `with`."""
        for tokens in self._every:
            self._note(tokens)
        thread = "; it ran in another thread: start that by contextvars.copy_context().run"
        _check(self.edits.keys() - self.fired, "inside the `with`", thread * self.elsewhere)


def _check(silent: set[int], when: str, why: str = "") -> None:
    if silent:
        raise RuntimeError(
            f"block {min(silent)} never ran {when}, so nothing was done there: "
            f"call this same model object inside it, and not a compiled or copied one{why}"
        )


def address_of(args: tuple) -> int:
    """Return the address of a block's input, which tells one micro-batch's pass through it from another's."""
    return args[0].data_ptr() if args and isinstance(args[0], Tensor) else 0


active: ContextVar[tuple[Run, ...]] = ContextVar("edits", default=())
"""This thread's `edit_blocks` that are open and not paused, the outermost first."""


@contextmanager
def without(runs: Sequence[Run]) -> Iterator[None]:
    """Suspend some of this thread's runs."""
    active.set(tuple(run for run in active.get() if run not in runs))
    try:
        yield
    finally:
        active.set((*runs, *active.get()))


def adapters(model: nn.Module) -> tuple[Any, ...]:
    """Return which adapters are on, from the first layer that has any."""
    layers: Any = (m for m in model.modules() if isinstance(getattr(m, "disable_adapters", None), bool))
    layer = next(layers, None)
    return () if layer is None else (layer.disable_adapters, *layer.active_adapters)
