"""What is done to a model in each way of running it, beside a plain reference that is one plain hook."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from ways import TEXTS, Case, Seen

from persona_vectors.model.blocks import decoder_layers, model_shape
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.pooling import pool
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import RowEdit, steer, steer_rows
from persona_vectors.steering.bounds import cap
from persona_vectors.training.watch import penalize
from persona_vectors.vectors.vector import PersonaVector

LAYER, COEF, LIMIT = 1, 8.0, -1.0
Change = Callable[[Tensor, Seen], Tensor]


def vector(model: nn.Module) -> PersonaVector:
    directions = torch.randn(model_shape(model), generator=torch.Generator().manual_seed(1))
    return PersonaVector(trait="t", model="m", directions=directions)


def plain(model: nn.Module, seen: Seen, change: Change | None = None) -> tuple[Tensor, Tensor]:
    """Return block 1's output and the logits of one sequence alone, edited by a plain hook: [token, ...] each."""
    states, thread = [], threading.get_ident()

    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        if threading.get_ident() != thread:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        own = hidden[0, -len(seen.tokens) :]
        if change is not None:
            own = change(own, seen).to(hidden.dtype)
            hidden = torch.cat([hidden[:, : -len(seen.tokens)], own[None]], dim=1)
        states.append(own.detach().float())
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    was_training = model.training
    model.eval()
    handle = decoder_layers(model)[LAYER].register_forward_hook(hook)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            ids = torch.tensor([seen.tokens])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(seen.tokens) :]
    finally:
        handle.remove()
        model.train(was_training)
    return states[-1], logits.float()


def agrees(case: Case, seen: list[Seen], change: Change | None) -> None:
    """Check that what came out of each sequence is what the reference says, and is not what the plain model says."""
    moved = []
    for each in seen:
        _, logits = plain(case.model, each, change)
        _, without = plain(case.model, each)
        if each.logits is not None:
            torch.testing.assert_close(each.logits.float(), logits, rtol=case.tolerance, atol=case.tolerance)
        elif each.total is not None:
            scores = logits.log_softmax(-1)[range(each.prompt - 1, len(each.tokens) - 1), each.tokens[each.prompt :]]
            torch.testing.assert_close(scores.sum(), torch.tensor(each.total), rtol=case.tolerance, atol=case.tolerance)
        else:
            for place in range(each.prompt, len(each.tokens)):
                best = logits[place - 1].max()
                assert logits[place - 1, each.tokens[place]] >= best - case.tolerance, (each, place)
        moved.append((logits - without).abs().max() > 1e-3)
    assert change is None or any(moved)


def _edited(case: Case, edit: AbstractContextManager, change: Change) -> None:
    with edit:
        seen = case.run()
    agrees(case, seen, change)
    agrees(case, case.run(), None)


def _shift(case: Case, where: Callable[[Seen], Tensor], coefs: list[float] | None = None) -> Change:
    direction = vector(case.model).directions[LAYER]

    def change(hidden: Tensor, seen: Seen) -> Tensor:
        coef = COEF if coefs is None else coefs[seen.row]
        shifted = hidden + (coef * direction).to(hidden.dtype)
        return torch.where(where(seen)[:, None], shifted, hidden)

    return change


def _place(seen: Seen) -> Tensor:
    return torch.arange(len(seen.tokens)) - seen.prompt


def steer_at(positions: str) -> Callable[[Case], None]:
    where = {
        "all": lambda seen: torch.ones(len(seen.tokens), dtype=torch.bool),
        "prompt": lambda seen: _place(seen) < 0,
        "response": lambda seen: _place(seen) >= -1,
        "labels": lambda seen: _place(seen) >= -1,
    }[positions]

    def verb(case: Case) -> None:
        edit = steer(case.model, vector(case.model), layer=LAYER, coef=COEF, positions=positions, during="always")
        _edited(case, edit, _shift(case, where))

    return verb


def steer_mask(case: Case) -> None:
    """Every other token of the first pass."""
    shape = case.mask_shape or (case.rows, 5)
    mask = torch.arange(shape[0] * shape[1]).view(shape) % 2 == 0
    flat: dict[int, Tensor] = {}
    if case.labels is not None:
        lengths = [len(p) + len(a) for p, a in TEXTS]
        packed = mask[0].split(lengths) if shape[0] == 1 else [row[:n] for row, n in zip(mask, lengths)]
        flat = dict(enumerate(packed))
    edit = steer(case.model, vector(case.model), layer=LAYER, coef=COEF, positions=mask, during="always")
    _edited(case, edit, _shift(case, lambda seen: flat[seen.row]))


def rows(case: Case) -> None:
    v, coefs = vector(case.model), [COEF, -COEF, 0.5 * COEF][: case.rows]
    edit = steer_rows(case.model, [RowEdit(v, LAYER, coef) for coef in coefs])
    _edited(case, edit, _shift(case, lambda seen: torch.ones(len(seen.tokens), dtype=torch.bool), coefs))


def cap_at(case: Case) -> None:
    v = vector(case.model)
    unit = v.directions[LAYER] / v.directions[LAYER].norm()

    def change(hidden: Tensor, _: Seen) -> Tensor:
        excess = (hidden.float() @ unit - LIMIT).clamp(min=0)
        return hidden - (excess[:, None] * unit).to(hidden.dtype)

    _edited(case, cap(case.model, v, layer=LAYER, limit=LIMIT, during="always"), change)


def monitored(case: Case) -> None:
    v = vector(case.model)
    with monitor(case.model, v, layer=LAYER, stops=[]) as trace:
        seen = case.run()
    assert len(trace.calls) == 1, f"{len(trace.calls)} calls"
    beams = seen[0].beams
    values = trace["t"] if beams is None else trace.last.follow_beams(beams)["t"]
    assert len(values) == len(seen)
    for each, row in zip(seen, values):
        state, _ = plain(case.model, each)
        found = row[~row.isnan()]
        expected = v.project(state, layer=LAYER)[: len(found)]
        assert len(found) >= len(each.tokens) - 1
        torch.testing.assert_close(found, expected, rtol=10 * case.tolerance, atol=10 * case.tolerance)


def pooled(case: Case) -> None:
    """Means over finished texts, which we read ourselves, after the model has run in this way."""
    case.run()
    texts = [Seen([*p, *a], len(p), i) for i, (p, a) in enumerate(TEXTS)]
    found = pool(case.model, TEXTS, poolings=["response_mean", "prompt_mean", "prompt_last"])
    for each, means in zip(texts, found.means):
        state, _ = plain(case.model, each)
        answer, prompt = state[each.prompt :], state[: each.prompt]
        expected = torch.stack([answer.mean(0), prompt.mean(0), prompt[-1]])
        torch.testing.assert_close(means[:, LAYER], expected, rtol=10 * case.tolerance, atol=10 * case.tolerance)


def projected(case: Case) -> None:
    from persona_vectors.monitoring.projection import token_projections
    from persona_vectors.vectors.directions import unit_directions

    case.run()
    v = vector(case.model)
    for (p, a), read in zip(TEXTS, token_projections(case.model, TEXTS, unit_directions(case.model, [v], LAYER))):
        state, _ = plain(case.model, Seen([*p, *a], len(p), 0))
        expected = v.project(state, layer=LAYER)
        torch.testing.assert_close(read[:, 0], expected, rtol=10 * case.tolerance, atol=10 * case.tolerance)


def penalized(case: Case) -> None:
    """The loss of a training step is the plain one and the penalty; in this way where it trains, else afterwards."""
    case.run()
    v, model = vector(case.model), case.model
    trainer: Any = object.__new__(Trainer)
    trainer.model, trainer.current_gradient_accumulation_steps = model, 1
    was_training = model.training
    model.train()
    ids = torch.tensor([[*TEXTS[0][0], *TEXTS[0][1]]])
    labels = ids.clone()
    labels[:, : len(TEXTS[0][0])] = -100
    trainer.compute_loss = lambda m, inputs, return_outputs=False, num_items_in_batch=None: m(**inputs).loss
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    before = trainer.compute_loss
    with penalize(trainer, v, layer=LAYER, weight=2.0, target=0.5):
        loss = trainer.compute_loss(model, inputs)
    trainer.compute_loss = before
    state, _ = plain(model, Seen(ids[0].tolist(), len(TEXTS[0][0]), 0))
    values = v.project(state, layer=LAYER)[len(TEXTS[0][0]) :]
    expected = before(model, inputs) + 2.0 * ((values - 0.5) ** 2).mean()
    model.train(was_training)
    torch.testing.assert_close(loss.float(), expected.float(), rtol=10 * case.tolerance, atol=10 * case.tolerance)


def hooked_in_every_pass(case: Case) -> None:
    """The primitive itself: each pass runs the edit once, and all tokens that came out were read."""
    widths: list[int] = []
    with edit_blocks(case.model, {LAYER: lambda hidden, _: widths.append(hidden.shape[1])}):
        seen = case.run()
    longest = max(len(each.tokens) for each in seen)
    assert sum(widths) >= longest - 1


VERBS: dict[str, Callable[[Case], None]] = {
    "edit_blocks": hooked_in_every_pass,
    "steer, all": steer_at("all"),
    "steer, prompt": steer_at("prompt"),
    "steer, response": steer_at("response"),
    "steer, labels": steer_at("labels"),
    "steer, mask": steer_mask,
    "steer_rows": rows,
    "cap": cap_at,
    "monitor": monitored,
    "pool": pooled,
    "project": projected,
    "penalize": penalized,
}
