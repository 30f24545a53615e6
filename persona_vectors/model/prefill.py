"""Prompts that answers share, and what prompts begin with, read once in a call of `generate`."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import Cache

from persona_vectors.data.progress import pulse
from persona_vectors.model.beginnings import Beginnings
from persona_vectors.model.blocks import Model, decoder_layers
from persona_vectors.model.passes import cache_argument
from persona_vectors.model.prompts import batch_tokens_for
from persona_vectors.model.wrappers import unwrap


@contextmanager
def shared_prompts(model: Model, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
    """Have the blocks read each distinct prompt once in the next call of `generate`, which has one row a prompt.

    What distinct prompts begin with is read once too, where it is long enough (`Beginnings`). Only inside the blocks
    are there fewer rows and tokens: hooks on them, and all that is around them, see every row, and the cache has every
    row in the end. From the first block on whose rows have been edited differently nothing is shared. Nor is it in
    models whose state cannot be.
    """
    model = unwrap(model)
    distinct: dict[tuple[int, ...], int] = {}
    lines = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt in prompts]
    begun = Beginnings(list(distinct))
    with ExitStack() as hooks:
        if (len(distinct) < len(prompts) or begun.shared) and can_take_rows(model):
            _Prefill(model, torch.tensor(lines), begun, hooks)
        yield


@contextmanager
def told_by_block(model: Model, tokens: int) -> Iterator[None]:
    """Say on the open progress bar how far the first pass is, where its prompts are long for this device."""
    model = unwrap(model)
    blocks = decoder_layers(model)
    with ExitStack() as hooks:
        if tokens > batch_tokens_for(model) and can_take_rows(model):
            for number in range(len(blocks)):
                tell = partial(pulse, f"reading prompts, block {number + 1} of {len(blocks)}")
                add_hook(hooks, blocks[number].register_forward_hook, lambda *_, tell=tell: tell())
            add_hook(hooks, model.get_decoder().register_forward_hook, lambda *_: hooks.close())
        yield


def can_take_rows(model: Any) -> bool:
    """Say whether hooks can give the model's blocks some of the rows alone: their cache and masks are by row."""
    masked = model.config._attn_implementation == "flex_attention"  # by what is no tensor
    modules = (model, model.get_decoder(), *decoder_layers(model))
    compiled = any(module._compiled_call_impl is not None for module in modules)  # anew for hooks that come and go
    return cache_argument(model) is not None and not masked and not compiled


class _Prefill:
    """The hooks on one call's first pass, after which they are gone."""

    def __init__(self, model: Any, lines: Int[Tensor, " row"], begun: Beginnings, hooks: ExitStack) -> None:
        self.lines, self.begun, self.hooks = lines, begun, hooks
        self.first = torch.tensor([lines.tolist().index(line) for line in range(int(lines.max()) + 1)])
        self.shared = True
        self.hidden: Tensor | None = None
        """What the last block gave to all rows."""
        add = partial(add_hook, hooks)
        add(model.get_decoder().register_forward_hook, self._end, with_kwargs=True)
        for block in decoder_layers(model):
            add(block.register_forward_pre_hook, self._before, with_kwargs=True)
            add(block.register_forward_hook, self._after, prepend=True)

    def _before(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """Give a block one row for each distinct prompt, and of what these begin with as little as can be."""
        hidden = args[0] if args else kwargs["hidden_states"]
        edited = hidden is not self.hidden
        if self.shared and edited:
            self.shared = torch.equal(hidden, _take(_take(hidden, self.first), self.lines))
        if not self.shared:
            self.begun.shared = False
            return None
        given = taken((args, kwargs), self.first, len(self.lines))
        return self.begun.before(block, given, edited) or given

    def _after(self, _block: nn.Module, _args: Any, output: Any) -> Any:
        """Give its output to all rows, before any other hook sees it."""
        if not self.shared:
            return None
        if self.begun.shared:
            output = self.begun.after(output)
        output = taken(output, self.lines, len(self.first))
        self.hidden = output[0] if isinstance(output, (tuple, list)) else output
        return output

    def _end(self, _decoder: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        for cache in (*args, *kwargs.values()):  # none, where the call keeps none
            if isinstance(cache, Cache):
                take_cache_rows(cache, self.lines, len(self.first))
        self.hooks.close()


def add_hook(hooks: ExitStack, register: Callable[..., Any], hook: Callable[..., Any], **options: bool) -> None:
    """Register a hook on this thread's passes alone, until `hooks` is closed."""
    thread = threading.get_ident()

    def own(*args: Any) -> Any:  # another thread's pass through the same model is none of ours
        return hook(*args) if threading.get_ident() == thread else None

    hooks.callback(register(own, **options).remove)


def take_cache_rows(cache: Any, rows: Tensor, count: int) -> None:
    """Have a cache of `count` rows hold these `rows` instead, each as often as it is named."""
    for layer in cache.layers:
        if layer.is_initialized and len(layer.keys) == count:
            layer.batch_select_indices(rows.to(layer.keys.device))


def _take(values: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    return values.index_select(dim, rows.to(values.device))


def taken(given: Any, rows: Tensor, count: int, name: str = "") -> Any:
    """Return arguments in which every tensor of `count` rows has these `rows` instead."""
    if isinstance(given, dict):
        return {key: taken(value, rows, count, str(key)) for key, value in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)([taken(value, rows, count, name) for value in given])
    if not isinstance(given, Tensor) or given.ndim < 2:
        return given
    dim = 1 if name == "position_ids" and given.ndim == 3 else 0  # a place for each axis of an image
    return _take(given, rows, dim) if given.shape[dim] == count else given
