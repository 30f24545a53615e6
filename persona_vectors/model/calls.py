"""Calls of a model's own `generate`: what they say of the forward passes inside them."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from persona_vectors.data.errors import InputError


@dataclass(eq=False)
class Call:
    """One call of `model.generate`."""

    prompts: int | None
    """How many prompts it was given."""
    width: int | None
    """How many tokens a prompt has, padding included; None where the first pass tells, as in encoder-decoders."""
    text: bool
    """Whether it was given token ids, so that what a pass reads besides is an adapter's."""
    exits_early: bool
    """Whether the model drafts for itself, in calls of `generate` within this one."""
    beams: bool = False
    """Whether it searches with beams, which move rows."""
    read: int = 0
    """How many tokens of each row the passes have read so far."""
    length: int | None = None
    """How many tokens the longest row has in the end, prompt included."""

    def end(self, output: Any) -> None:
        """Check that the hooked passes read all that the call returned."""
        rows = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
        if not isinstance(rows, Tensor):  # what a custom generate returns is its own
            return
        prompt = self.width or 0
        self.length = rows.shape[1] + (0 if self.text else prompt)
        if self.length > max(prompt, 1) and self.read < self.length - 1:
            raise RuntimeError(
                f"generate returned rows of {self.length} tokens, of which only {self.read} went through the hooked "
                "decoder, so the others were neither read nor edited: generate without what bypasses it, such as "
                "another library's fast decoding"
            )


current: ContextVar[tuple[tuple[Any, Call], ...]] = ContextVar("calls", default=())
"""The models and calls that are under way in this thread, the outermost first."""


def call_of(model: Any) -> Call | None:
    """Return the innermost call of this model's `generate` that is under way in this thread."""
    return next((call for owner, call in reversed(current.get()) if owner is model), None)


@contextmanager
def no_calls(models: Callable[[Any], bool]) -> Iterator[None]:
    """Forget the calls that are under way in this thread, of some models: what runs inside is none of their passes."""
    before = current.set(tuple(entry for entry in current.get() if not models(entry[0])))
    try:
        yield
    finally:
        current.reset(before)


_lock = threading.Lock()
_followed: dict[int, int] = {}


@contextmanager
def follow_calls(
    model: Any, *, hooked: Callable[[], Any], unhooked: Callable[[], Any], lend: Callable[[], Any]
) -> Iterator[None]:
    """Follow the calls of `model.generate` and `generate_batch` while any `with` is open, in any thread.

    `hooked()` says whether this thread has an edit on the model; `unhooked()` is a context manager without them, for
    drafts; `lend()` is one that lends them to the thread that continuous batching starts.
    """
    with _lock:
        _followed[id(model)] = _followed.get(id(model), 0) + 1
        if _followed[id(model)] == 1:
            _replace(model, "generate", lambda own: _generate(model, own, hooked, unhooked))
            _replace(model, "generate_batch", lambda own: _generate_batch(model, own, hooked, lend))
    try:
        yield
    finally:
        with _lock:
            _followed[id(model)] -= 1
            if not _followed[id(model)]:
                del _followed[id(model)]
                for name in ("generate", "generate_batch"):
                    _restore(model, name)


def _replace(model: Any, name: str, make: Callable[[Any], Any]) -> None:
    own = getattr(model, name, None)
    if own is not None:
        wrapper = functools.wraps(own)(make(own))
        wrapper.replaced = vars(model).get(name)  # type: ignore[attr-defined]
        vars(model)[name] = wrapper


def _restore(model: Any, name: str) -> None:
    wrapper = vars(model).pop(name, None)
    if wrapper is not None and wrapper.replaced is not None:  # the user's own, set on this object
        vars(model)[name] = wrapper.replaced


def _generate(model: Any, own: Any, hooked: Callable[[], Any], unhooked: Callable[[], Any]) -> Callable[..., Any]:
    def generate(*args: Any, **kwargs: Any) -> Any:
        if not hooked():
            return own(*args, **kwargs)
        outer = call_of(model)
        if outer is not None and outer.exits_early:
            with unhooked():
                return own(*args, **kwargs)
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        embeds = kwargs.get("inputs_embeds")
        prompt = embeds if embeds is not None else ids
        config = kwargs.get("generation_config") or model.generation_config
        rows, width = prompt.shape[:2] if isinstance(prompt, Tensor) else (None, None)
        call = Call(
            prompts=rows,
            width=None if model.config.is_encoder_decoder else width,
            text=embeds is None,
            exits_early=bool(kwargs.get("assistant_early_exit", getattr(config, "assistant_early_exit", None))),
            beams=(kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1) > 1,
        )
        before = current.set((*current.get(), (model, call)))
        try:
            output = own(*args, **kwargs)
        finally:
            current.reset(before)
        call.end(output)
        return output

    return generate


def _generate_batch(model: Any, own: Any, hooked: Callable[[], Any], lend: Callable[[], Any]) -> Callable[..., Any]:
    def generate_batch(*args: Any, **kwargs: Any) -> Any:
        if not hooked():
            return own(*args, **kwargs)
        config = kwargs.get("continuous_batching_config", args[2] if len(args) > 2 else None)
        graphs = getattr(config, "use_cuda_graph", None)
        if model.device.type == "cuda" and graphs is not False:
            raise InputError(
                "generate_batch replays CUDA graphs, in which hooks do nothing: pass "
                "continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False)"
            )
        with lend():
            return own(*args, **kwargs)

    return generate_batch
