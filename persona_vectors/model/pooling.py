"""Mean activations of prompts and answers at every layer, read in hooks: from finished text, or while generating."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_shape
from persona_vectors.model.hooks import EnoughRead, edit_blocks, edits_are_active
from persona_vectors.model.passes import Row, forward_passes, own_tokens, read_pass
from persona_vectors.model.tokens import Tokens

POOLINGS = ("response_mean", "prompt_mean", "prompt_last")


@dataclass
class Pooled:
    """Mean activations of some rows: the raw outputs of every decoder block, averaged in float32."""

    means: Float[Tensor, "row pooling layer hidden"]
    norms: Float[Tensor, "row layer"]
    """Mean norm of the answer tokens' residual stream."""


def pool(
    model: Model,
    rows: Sequence[Row],
    *,
    poolings: Sequence[str] = ("response_mean",),
    kept: Sequence[Sequence[int]] | None = None,
    layer: Layer = "all",
    batch_tokens: int | None = None,
) -> Pooled:
    """Return mean activations of finished rows at every `layer`, in as few forward passes of the decoder as can be.

    Nothing is computed above the deepest layer, unless other edits are active, and no logits; no hidden states are
    kept. `kept` says which tokens of each row's answer count, from 0; all of them unless it is given.
    """
    kept = [range(len(answer)) for _, answer in rows] if kept is None else kept
    layers = chosen_layers(layer, model_shape(model)[0])
    deepest = -1 if edits_are_active(model) else layers[-1]  # an edit further up would never run, and say so
    shape = (len(rows), len(poolings), len(layers), model_shape(model)[1])
    pooled = Pooled(*(torch.zeros(size, dtype=torch.float32) for size in (shape, (shape[0], shape[2]))))
    weights: Float[Tensor, "line pooling token"]
    sums: list[tuple[Tensor, Tensor]] = []

    def reader(index: int) -> Callable[[Tensor, Tokens], None]:
        def read(hidden: Tensor, _: Tokens) -> None:
            wide = own_tokens(hidden, step).float()
            here = weights.to(hidden.device)
            sums.append((here[:, :-1] @ wide, (here[:, -1] * wide.norm(dim=-1)).sum(dim=1)))
            if index == deepest:
                raise EnoughRead

        return read

    shown = bar(desc="activations", unit="answers", total=len(rows))
    with shown, edit_blocks(model, {index: reader(index) for index in layers}), torch.inference_mode():
        for step in forward_passes(model, rows, batch_tokens=batch_tokens):
            first = [(len(rows[members[0]][0]), kept[members[0]]) for members in step.rows]
            weights = token_weights(step.position, first, [*poolings, "response_mean"])
            sums.clear()
            with step.attempt, suppress(EnoughRead):
                read_pass(model, step)
            if step.attempt.failed:
                continue
            line = [i for i, members in enumerate(step.rows) for _ in members]
            target = torch.tensor([row for members in step.rows for row in members])
            pooled.means.index_add_(0, target, torch.stack([s.cpu() for s, _ in sums], dim=2)[line])
            pooled.norms.index_add_(0, target, torch.stack([n.cpu() for _, n in sums], dim=1)[line])
            if step.answers:
                shown.update(len(step.rows))
    return pooled


def token_weights(
    position: Tensor, rows: Sequence[tuple[int, Sequence[int]]], poolings: Sequence[str]
) -> Float[Tensor, "line pooling token"]:
    """Return the weight of each token in each pooling: all of a row's weights add up to 1, over all its passes.

    `rows` are the prompt's length and the answer's tokens that count, for each line.
    """
    prompt = torch.tensor([[length] for length, _ in rows], device=position.device)
    beyond = max(length + max(kept, default=0) + 1 for length, kept in rows)  # a column of zeros
    counted = torch.zeros(len(rows), beyond + 1, dtype=torch.float32)
    for line, (length, kept) in enumerate(rows):
        counted[line, [length + i for i in kept]] = 1 / max(len(kept), 1)
    in_prompt = (position >= 0) & (position < prompt)
    of = {
        "response_mean": counted.to(position.device).gather(1, position.clamp(max=beyond) % (beyond + 1)),
        "prompt_mean": in_prompt.float() / prompt,
        "prompt_last": (position == prompt - 1).float(),
    }
    return torch.stack([of[name] for name in poolings], dim=1)


class _Running:
    """Sums over the tokens of a batch of answers that is being generated."""

    def __init__(self, model: Model, poolings: Sequence[str], stops: Sequence[int]) -> None:
        self.poolings, self.stops, self.layers = poolings, stops, model_shape(model)[0]
        self.means: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.alive: Bool[Tensor, "line 1"] | None = None

    def read(self, layer: int, hidden: Tensor, tokens: Tokens) -> None:
        if not tokens.decoding:
            return self._read_prompt(layer, hidden, tokens)
        if layer == 0:
            assert tokens.input_ids is not None and self.alive is not None
            for stop in self.stops:
                self.alive = self.alive & (tokens.input_ids != stop)
            self.weight = self.alive.float()
            self.count += self.weight
        weight, state = self.weight.to(hidden.device), hidden[:, 0].float()
        self.norms[layer].addcmul_(torch.linalg.vector_norm(state, dim=1, keepdim=True), weight)
        if "response_mean" in self.poolings:
            self.means[layer][:, self.poolings.index("response_mean")].addcmul_(state, weight)

    def _read_prompt(self, layer: int, hidden: Tensor, tokens: Tokens) -> None:
        if layer == 0:
            self.means, self.norms = [], []
            self.alive = torch.ones(tokens.batch, 1, dtype=torch.bool, device=tokens.device)
            self.count = torch.zeros(tokens.batch, 1, device=tokens.device, dtype=torch.float32)
            real, answering = tokens.select("prompt"), tokens.select("response")
            assert real is not None and answering is not None
            last = real & answering
            shares = {"prompt_mean": real.float() / real.sum(dim=1, keepdim=True), "prompt_last": last.float()}
            nothing = torch.zeros_like(shares["prompt_last"])
            self.prompt_weights = torch.stack([shares.get(name, nothing) for name in self.poolings], dim=1)
        self.means.append(self.prompt_weights.to(hidden.device) @ hidden.float())
        self.norms.append(torch.zeros(hidden.shape[0], 1, device=hidden.device, dtype=torch.float32))

    def pooled(self) -> Pooled:
        """Return the means of the answers read so far."""
        count = self.count.clamp(min=1).cpu()
        means = torch.stack([mean.cpu() for mean in self.means], dim=2)
        if "response_mean" in self.poolings:
            means[:, self.poolings.index("response_mean")] /= count[:, None]
        return Pooled(means, torch.cat([norm.cpu() for norm in self.norms], dim=1) / count)


@contextmanager
def pool_while_generating(
    model: Model, *, stops: Sequence[int], poolings: Sequence[str] = ("response_mean",)
) -> Iterator[Callable[[], Pooled]]:
    """Average the activations of the answers that one cached `generate` call makes inside the `with`.

    Yields a function that returns the `Pooled` means once `generate` has returned. `stops` are the tokens that end an
    answer; they and what follows are left out. The last token that `generate` samples is never fed back, so it is not
    averaged: ask for one token more than you keep (`generate_tokens(reading=True)` does).
    """
    running = _Running(model, list(poolings), stops)

    def reader(layer: int) -> Callable[[Tensor, Tokens], None]:
        return lambda hidden, tokens: running.read(layer, hidden, tokens)

    with edit_blocks(model, {layer: reader(layer) for layer in range(running.layers)}):
        yield running.pooled
