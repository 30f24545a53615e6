"""What an effect is compared with: random vectors of the same norm, isotropic or with the covariance of activations."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import neutral_texts
from persona_vectors.model.blocks import Model
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.passes import forward_passes
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.model.tokens import Tokens
from persona_vectors.vectors.vector import PersonaVector


def random_vector(
    vector: PersonaVector, *, seed: int, like: Float[Tensor, "sample layer hidden"] | None = None
) -> PersonaVector:
    """Return a control: a random direction at each layer, with the norm that `vector` has there.

    With `like`, activations of some texts, the directions have those activations' covariance: real activations vary far
    more along a few directions than along most, and directions that are as likely to point anywhere miss them.
    """
    generator = torch.Generator().manual_seed(seed)
    if like is None:
        noise = torch.randn(vector.directions.shape, generator=generator)
    else:
        centred = like.float() - like.float().mean(dim=0)
        noise = torch.einsum("s, s l h -> l h", torch.randn(len(like), generator=generator), centred)
    norms = vector.directions.norm(dim=1, keepdim=True)
    directions = noise / noise.norm(dim=1, keepdim=True) * norms
    return replace(vector._derived(f"random {seed}", directions))


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
