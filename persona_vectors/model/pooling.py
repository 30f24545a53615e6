"""Mean activations of prompts and answers at every layer, read in hooks: from finished text, or while generating."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_shape
from persona_vectors.model.hooks import EnoughRead, edit_blocks, edits_are_active
from persona_vectors.model.passes import Row, forward_passes, own_tokens, read_pass
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.model.reads import enough, read_blocks
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
            means = torch.stack([s.cpu() for s, _ in sums], dim=2)[line]
            if "prompt_mean" in poolings:  # of prompts that only begin alike, and differ in length
                shares = torch.tensor(
                    [first[i][0] / max(len(rows[row][0]), 1) for i, row in zip(line, target.tolist())]
                )
                means[:, poolings.index("prompt_mean")] *= shares[:, None, None]
            pooled.means.index_add_(0, target, means)
            pooled.norms.index_add_(0, target, torch.stack([n.cpu() for _, n in sums], dim=1)[line])
            if step.answers:
                shown.update(len(step.rows))
    return pooled


def prompt_states(
    model: Model, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]
) -> Float[Tensor, "question layer hidden"]:
    """Return the state at the last token of each question's prompt, before an answer begins."""
    rows: list[Row] = [(encode(tokenizer, chat_prompt(tokenizer, question)), []) for question in questions]
    return pool(model, rows, poolings=("prompt_last",)).means[:, 0]


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

    def __init__(self, poolings: Sequence[str], stops: Sequence[int]) -> None:
        self.poolings, self.stops = poolings, stops
        self.prompts: list[Float[Tensor, "layer line pooling hidden"]] = []
        self.sums: dict[int, Float[Tensor, "layer line hidden"]] = {}
        """The answers' sums, by the first of the layers that are read together."""
        self.norms: dict[int, Float[Tensor, "layer line"]] = {}
        self.waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}
        """The outputs of decoding steps that are not in the sums yet, with 1 for each line that had not ended."""
        self.alive: Float[Tensor, "line 1"]
        self.count: Float[Tensor, "line 1"]

    def read(self, layers: Sequence[int], states: Float[Tensor, "layer line token hidden"], tokens: Tokens) -> None:
        first = layers[0]
        if not tokens.decoding:
            return self._read_prompt(first, states, tokens)
        if first == 0:
            assert tokens.input_ids is not None
            for stop in self.stops:
                self.alive = self.alive * (tokens.input_ids != stop)
            self.count += self.alive
        steps = self.waiting.setdefault(first, [])
        steps.append((states[:, :, -1:], self.alive))
        if tokens.kept is None or enough(steps, states):
            self._sum(first)

    def _sum(self, first: int) -> None:
        """Add the steps that wait to the sums."""
        parts, alive = zip(*self.waiting.pop(first))
        states = torch.cat(parts, dim=2).float()
        counted = torch.cat(alive, dim=1).to(states.device)
        norms = (torch.linalg.vector_norm(states, dim=-1) * counted).sum(dim=2)
        self.norms[first] = norms + self.norms[first] if first in self.norms else norms
        if "response_mean" in self.poolings:
            sums = (states * counted[..., None]).sum(dim=2)
            self.sums[first] = sums + self.sums[first] if first in self.sums else sums

    def _read_prompt(self, first: int, states: Tensor, tokens: Tokens) -> None:
        if first == 0:
            self.prompts, self.sums, self.norms, self.waiting = [], {}, {}, {}
            self.alive = torch.ones(tokens.batch, 1, device=tokens.device, dtype=torch.float32)
            self.count = torch.zeros_like(self.alive)
            real, answering = tokens.select("prompt"), tokens.select("response")
            assert real is not None and answering is not None
            last = real & answering
            shares = {"prompt_mean": real.float() / real.sum(dim=1, keepdim=True), "prompt_last": last.float()}
            nothing = torch.zeros_like(shares["prompt_last"])
            self.prompt_weights = torch.stack([shares.get(name, nothing) for name in self.poolings], dim=1)
        self.prompts.append(self.prompt_weights.to(states.device) @ states.float())

    def pooled(self) -> Pooled:
        """Return the means of the answers read so far."""
        for first in list(self.waiting):
            self._sum(first)
        means = torch.cat([each.cpu() for each in self.prompts]).permute(1, 2, 0, 3)
        norms = torch.zeros(len(means), means.shape[2], dtype=torch.float32)
        count = self.count.clamp(min=1).cpu()
        for first, summed in self.norms.items():
            here = slice(first, first + len(summed))
            norms[:, here] = summed.cpu().T / count
            if "response_mean" in self.poolings:
                mean = self.sums[first].cpu() / count
                means[:, self.poolings.index("response_mean"), here] = mean.transpose(0, 1)
        return Pooled(means, norms)


@contextmanager
def pool_while_generating(
    model: Model, *, stops: Sequence[int], poolings: Sequence[str] = ("response_mean",)
) -> Iterator[Callable[[], Pooled]]:
    """Average the activations of the answers that one cached `generate` call makes inside the `with`.

    Yields a function that returns the `Pooled` means once `generate` has returned. `stops` are the tokens that end an
    answer; they and what follows are left out. The last token that `generate` samples is never fed back, so it is not
    averaged: ask for one token more than you keep (`generate_tokens(reading=True)` does).
    """
    running = _Running(list(poolings), stops)
    with read_blocks(model, range(model_shape(model)[0]), running.read):
        yield running.pooled
