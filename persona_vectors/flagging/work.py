"""What a flagging run computes part by part, here or in Ray actors: base answers, and projections of samples."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.progress import bar
from persona_vectors.evaluation.served import Generate, served_answers
from persona_vectors.flagging.parts import part, read_table, write_table
from persona_vectors.flagging.store import Baselines
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_batches, stop_tokens
from persona_vectors.model.gradients import answer_gradients
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import pool
from persona_vectors.model.thoughts import kept_tokens, span_of
from persona_vectors.monitoring.trace import monitor
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.vector import PersonaVector

CACHED = 8
"""How many times as many tokens a batch of answers has as a forward pass: only their keys and values are kept."""


def answer_prompts(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[PersonaVector],
    model: Model,
    number: int,
    *,
    layer: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int,
    positions: str,
    generate: Generate | None,
) -> None:
    """Answer one part of the prompts, and write the answers with their mean projections; known ones are only read.

    With `generate` the answers come from there, and are known then.
    """
    todo = read_table(part(folder, "prompts", number))
    prompts, answers = todo["prompt_ids"], todo["answer_ids"]
    if generate is not None:
        there = {i for i, answer in enumerate(answers) if answer is not None}
        greedy: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "seed": 0}
        for served in served_answers(generate, model, tokenizer, prompts, skip=there, **greedy):
            for item in served:
                answers[item.row] = item.tokens
    open_ones = [i for i, answer in enumerate(answers) if answer is None]
    known = [i for i, answer in enumerate(answers) if answer is not None]
    units = unit_directions(model, vectors, layer)
    values = torch.full((len(prompts), len(vectors) * len(units)), torch.nan, dtype=torch.float32)
    if known:
        rows = [(prompts[i], answers[i]) for i in known]
        values[known] = answer_means(model, rows, _kept(tokenizer, rows, positions), units, batch_tokens)[0]
    stops = stop_tokens(model, tokenizer)
    batches = generate_batches(
        model,
        tokenizer,
        [prompts[i] for i in open_ones],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        batch_tokens=CACHED * batch_tokens,
        reading=True,
        during=lambda _: monitor(model, vectors, layer=layer, stops=stops),
    )
    with bar(desc="base answers", unit="answers", total=len(open_ones)) as shown:
        for batch in batches:
            chosen = [open_ones[i] for i in batch.rows]
            kept = _kept(tokenizer, [(prompts[i], ids) for i, (ids, _) in zip(chosen, batch.answers)], positions)
            read, begin = batch.read.last.values, batch.read.last.prompt_width
            for line, (i, (ids, _)) in enumerate(zip(chosen, batch.answers)):
                answers[i], values[i] = ids, read[:, line, [begin + place for place in kept[line]]].mean(dim=1)
            shown.update(len(chosen))
    columns = {"key": todo["key"], "answer_ids": answers, "values": values.numpy()}
    write_table(part(folder, "answers", number), columns)


def keep_answers(folder: Path, groups: int, reading: str, cache: Path | None) -> None:
    """Put the answers where the merge finds them, and into the cache."""
    for path in [folder / "baselines.sqlite", *([] if cache is None else [cache])]:
        with closing(Baselines(path)) as store:
            for number in range(groups):
                found = read_table(part(folder, "answers", number))
                store.add(reading, found["key"], found["answer_ids"], found["values"])


def project_rows(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    units: dict[int, Float[Tensor, "vector hidden"]],
    model: Model,
    number: int,
    *,
    score: str,
    batch_tokens: int,
    positions: str,
) -> None:
    """Read one part of the samples, and write their mean projections, and those of the prompts' last tokens."""
    table = read_table(part(folder, "rows", number))
    rows = list(zip(table["prompt_ids"], table["answer_ids"]))
    kept = _kept(tokenizer, rows, positions)
    if score == "gradient":
        gradients = answer_gradients(model, rows, kept=kept, layer=list(units), batch_tokens=batch_tokens)
        read = (_along(gradients, units), torch.full((len(rows), 1), torch.nan))
    else:
        read = answer_means(model, rows, kept, units, batch_tokens)
    write_table(part(folder, "values", number), dict(zip(("projection", "prompt_last"), (v.numpy() for v in read))))


def _kept(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], positions: str) -> list[list[int]]:
    """Return which tokens of each answer are averaged, from 0."""
    span = span_of(tokenizer, positions)
    return [kept_tokens(span, *row) for row in rows]


def answer_means(
    model: Model, rows: Sequence[Row], kept: Sequence[Sequence[int]], units: dict[int, Tensor], batch_tokens: int
) -> tuple[Float[Tensor, "row key"], Float[Tensor, "row key"]]:
    """Return the mean over the tokens kept of each answer, nan for none, and the values at each prompt's last token.

    Activations are averaged before they are projected: what hundreds of random directions cost does not grow with the
    tokens.
    """
    poolings = ("response_mean", "prompt_last")
    pooled = pool(model, rows, poolings=poolings, kept=kept, layer=list(units), batch_tokens=batch_tokens).means
    means, last = _along(pooled[:, 0], units), _along(pooled[:, 1], units)
    means[[not chosen for chosen in kept]] = torch.nan
    return means, last


def _along(read: Float[Tensor, "row layer hidden"], units: dict[int, Tensor]) -> Float[Tensor, "row key"]:
    return torch.cat([read[:, k] @ unit.T for k, unit in enumerate(units.values())], dim=1)
