"""What an effect is compared with: random vectors of the same norm, and the band of prompts that mean the same."""

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.files import InputError
from persona_vectors.evaluation.likelihood import DATA, neutral_texts
from persona_vectors.model.activations import forward_passes
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.models import Model, chat_prompt, encode_answer
from persona_vectors.model.tokens import Tokens
from persona_vectors.vectors.vector import PersonaVector, random_vector


def assistant_prompts() -> list[str]:
    """Return thirty ways to say "You are a helpful assistant.", and first the empty one.

    They mean the same, so how far they move a score is the band within which an effect is noise.
    """
    return json.loads((DATA / "assistants.json").read_text(encoding="utf-8"))


def covariance_vectors(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    *,
    layers: Sequence[int],
    count: int,
    seed: int = 0,
    texts: Sequence[tuple[str, str]] | None = None,
) -> list[PersonaVector]:
    """Return random vectors with the covariance of real activations, and the norm that `vector` has at each layer.

    Each is a sum of the centred activations of the answer tokens of `texts` (questions and answers; by default on
    plain facts), weighted with independent normal numbers. Other layers than `layers` are zero. Such a direction lies
    in the few dimensions that activations use, and can move a model further than one drawn from all of them.
    """
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, q), a) for q, a in texts or neutral_texts()]
    generator = torch.Generator().manual_seed(seed)
    sums = {layer: torch.zeros(count, vector.directions.shape[1], dtype=torch.float64) for layer in layers}
    means = {layer: torch.zeros(vector.directions.shape[1], dtype=torch.float64) for layer in layers}
    weights, real, total, tokens = torch.zeros(0), torch.zeros(0), torch.zeros(count, dtype=torch.float64), 0

    def reader(layer: int):
        def read(hidden: Tensor, _: Tokens) -> None:
            states = hidden[real.to(hidden.device)].double().cpu()
            sums[layer] += weights @ states
            means[layer] += states.sum(dim=0)

        return read

    with edit_blocks(model, {layer: reader(layer) for layer in layers}), torch.inference_mode():
        for step in forward_passes(model, rows):
            prompts = torch.tensor([[len(rows[members[0]][0])] for members in step.rows])
            real = step.position.cpu() >= prompts
            weights = torch.randn(count, int(real.sum()), generator=generator, dtype=torch.float64)
            total, tokens = total + weights.sum(dim=1), tokens + weights.shape[1]
            model.get_decoder()(**step.inputs)
    if tokens < 2:
        raise InputError("covariance_vectors needs answers of two tokens or more, to vary")
    directions = torch.zeros(count, *vector.directions.shape)
    for layer in layers:
        drawn = sums[layer] - total[:, None] * means[layer] / tokens
        norms = vector.direction(layer).double().norm() / drawn.norm(dim=1, keepdim=True)
        directions[:, layer] = (drawn * norms).float()
    control = random_vector(vector, seed=seed)
    return [replace(control, trait=f"covariance {i}", directions=each) for i, each in enumerate(directions)]


def random_vectors(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    *,
    layers: Sequence[int],
    count: int,
    seed: int = 0,
) -> list[PersonaVector]:
    """Return controls of the same norm: half isotropic, half with the covariance of real activations."""
    isotropic = [random_vector(vector, seed=seed + i) for i in range(count - count // 2)]
    return isotropic + covariance_vectors(model, tokenizer, vector, layers=layers, count=count // 2, seed=seed)
