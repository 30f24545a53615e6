"""The one hook primitive: edits of the decoder blocks' outputs, told which tokens they see."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, chosen_layers, decoder_layers
from persona_vectors.model.tokens import Tokens, active
from persona_vectors.model.wrappers import unwrap

DURING = ("auto", "training", "always")

Edit = Callable[[Float[Tensor, "batch token hidden"], Tokens], "Float[Tensor, 'batch token hidden'] | None"]


class EnoughRead(Exception):
    """Raised by an edit to end the forward pass at its block, and caught around the call: nothing above it is run."""


def edits_are_active() -> bool:
    """Say whether any edit is active now, paused ones left out."""
    return any(not tokens.paused for tokens in active)


@contextmanager
def pause_edits() -> Iterator[None]:
    """Suspend every edit that is active now, so that a judge reads the plain model inside a steered evaluation."""
    paused = [tokens for tokens in active if not tokens.paused]
    for tokens in paused:
        tokens.paused = True
    try:
        yield
    finally:
        for tokens in paused:
            tokens.paused = False


@contextmanager
def edit_blocks(model: Model, edits: Mapping[int, Edit], *, during: str = "always") -> Iterator[Tokens]:
    """Run `edits[k]` on the raw output of decoder block k in every forward pass inside the `with`.

    An edit is given the hidden states [batch, token, hidden] and the pass's `Tokens`; it returns new hidden states, or
    None where it only reads. The hooks are gone afterwards, also after an error. Works the same for blocks that return
    tensors or tuples, with and without a cache, in training with and without checkpointing, and when nested.

    `during`: "always"; "training", only passes in training mode with gradients; "auto", those alone as soon as there
    has been one, so that evaluation and generation inside a training run are left alone, and until then every pass.

    Raises InputError for a layer that the model lacks, and RuntimeError where a block never ran: at the end of the
    `with`, at the end of a training pass, or before an optimizer's step that no pass led to.
    """
    model = unwrap(model)
    if during not in DURING:
        raise InputError(f"during is {during!r}: give one of {', '.join(DURING)}")
    layers = decoder_layers(model)
    if edits:
        chosen_layers(edits, len(layers))
    eager = torch.compiler.disable  # hooks stay out of compiled graphs, where they would be frozen
    run = _Run(model, Tokens(), frozenset(edits), during)
    with ExitStack() as stack:
        active.append(run.tokens)
        stack.callback(active.remove, run.tokens)
        for handle in _follow_tokens(model, run):
            stack.callback(handle.remove)
        for layer, edit in edits.items():
            stack.callback(layers[layer].register_forward_hook(eager(_block_hook(layer, edit, run))).remove)
        stack.callback(model.get_decoder().register_forward_hook(eager(run.end_pass)).remove)
        stack.callback(register_optimizer_step_pre_hook(run.before_step).remove)
        yield run.tokens
        run.end()


class _Run:
    """What one `edit_blocks` knows over its passes: where it applies, and that its hooks fire."""

    def __init__(self, model: Model, tokens: Tokens, layers: frozenset[int], during: str) -> None:
        self.model, self.tokens, self.layers, self.during = model, tokens, layers, during
        self.fired: set[int] = set()
        """The blocks that have been hooked to some effect inside the `with`."""
        self.since_step: set[int] = set()
        """The same since the last optimizer step."""
        self.trained: Tokens | None = None
        """The last training pass's tokens."""
        self.read: dict[tuple[int, int], Tokens] = {}
        """The tokens of the training passes since the last step, by block and by the address of the block's input."""

    def start_pass(self, given: Mapping[str, Any]) -> None:
        self.tokens.start(given)
        if not self.tokens.training:
            return
        if self.during == "auto" and self.trained is None and self.fired:
            raise InputError(
                "this `with` has edited passes before its first training pass, and would leave such passes alone from "
                "now on: give during='training' to leave evaluation and generation alone, or during='always'"
            )
        self.trained = copy.copy(self.tokens)

    def start_block(self, layer: int, args: tuple) -> Tokens | None:
        """Return the tokens of the pass that a block runs in, or None where it is not to be edited."""
        tokens = self.tokens
        if self.trained is not None:
            address = args[0].data_ptr() if args and isinstance(args[0], Tensor) else 0
            if layer in tokens.fired:  # checkpointing runs the block again, in `backward`
                tokens = self.read.get((layer, address), self.trained)
            elif tokens.training:
                self.read[layer, address] = self.trained
        tokens.fired.add(layer)
        if not (tokens.training or self.during == "always" or (self.during == "auto" and self.trained is None)):
            return None
        self.fired.add(layer)
        self.since_step.add(layer)
        return tokens

    def end_pass(self, *_: Any) -> None:
        if self.tokens.training and not self.tokens.paused:
            self._check(self.tokens.fired, "in this training step")

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = {id(parameter) for parameter in self.model.parameters()}
        if not self.fired or any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            self._check(self.since_step, "before this optimizer step")
            self.since_step.clear()
            self.read.clear()

    def end(self) -> None:
        self._check(self.fired, "inside the `with`")

    def _check(self, fired: set[int], when: str) -> None:
        silent = sorted(self.layers - fired)
        if silent:
            raise RuntimeError(
                f"block {silent[0]} never ran {when}, so nothing was done there: "
                "call this same model object inside it, and not a compiled or copied one"
            )


def _block_hook(layer: int, edit: Edit, run: _Run) -> Callable:
    def hook(_block: nn.Module, args: tuple, output: Any) -> Any:
        if run.tokens.paused:
            return None
        tokens = run.start_block(layer, args)
        if tokens is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim != 3:
            raise InputError(f"block {layer} returns {list(hidden.shape)}, not [batch, token, hidden]: not supported")
        edited = edit(hidden, tokens)
        if edited is None:
            return None
        tokens.edited.add(layer)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


def _follow_tokens(model: Model, run: _Run) -> Iterator[Any]:
    """Hook the decoder, and the modules around it, so that `run.tokens` knows what each forward pass reads.

    A module around the decoder may turn a 2-D attention mask into another form, so the outermost one's counts.
    """
    tokens = run.tokens
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    around = [module for name, module in model.named_modules() if name == "" or f"{path}.".startswith(f"{name}.")]
    signatures = {module: inspect.signature(module.forward) for module in around}
    outer: dict[str, Any] = {}
    encoder_decoder = bool(model.config.is_encoder_decoder)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if tokens.paused:  # such a pass is none of the generation's that may be under way
            return
        signature = signatures[module]
        if module is around[0]:
            outer.clear()
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:  # a wrapper that passes everything on
            given = dict(kwargs)
        for name in [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]:
            given.update(given.pop(name, {}))
        found = {
            "input_ids": given.get("input_ids"),
            "inputs_embeds": given.get("inputs_embeds"),
            "attention_mask": given.get("attention_mask"),
            "labels": given.get("labels"),
            "cache": given.get("cache", given.get("past_key_values", given.get("cache_params"))),
        }
        if module is not decoder:
            if not encoder_decoder:  # there the modules around it are given the encoder's tokens
                outer.update({name: value for name, value in found.items() if value is not None and name not in outer})
            return
        mask = found["attention_mask"]
        if not (isinstance(mask, Tensor) and mask.ndim == 2):
            found["attention_mask"] = outer.get("attention_mask")
        if found["input_ids"] is None:
            found["input_ids"] = outer.get("input_ids")
        found["labels"] = outer.get("labels")
        found["training"] = module.training and torch.is_grad_enabled()
        outer.clear()
        run.start_pass(found)

    for module in around:
        yield module.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True)
