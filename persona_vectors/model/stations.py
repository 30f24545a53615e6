"""The hooks on a model: one on each module, shared by all edits that are open on it, in any thread."""

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import GenerationMixin

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.model.calls import follow_calls
from persona_vectors.model.given import merged, named
from persona_vectors.model.runs import Edit, Run, active, adapters, address_of, without
from persona_vectors.model.tokens import Tokens

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


Edits = dict[int, list[tuple[Run, Tokens, Edit]]]
_Known = tuple[tuple[Run, ...], Edits, dict[int, Tokens]]


class _Local(threading.local):
    """What a station knows of one thread."""

    def __init__(self) -> None:
        self.outer: list[dict[str, Any]] = []
        """What the modules around the decoder were given in the running pass."""
        self.lent: tuple[Run, ...] = ()
        self.edits: _Known = (), {}, {}
        """The thread's active runs, what is done at each layer while they are these, and whose tokens' `simply_kept`
        a layer's output may be put in, since nothing else is done there."""


class _Station:
    """The hooks on one decoder, its blocks and the modules around it."""

    def __init__(self, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.chain: list[nn.Module] = []
        """The decoder and the modules that contain it in the model that was hooked last, the outermost first."""
        self.open: list[Run] = []
        self.hooks: dict[nn.Module | int, Any] = {}
        self.signatures: dict[nn.Module, inspect.Signature] = {}
        self.local = _Local()
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
        return own or list(self.local.lent)

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
        given = named(args, kwargs, self.signatures[module])
        if "write_index" in given and not active.get():
            self.local.lent = self.lent
        runs = self.runs()
        if not runs:
            for run in self.open:
                run.elsewhere = True
            return None
        if module is self.chain[0]:
            self.local.outer = []
        if module is not self.decoder:
            if not self.encoder_decoder:  # there the modules around it are given the encoder's tokens
                self.local.outer.append(given)
            return None
        found = merged(given, self.local.outer, self.chain)
        found["training"] = self.decoder.training and found["call"] is None and self._is_policy()
        self.local.outer = []
        self._start(runs, found)
        if isinstance(kwargs.get("logits_to_keep"), int):  # a decoder that leaves out tokens nobody asked the logits of
            return args, {**kwargs, "logits_to_keep": 0}
        return None

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

    def _find_edits(self) -> _Known:
        """Find this thread's edits at each layer, which are the same until others are active."""
        found: Edits = {}
        for run in self.runs():
            for layer, edit in run.edits.items():
                found.setdefault(layer, []).append((run, run.tokens, edit))
        alone = {layer: here[0] for layer, here in found.items() if len(here) == 1}
        keeps = {layer: tokens for layer, (run, tokens, _) in alone.items() if layer < max(run.edits)}
        self.local.edits = active.get() or self.local.lent, found, keeps
        return self.local.edits

    def _block(self, layer: int) -> Any:
        local = self.local

        def hook(block: nn.Module, args: tuple, output: Any) -> Any:
            known, edits, alone = local.edits
            if known is not (active.get() or local.lent):
                _, edits, alone = self._find_edits()
            if layer in alone and (kept := alone[layer].simply_kept) is not None:
                kept[layer] = output
                return None
            found, again = edits.get(layer), None
            if found is None:
                if not (torch.is_grad_enabled() and block.training):
                    return None
                # in `backward`, whose threads on a GPU have no context, of a pass that was checkpointed
                key = layer, address_of(args)
                found = again = [(run, run.read[key], run.edits[layer]) for run in self.open if key in run.read]
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            changed = False
            for run, tokens, edit in found:
                if run.trained is None:
                    tokens.fired.add(layer)
                elif found is not again:
                    tokens = run.start_trained_block(tokens, layer, args)
                if not tokens.applies:
                    continue
                shape = hidden.shape
                if len(shape) != 3 or shape[1] != tokens.width:
                    raise InputError(
                        f"block {layer} returns {list(shape)}, not [batch, token, hidden] of the pass's "
                        f"{tokens.width} tokens: not supported"
                    )
                try:
                    edited = edit(hidden, tokens)
                except InputError as error:
                    self.error = error
                    raise
                if edited is not None:
                    tokens.edited.add(layer)
                    hidden, changed = edited, True
            if not changed:
                return None
            return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden

        return hook
