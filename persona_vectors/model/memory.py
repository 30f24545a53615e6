"""Batches that fit into memory: sized by what is free, and halved where it runs out all the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.devices import input_device
from persona_vectors.model.wrappers import unwrap

_known: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()
"""How many tokens a batch has at most, by model and kind of work, since memory ran out."""

SHARE = 0.6
"""How much of the free memory a batch of answers may take: allocators waste some, and others want theirs."""
WIDTH = 256
"""How many rows a batch of answers has at most: more are hardly faster on any device."""
CPU_WIDTH = 128
"""The same on a CPU, whose matrix products are at their best from a hundred rows on."""
UNKNOWN = 8192
"""How many tokens a batch of answers has at most on a device that does not say what is free."""


def longest_first(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the order in which rows are batched, whatever the batches' size: their indices, the longest row first."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]))


class Attempt:
    """Work in a `with` that may be too much for the memory: `failed` says so afterwards, and nothing is raised."""

    failed = False

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: TracebackType | None) -> bool:
        self.failed = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
        )
        return self.failed


class Budget:
    """How many tokens a batch of one kind of work has at most: fewer in this process once memory has run out."""

    def __init__(self, model: Model, work: str, tokens: int, *, width: int | None = None) -> None:
        self.work, self.given, self.width = work, tokens, width
        self.begun = 0
        """How many tokens, with their padding, have been given to the model."""
        self.known = _known.setdefault(unwrap(model), {})

    @property
    def tokens(self) -> int:
        """The most for now."""
        return min(self.given, self.known.get(self.work, self.given))

    def batches(self, rows: Sequence[Sequence[int]], extra: int = 0) -> Iterator[tuple[list[int], Attempt]]:
        """Yield batches of indices, longest rows first, with `extra` tokens a row; run each one in its attempt.

        Where that failed its rows come again, in batches of half its size, for which there is memory once the caller
        has let go of what the failed attempt made. Raises InputError where one row alone is too much.
        """
        order = longest_first(rows)
        while order:
            length = len(rows[order[0]]) + extra
            count = max(1, self.tokens // max(length, 1))
            batch, attempt = order[: min(count, self.width or count)], Attempt()
            yield batch, attempt
            if not attempt.failed:
                order = order[len(batch) :]
            elif len(batch) > 1:
                self.known[self.work] = len(batch) * length // 2
            else:
                raise InputError(
                    f"memory ran out in a batch of one row of {length} tokens: give shorter texts, a smaller "
                    "max_new_tokens, a smaller or quantised model, or a device with more memory"
                )


def answers_budget(
    model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_tokens: int | None = None
) -> Budget:
    """Return the budget of batches of prompts and answers: what the free memory holds, or `batch_tokens`."""
    if batch_tokens or not prompts:
        return Budget(model, "answers", batch_tokens or 1)
    device, prompt = input_device(model), max(map(len, prompts))
    width = CPU_WIDTH if device.type == "cpu" else WIDTH
    free, length = free_bytes(model), prompt + max_new_tokens
    tokens = UNKNOWN if free is None else max(int(SHARE * free / row_bytes(model, prompt, length)), 1) * length
    return Budget(model, "answers", tokens, width=width)


def free_bytes(model: Model) -> int | None:
    """Return how much memory is free for batches on the model's devices, or None where they do not say.

    Of several GPUs the fullest one counts for each: every one holds some of the layers.
    """
    devices = {p.device for p in unwrap(model).parameters() if p.device.type not in ("meta", "cpu")}
    if not devices:
        return host_free_bytes()
    if any(device.type != "cuda" for device in devices):
        return None
    unused = [torch.cuda.memory_reserved(each) - torch.cuda.memory_allocated(each) for each in devices]
    return len(devices) * min(torch.cuda.mem_get_info(each)[0] + own for each, own in zip(devices, unused))


def host_free_bytes(root: Path = Path("/")) -> int | None:
    """Return how much of the host's memory is free for this process, or None where the system does not say.

    That is what the machine has, and what each control group that holds the process, a container's or a cluster job's,
    has left: file pages that are given up on demand count as free in both.
    """
    found = [1024 * size for size in _sizes(root / "proc/meminfo", "MemAvailable:")]
    own = root / "proc/self/cgroup"
    for _, kinds, path in (line.split(":", 2) for line in (own.read_text().splitlines() if own.is_file() else [])):
        if kinds and "memory" not in kinds.split(","):
            continue
        names = ("memory/", "limit_in_bytes", "usage_in_bytes", "total_") if kinds else ("", "max", "current", "")
        mount = root / "sys/fs/cgroup" / names[0]
        group = mount / path.lstrip("/")
        for folder in (group, *(each for each in group.parents if each.is_relative_to(mount))):
            limit, used = (_sizes(folder / f"memory.{name}") for name in names[1:3])
            given_up = _sizes(folder / "memory.stat", f"{names[3]}inactive_file")
            found += [max(most - now + sum(given_up), 0) for most, now in zip(limit, used)]
    return min(found, default=None)


def _sizes(file: Path, name: str = "") -> list[int]:
    """Return the number after a name in a system's file, or the file's own, as a list of one; of none where none is."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    found = [line[1] if name else line[0] for line in lines if line and (not name or line[0] == name)]
    return [int(each) for each in found[:1] if each.isdigit()]


def row_bytes(model: Model, prompt: int, tokens: int) -> int:
    """Return about how much memory a row of `tokens`, the first `prompt` of them given, takes while it is answered.

    The keys and values of its tokens, those in a sliding window where attention is local; the logits of a step and the
    noise that samples from them; the activations of its prompt; and, off the CPU, the weights of the experts that
    transformers gathers for it in each step of a mixture of experts.
    """
    model = unwrap(model)
    config = model.config.get_text_config(decoder=True)
    reading = (
        prompt * (8 * _size(config, "hidden_size") + 3 * _size(config, "intermediate_size")) * model.dtype.itemsize
    )
    return cache_bytes(model, tokens) + 48 * config.vocab_size + reading + _gathered_bytes(model)


def cache_bytes(model: Model, tokens: int) -> int:
    """Return how large the keys and values of a row are."""
    model = unwrap(model)
    config, kinds = model.config.get_text_config(decoder=True), DynamicCache(config=model.config).layers
    layers = [layer for layer in kinds if isinstance(layer, DynamicLayer)]
    windows = [_size(layer, "sliding_window", tokens + 1) - 1 for layer in layers]
    kept = sum(min(tokens, window) for window in windows) if kinds else model_shape(model)[0] * tokens
    heads = _size(config, "num_attention_heads", 1)
    head = _size(config, "head_dim", _size(config, "hidden_size") // heads)
    each = 2 * head * _size(config, "num_key_value_heads", heads)
    if latent := _size(config, "kv_lora_rank"):  # compressed for all heads together
        each = latent + _size(config, "qk_rope_head_dim")
    return kept * each * model.dtype.itemsize


def _size(config: Any, name: str, default: int = 0) -> int:
    value = getattr(config, name, None)
    return max(value) if isinstance(value, (list, tuple)) else value or default


def _gathered_bytes(model: Any) -> int:
    """Return the size of the experts' weights that one token chooses in a block."""
    if model.device.type == "cpu":
        return 0
    config = model.config.get_text_config(decoder=True)
    stacks = [[p for p in module.parameters(recurse=False) if p.ndim == 3] for module in model.modules()]
    one = max((sum(p.nbytes // len(p) for p in stack) for stack in stacks if stack), default=0)
    return one * _size(config, "num_experts_per_tok", 8)
