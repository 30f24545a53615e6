"""Log-probabilities of answers, each under an edit of its own."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Model
from persona_vectors.model.passes import Row, forward_passes, own_tokens, read_logits, read_pass
from persona_vectors.model.prompts import batch_tokens_for
from persona_vectors.model.tokens import answers_at
from persona_vectors.steering.add import RowEdit, steer_rows

IGNORED = -100
"""The target of a token that is not counted."""


def answer_logprobs(
    model: Model,
    rows: Sequence[Row],
    *,
    edits: Sequence[RowEdit | None] | None = None,
    desc: str = "reading answers",
) -> Float[Tensor, " row"]:
    """Return the mean log-probability of each row's answer tokens, in nats; nan for an empty answer.

    Edits that are active apply, with their own positions; `edits` steers each row besides. `desc` names the progress
    bar.
    """
    total = torch.zeros(len(rows), dtype=torch.float64)
    budget = batch_tokens_for(model) // 2  # logits take more memory than hidden states
    with torch.inference_mode(), bar(total=len(rows), desc=desc, unit="answer") as done:
        groups = None if edits is None else [None if e is None else (id(e.vector), *e[1:]) for e in edits]
        for step in forward_passes(model, rows, batch_tokens=budget, held_back=1, groups=groups):
            index = torch.tensor([members[0] for members in step.rows])
            prompts = [rows[row][0] for row in index]
            place = step.position - torch.tensor([[len(p)] for p in prompts], device=step.position.device)
            steered = steer_rows(model, [edits[row] for row in index]) if edits else nullcontext()
            with step.attempt, answers_at(place, prompts), steered:
                if not step.answers:
                    read_pass(model, step)
                    continue
                counted = place[:, 1:] >= 0
                begin = int((counted.any(dim=0).cumsum(dim=0) == 0).sum())  # what predicts prompts is not computed
                targets = step.inputs["input_ids"][:, begin + 1 :].masked_fill(~counted[:, begin:], IGNORED)
                targets = torch.nn.functional.pad(targets, (0, 1), value=IGNORED)  # the last token predicts none
                logits = read_logits(model, step, targets.shape[1]).float().flatten(0, 1)
                losses = torch.nn.functional.cross_entropy(
                    logits, targets.flatten(), ignore_index=IGNORED, reduction="none"
                ).view(targets.shape)
            if step.attempt.failed:
                continue
            total[index] -= losses.double().sum(dim=1).cpu()
            done.update(len(step.rows))
    count = torch.tensor([len(answer) for _, answer in rows], dtype=torch.float64)
    return (total / count).float()


def next_token_logprobs(
    model: Model, rows: Sequence[Row], *, edits: Sequence[RowEdit | None] | None = None
) -> list[Float[Tensor, " vocab"]]:
    """Return all tokens' log-probabilities after each row's answer, which may be empty; see `answer_logprobs`."""
    found = [torch.zeros(0)] * len(rows)
    groups = None if edits is None else [None if e is None else (id(e.vector), *e[1:]) for e in edits]
    with torch.inference_mode():
        for step in forward_passes(model, rows, held_back=1, groups=groups):
            index = [members[0] for members in step.rows]
            prompts = [rows[row][0] for row in index]
            begin = torch.tensor([[len(p)] for p in prompts], device=step.position.device)
            steered = steer_rows(model, [edits[row] for row in index]) if edits else nullcontext()
            with step.attempt, answers_at(step.position - begin, prompts), steered:
                if not step.answers:
                    read_pass(model, step)
                    continue
                logits = own_tokens(model(**step.inputs).logits, step)
                ends = step.position.argmax(dim=1)
                for line, row in enumerate(index):
                    found[row] = logits[line, ends[line]].float().log_softmax(dim=-1).cpu()
    return found
