"""What a forward pass is given, by name: the decoder's arguments, and those of the modules around it."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from persona_vectors.model.calls import call_of


def named(args: tuple, kwargs: dict[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """Return a module's arguments by name."""
    if not args:  # binding is slow
        return kwargs
    try:
        given = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError:  # a wrapper that passes everything on
        given = dict(kwargs)
    for name in [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]:
        given.update(given.pop(name, {}))
    return given


def merged(given: Mapping[str, Any], outer: Sequence[Mapping[str, Any]], chain: Sequence[nn.Module]) -> dict[str, Any]:
    """Return the decoder's arguments, with those that only the modules around it, `chain`, were given.

    A module around the decoder may turn a 2-D attention mask into another form, so the outermost one's counts, if
    it is as wide as the pass: an adapter's virtual tokens make it wider.
    """
    read: Tensor = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
    width = read.shape[1]

    def first(name: str) -> Any:
        return next((each[name] for each in outer if each.get(name) is not None), None)

    masks = (each.get("attention_mask") for each in (*outer, given))
    flat = (mask for mask in masks if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= width)
    text, ids = first("input_ids"), given.get("input_ids")
    if ids is None and text is not None and text.shape[:2] == read.shape[:2]:
        ids = text
    call = next((call for call in map(call_of, chain) if call is not None), None)
    caches = [each.get("cache", each.get("past_key_values", each.get("cache_params"))) for each in [*outer, given]]
    if call is None:  # an adapter's prefix is a cache that the caller did not give
        caches[1:] = []
    return {
        "input_ids": ids,
        "inputs_embeds": read,
        "text_width": text.shape[1] if ids is None and text is not None else None,
        "attention_mask": next(flat, given.get("attention_mask")),
        "labels": first("labels"),
        "position_ids": given.get("position_ids"),
        "cu_seq_lens_q": given.get("cu_seq_lens_q"),
        "paged": "write_index" in given,
        "cache": caches[-1],
        "call": call,
    }
