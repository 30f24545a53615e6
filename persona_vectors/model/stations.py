"""The hooks on a model: one on each module, shared by all edits that are open on it, in any thread."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GenerationMixin

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.model.calls import call_of, follow_calls
from persona_vectors.model.runs import Run, active, adapters, address_of, without

_lock = threading.RLock()
_stations: dict[int, "_Station"] = {}
_eager: list[Any] = []
"""The compiler's stance while any edit is open, nothing compiled, and the runs that are open."""


@contextmanager
def open_on(model: Any, run: Run) -> Iterator[None]:
    """Hook the model for a run: nothing is left of it afterwards."""
    with ExitStack() as stack:
        station = _enter(model, run)
        stack.callback(_leave, station, run)
        stack.callback(register_optimizer_step_pre_hook(run.before_step).remove)
        generator = next((module for module in station.chain if isinstance(module, GenerationMixin)), None)
        if generator is not None:
            calls = follow_calls(
                generator, hooked=station.runs, unhooked=lambda: without(station.runs()), lend=station.lend
            )
            stack.enter_context(calls)
        yield


def _enter(model: Any, run: Run) -> "_Station":
    with _lock:
        if not _eager:
            _eager.append(torch.compiler.set_stance("force_eager"))
        _eager.append(run)
        station = _stations.setdefault(id(run.decoder), _Station(run.decoder))
        station.add(model, run)
        return station


def _leave(station: "_Station", run: Run) -> None:
    with _lock:
        if station.remove(run):
            del _stations[id(run.decoder)]
        _eager.remove(run)
        if len(_eager) == 1:
            _eager.pop().__exit__(None, None, None)


class _Station:
    """The hooks on one decoder, its blocks and the modules around it."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.chain: list[nn.Module] = []
        """The decoder and the modules that contain it in the model that was hooked last, the outermost first."""
        self.open: list[Run] = []
        self.hooks: dict[nn.Module | int, Any] = {}
        self.signatures: dict[nn.Module, inspect.Signature] = {}
        self.local = threading.local()
        self.lent: tuple[Run, ...] = ()
        """Runs that the thread of continuous batching does, which has none of its own."""
        self.error: Exception | None = None
        self.encoder_decoder = False
        self.policy: tuple[Any, ...] | None = None
        """The adapters of the last training pass with gradients."""

    def add(self, model: Any, run: Run) -> None:
        """Hook what a run needs and other runs have not."""
        self.open.append(run)
        self.encoder_decoder = bool(model.config.is_encoder_decoder)
        path = next(name for name, module in model.named_modules() if module is self.decoder)
        names = [name for name, _ in model.named_modules() if name == "" or f"{path}.".startswith(f"{name}.")]
        self.chain = [model.get_submodule(name) for name in names]
        for module in self.chain:
            if module not in self.hooks:
                self.signatures[module] = inspect.signature(module.forward)
                self.hooks[module] = module.register_forward_pre_hook(self._before, with_kwargs=True)
        if -1 not in self.hooks:
            self.hooks[-1] = self.decoder.register_forward_hook(self._after)
        blocks = decoder_layers(model)
        for layer in run.edits.keys() - self.hooks.keys():  # ahead of transformers' lasting hooks, which capture states
            self.hooks[layer] = blocks[layer].register_forward_hook(self._block(layer), prepend=True)

    def remove(self, run: Run) -> bool:
        """Remove what only this run needs; returns whether none is left."""
        self.open.remove(run)
        needed = {layer for other in self.open for layer in other.edits}
        for key in [key for key in self.hooks if not self.open or (isinstance(key, int) and key not in {-1, *needed})]:
            self.hooks.pop(key).remove()
        return not self.open

    def runs(self) -> list[Run]:
        """Return this thread's runs on this model, the outermost first."""
        own = [run for run in active.get() if run.decoder is self.decoder]
        return own or list(getattr(self.local, "lent", ()))

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Lend this thread's runs to the passes of continuous batching, and raise here what they raised there."""
        self.lent, self.error = tuple(self.runs()), None
        try:
            yield
        finally:
            self.lent = ()
        if self.error is not None:
            raise self.error

    def _before(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Before a module around the decoder, or the decoder itself: take in what the pass reads."""
        if kwargs is None:  # another thread is about to take the hook away
            return None
        given = self._arguments(module, args, kwargs)
        if "write_index" in given and not active.get():
            self.local.lent = self.lent
        runs = self.runs()
        if not runs:
            for run in self.open:
                run.elsewhere = True
            return None
        if module is self.chain[0] or not hasattr(self.local, "outer"):
            self.local.outer = []
        if module is not self.decoder:
            if not self.encoder_decoder:  # there the modules around it are given the encoder's tokens
                self.local.outer.append(given)
            return None
        found = self._merged(given, self.local.outer)
        self.local.outer = []
        self._start(runs, found)
        if isinstance(kwargs.get("logits_to_keep"), int):  # a decoder that leaves out tokens nobody asked the logits of
            return args, {**kwargs, "logits_to_keep": 0}
        return None

    def _arguments(self, module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
        signature = self.signatures[module]
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:  # a wrapper that passes everything on
            given = dict(kwargs)
        for name in [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]:
            given.update(given.pop(name, {}))
        return given

    def _merged(self, given: dict[str, Any], outer: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the decoder's arguments, with those that only the modules around it were given.

        A module around the decoder may turn a 2-D attention mask into another form, so the outermost one's counts, if
        it is as wide as the pass: an adapter's virtual tokens make it wider.
        """
        read: Tensor = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        width = read.shape[1]

        def first(name: str) -> Any:
            return next((each[name] for each in outer if each.get(name) is not None), None)

        masks = [each.get("attention_mask") for each in [*outer, given]]
        flat = [mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= width]
        text, ids = first("input_ids"), given.get("input_ids")
        if ids is None and text is not None and text.shape[:2] == read.shape[:2]:
            ids = text
        call = next((call for call in map(call_of, self.chain) if call is not None), None)
        caches = [each.get("cache", each.get("past_key_values", each.get("cache_params"))) for each in [*outer, given]]
        if call is None:  # an adapter's prefix is a cache that the caller did not give
            caches[1:] = []
        return {
            "input_ids": ids,
            "inputs_embeds": read,
            "text_width": text.shape[1] if ids is None and text is not None else None,
            "attention_mask": flat[0] if flat else given.get("attention_mask"),
            "labels": first("labels"),
            "position_ids": given.get("position_ids"),
            "cu_seq_lens_q": given.get("cu_seq_lens_q"),
            "paged": "write_index" in given,
            "cache": caches[-1],
            "call": call,
            "training": self.decoder.training and call is None and self._is_policy(),
        }

    def _is_policy(self) -> bool:
        """Say whether the adapters are those that are trained: a reference of the same weights has others, or none."""
        if torch.is_grad_enabled():
            self.policy = adapters(self.chain[0])
            return True
        own = adapters(self.chain[0])
        return own[:1] != (True,) and self.policy in (None, own)

    def _start(self, runs: list[Run], found: dict[str, Any]) -> None:
        try:
            tokens = [run.tokens for run in runs]
            for place, run in enumerate(runs):
                run.start_pass(found, tokens[:place], tokens[place + 1 :])
        except InputError as error:
            self.error = error
            raise

    def _after(self, *_: Any) -> None:
        """At the end of a pass."""
        for run in self.runs():
            run.end_pass()
        self.local.lent = ()

    def _block(self, layer: int) -> Any:
        def hook(block: nn.Module, args: tuple, output: Any) -> Any:
            runs = [run for run in self.runs() if layer in run.edits]
            again = not runs and torch.is_grad_enabled() and block.training
            if again:  # in `backward`, whose threads on a GPU have no context, of a pass that was checkpointed
                runs = [run for run in self.open if (layer, address_of(args)) in run.read]
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            changed = False
            for run in runs:
                tokens = run.read[layer, address_of(args)] if again else run.start_block(layer, args)
                if tokens is None:
                    continue
                if hidden.ndim != 3 or hidden.shape[1] != tokens.width:
                    raise InputError(
                        f"block {layer} returns {list(hidden.shape)}, not [batch, token, hidden] of the pass's "
                        f"{tokens.width} tokens: not supported"
                    )
                edited = self._edit(run.edits[layer], hidden, tokens)
                if edited is not None:
                    tokens.edited.add(layer)
                    hidden, changed = edited, True
            if not changed:
                return None
            return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden

        return hook

    def _edit(self, edit: Any, hidden: Tensor, tokens: Any) -> Tensor | None:
        try:
            return edit(hidden, tokens)
        except InputError as error:
            self.error = error
            raise
