"""The one hook primitive: edits of the decoder blocks' outputs, told which tokens they see."""

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from persona_vectors.files import InputError
from persona_vectors.models import Model, decoder_layers

POSITIONS = ("all", "prompt", "response")


class Tokens:
    """What the running forward pass reads: which tokens are padding, and which belong to the answer.

    The first pass, and every pass of several tokens, reads a prompt; passes of one token that continue a cache read
    the answer. Without a cache each pass reads everything so far, and the first one's width is the prompt's.
    """

    def __init__(self) -> None:
        self.input_ids: Tensor | None = None
        self.mask: Tensor | None = None
        """[batch, token], True for real tokens; None where all are."""
        self.batch = self.width = 0
        self.device = torch.device("cpu")
        self.decoding = False
        """True where the pass reads one answer token a row from a cache."""
        self.starts = False
        """True where the pass begins with a prompt; False where it continues the last one, with a cache or without."""
        self.edited: set[int] = set()
        """The blocks whose output has been replaced by these edits."""
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
        self.input_ids = ids
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
        same = [t for t in _active if t is self or (t.input_ids is self.input_ids and not t.paused)]
        return same[: same.index(self)], same[same.index(self) + 1 :]

    def _find(self, positions: str) -> Tensor | None:
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


def _holds_tokens(cache: Any) -> bool:
    try:
        return cache.get_seq_length() > 0
    except (AttributeError, ValueError, TypeError):  # caches of state-space models count no tokens
        return False


Edit = Callable[[Float[Tensor, "batch token hidden"], Tokens], "Float[Tensor, 'batch token hidden'] | None"]


_active: list[Tokens] = []
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


@contextmanager
def pause_edits() -> Iterator[None]:
    """Suspend every edit that is active now, so that a judge reads the plain model inside a steered evaluation."""
    paused = [tokens for tokens in _active if not tokens.paused]
    for tokens in paused:
        tokens.paused = True
    try:
        yield
    finally:
        for tokens in paused:
            tokens.paused = False


@contextmanager
def edit_blocks(model: Model, edits: Mapping[int, Edit]) -> Iterator[Tokens]:
    """Run `edits[k]` on the raw output of decoder block k in every forward pass inside the `with`.

    An edit is given the hidden states [batch, token, hidden] and the pass's `Tokens`; it returns new hidden states, or
    None where it only reads. The hooks are gone afterwards, also after an error. Works the same for blocks that return
    tensors or tuples, with and without a cache, in training, and when nested.

    Raises InputError for a layer that the model lacks, and RuntimeError where a block never ran.
    """
    layers = decoder_layers(model)
    for layer in edits:
        if not isinstance(layer, int) or not 0 <= layer < len(layers):
            raise InputError(f"layer {layer} is out of range: this model has layers 0 to {len(layers) - 1}")
    tokens, fired = Tokens(), set[int]()
    with ExitStack() as stack:
        _active.append(tokens)
        stack.callback(_active.remove, tokens)
        for handle in _follow_tokens(model, tokens):
            stack.callback(handle.remove)
        for layer, edit in edits.items():
            hook = _block_hook(layer, edit, tokens, fired)
            stack.callback(layers[layer].register_forward_hook(hook).remove)
        yield tokens
        silent = sorted(set(edits) - fired)
        if silent:
            raise RuntimeError(
                f"block {silent[0]} never ran inside the `with`, so nothing was done there: "
                "call this same model object inside it, and not a compiled or copied one"
            )


def _block_hook(layer: int, edit: Edit, tokens: Tokens, fired: set[int]) -> Callable:
    def hook(_block: nn.Module, _args: Any, output: Any) -> Any:
        if tokens.paused:
            return None
        fired.add(layer)
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.ndim != 3:
            raise InputError(f"block {layer} returns {list(hidden.shape)}, not [batch, token, hidden]: not supported")
        edited = edit(hidden, tokens)
        if edited is None:
            return None
        tokens.edited.add(layer)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


def _follow_tokens(model: Model, tokens: Tokens) -> Iterator[Any]:
    """Hook the decoder, and the modules around it, so that `tokens` knows what each forward pass reads.

    A module around the decoder may turn a 2-D attention mask into another form, so the outermost one's counts.
    """
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
        outer.clear()
        tokens.start(found)

    for module in around:
        yield module.register_forward_pre_hook(before, with_kwargs=True)
