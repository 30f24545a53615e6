"""What a flagging run computes part by part, here or in Ray actors: base answers, and projections of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.flagging.parts import part, read_table, write_table
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import CACHED, generate_batches, stop_tokens
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.monitoring.trace import monitor
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.vector import PersonaVector


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
) -> None:
    """Answer one part of the prompts, and write the answers with their mean projections; known ones are only read."""
    todo = read_table(part(folder, "prompts", number))
    prompts, answers = todo["prompt_ids"], todo["answer_ids"]
    open_ones = [i for i, answer in enumerate(answers) if answer is None]
    known = [i for i, answer in enumerate(answers) if answer is not None]
    units = unit_directions(model, vectors, layer)
    values = torch.full((len(prompts), len(vectors) * len(units)), torch.nan, dtype=torch.float32)
    if known:
        rows = [(prompts[i], answers[i]) for i in known]
        values[known] = answer_means(model, rows, units, batch_tokens)[0]
    stops = stop_tokens(model, tokenizer)
    for batch in generate_batches(
        model,
        tokenizer,
        [prompts[i] for i in open_ones],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        batch_tokens=CACHED * batch_tokens,
        reading=True,
        during=lambda _: monitor(model, vectors, layer=layer, stops=stops),
    ):
        chosen = [open_ones[i] for i in batch.rows]
        values[chosen] = torch.stack(list(batch.read.mean.values()), dim=1)
        for i, (ids, _) in zip(chosen, batch.answers):
            answers[i] = ids
    columns = {"key": todo["key"], "answer_ids": answers, "values": values.tolist()}
    write_table(part(folder, "answers", number), columns)


def project_rows(
    folder: Path, units: dict[int, Float[Tensor, "vector hidden"]], batch_tokens: int, model: Model, number: int
) -> None:
    """Read one part of the samples, and write their mean projections, and those of the prompts' last tokens."""
    rows = read_table(part(folder, "rows", number))
    read = answer_means(model, list(zip(rows["prompt_ids"], rows["answer_ids"])), units, batch_tokens)
    write_table(part(folder, "values", number), dict(zip(("projection", "prompt_last"), (v.tolist() for v in read))))


def answer_means(
    model: Model, rows: Sequence[Any], units: dict[int, Tensor], batch_tokens: int
) -> tuple[Float[Tensor, "row key"], Float[Tensor, "row key"]]:
    """Return the mean over each answer's tokens, nan for an empty one, and the values at each prompt's last token."""
    tokens = token_projections(model, rows, units, batch_tokens=batch_tokens)
    ends = [len(prompt) for prompt, _ in rows]
    means = [values[end:].mean(dim=0) for values, end in zip(tokens, ends)]
    return torch.stack(means), torch.stack([values[end - 1] for values, end in zip(tokens, ends)])
