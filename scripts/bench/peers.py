"""Other people's ways to read and edit activations: the paper's own procedure, repeng and steering-vectors."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding

from bench.measuring import Method
from persona_vectors.model.blocks import Model
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import POOLINGS
from persona_vectors.vectors.vector import PersonaVector

INSTALL = "not installed: python -m pip install scikit-learn && python -m pip install --no-deps"


def official(model: Model, rows: Sequence[Row]) -> dict[str, list[list[Tensor]]]:
    """Run the paper's procedure: batch 1, all hidden states, all logits, and the autograd graph.

    Returns, for each pooling and each entry of `hidden_states`, a list of one [1, hidden] CPU tensor a row.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers + 1
    pooled: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(layers)] for name in POOLINGS}
    for prompt, answer in rows:
        ids, n = torch.tensor([[*prompt, *answer]], device=model.device), len(prompt)
        outputs = model(input_ids=ids, output_hidden_states=True)
        for layer in range(layers):  # no names for the states, which would keep this row's graph during the next
            pooled["response_mean"][layer].append(outputs.hidden_states[layer][:, n:].mean(dim=1).detach().cpu())
            pooled["prompt_mean"][layer].append(outputs.hidden_states[layer][:, :n].mean(dim=1).detach().cpu())
            pooled["prompt_last"][layer].append(outputs.hidden_states[layer][:, n - 1].detach().cpu())
        del outputs
    return pooled


def official_projection(model: Model, rows: Sequence[Row], vector: PersonaVector, layer: int) -> None:
    """Project as eval/cal_projection.py does: batch 1, all hidden states, all logits."""
    for prompt, answer in rows:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
        mean, last = hidden[:, len(prompt) :].mean(dim=1).detach().cpu(), hidden[:, len(prompt) - 1].detach().cpu()
        vector.project(mean, layer=layer), vector.project(last, layer=layer)
        del hidden


class Pretokenized:
    """Stands in for the tokenizer of libraries that want texts: the text "7" is row 7, padded on the right."""

    pad_token_id = 0

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [torch.tensor([*prompt, *answer]) for prompt, answer in rows]
        self.texts = [str(index) for index in range(len(rows))]

    def __call__(self, texts: Sequence[str], **_: Any) -> BatchEncoding:
        rows = [self.rows[int(text)] for text in texts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return BatchEncoding({"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask})


def alias_numpy() -> None:
    """Set the name that NumPy 2 dropped and repeng 0.4.0 has in its annotations."""
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore


def repeng(model: Model, rows: Sequence[Row]) -> Method:
    """Return repeng's reading of hidden states, with its own batch size and its own choice of layers."""
    name, does = "repeng 0.4.0", "the last token's state only; batches of 32, all hidden states, all logits"
    alias_numpy()
    try:
        from repeng.extract import batched_get_hiddens
    except ImportError:
        return Method(name, f"{INSTALL} repeng==0.4.0", rows)
    layers = list(range(-1, -model.config.get_text_config(decoder=True).num_hidden_layers, -1))

    def run(rows: Sequence[Row]) -> None:
        tokenizer = Pretokenized(rows)
        with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            batched_get_hiddens(model, tokenizer, tokenizer.texts, layers, 32)

    return Method(name, does, rows, run, theirs=True)


def steering_vectors(model: Model, rows: Sequence[Row]) -> Method:
    """Return steering-vectors' training: rows in turn stand for positive and negative texts."""
    name, does = (
        "steering-vectors 0.12.2",
        "the last token's state only; batches of 1, a copy of every state, all logits",
    )
    try:
        from steering_vectors import train_steering_vector
    except ImportError:
        return Method(name, f"{INSTALL} steering-vectors==0.12.2", rows)

    def run(rows: Sequence[Row]) -> None:
        tokenizer: Any = Pretokenized(rows)
        train_steering_vector(model, tokenizer, list(zip(tokenizer.texts[::2], tokenizer.texts[1::2])))

    return Method(name, does, rows[: len(rows) // 2 * 2], run, theirs=True)


@contextlib.contextmanager
def by_repeng(model: Model, layer: int, shift: Tensor) -> Iterator[None]:
    """Add `shift` at a layer inside the `with`, as repeng does."""
    alias_numpy()
    from repeng import ControlModel, ControlVector

    wrapped = ControlModel(model, [layer])
    try:
        wrapped.set_control(ControlVector("any", {layer: shift.numpy()}))
        yield
    finally:
        wrapped.unwrap()


def by_steering_vectors(model: Model, layer: int, shift: Tensor) -> Any:
    """Return the context manager that adds `shift` at a layer, as steering-vectors does."""
    from steering_vectors import SteeringVector

    return SteeringVector({layer: shift.to(model.device)}, "decoder_block").apply(model)
