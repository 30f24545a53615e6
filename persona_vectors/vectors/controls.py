"""What an effect is compared with: random vectors of the same norm, and the best score that chance gives them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.data.texts import neutral_texts
from persona_vectors.model.blocks import Layer, Model, chosen_layers
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.passes import forward_passes, own_tokens, read_pass
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
        noise = torch.randn(vector.directions.shape, generator=generator, dtype=torch.float32)
    else:
        centred = like.float() - like.float().mean(dim=0)
        weights = torch.randn(len(like), generator=generator, dtype=torch.float32)
        noise = einsum(weights, centred, "sample, sample layer hidden -> layer hidden")
    norms = vector.directions.norm(dim=1, keepdim=True)
    directions = noise / noise.norm(dim=1, keepdim=True) * norms
    return replace(vector._derived(f"random {seed}", directions))


def covariance_vectors(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    *,
    layer: Layer,
    count: int,
    seed: int = 0,
    texts: Sequence[tuple[str, str]] | None = None,
) -> list[PersonaVector]:
    """Return random vectors with the covariance of real activations, and the norm that `vector` has at each layer.

    Each is a sum of the centred activations of the answer tokens of `texts` (questions and answers; by default on
    plain facts), weighted with independent normal numbers. Other layers than `layer` are zero. Such a direction lies
    in the few dimensions that activations use, and can move a model further than one drawn from all of them.
    """
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, q), a) for q, a in texts or neutral_texts()]
    generator = torch.Generator().manual_seed(seed)
    layers = chosen_layers(layer, len(vector.directions))
    sums = {index: torch.zeros(count, vector.directions.shape[1], dtype=torch.float64) for index in layers}
    means = {index: torch.zeros(vector.directions.shape[1], dtype=torch.float64) for index in layers}
    weights, real, total, tokens = torch.zeros(0), torch.zeros(0), torch.zeros(count, dtype=torch.float64), 0

    def reader(index: int) -> Callable[[Tensor, Tokens], None]:
        def read(hidden: Tensor, _: Tokens) -> None:
            states = own_tokens(hidden, step)[real.to(hidden.device)].double().cpu()
            sums[index] += weights @ states
            means[index] += states.sum(dim=0)

        return read

    shown = bar(desc="neutral activations", unit="answers", total=len(rows))
    with shown, edit_blocks(model, {index: reader(index) for index in layers}), torch.inference_mode():
        for step in forward_passes(model, rows):
            prompts = torch.tensor([[len(rows[members[0]][0])] for members in step.rows])
            real = step.position.cpu() >= prompts
            weights = torch.randn(count, int(real.sum()), generator=generator, dtype=torch.float64)
            total, tokens = total + weights.sum(dim=1), tokens + weights.shape[1]
            read_pass(model, step)
            shown.update(len(step.rows) * step.answers)
    if tokens < 2:
        raise InputError("covariance_vectors needs answers of two tokens or more, to vary")
    directions = torch.zeros(count, *vector.directions.shape, dtype=torch.float32)
    for index in layers:
        drawn = sums[index] - total[:, None] * means[index] / tokens
        norms = vector.direction(index).double().norm() / drawn.norm(dim=1, keepdim=True)
        directions[:, index] = (drawn * norms).float()
    control = random_vector(vector, seed=seed)
    return [replace(control, trait=f"covariance {i}", directions=each) for i, each in enumerate(directions)]


def random_vectors(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    *,
    layer: Layer,
    count: int,
    seed: int = 0,
) -> list[PersonaVector]:
    """Return controls of the same norm: half isotropic, half with the covariance of real activations."""
    isotropic = [random_vector(vector, seed=seed + i) for i in range(count - count // 2)]
    return isotropic + covariance_vectors(model, tokenizer, vector, layer=layer, count=count // 2, seed=seed)


class Null(NamedTuple):
    """A vector's score beside those of random directions, each at the layer that is best for it."""

    own: float
    layer: int
    """The layer that was chosen for the vector."""
    random: Float[Tensor, " direction"]
    """The random directions' scores, each at the layer that was chosen for it."""
    percentile: float
    """How many in a hundred random directions score lower than the vector."""

    def at(self, percentile: float) -> float:
        """Return a percentile of the random directions' scores; nan ones are left out."""
        return float(self.random.double().nanquantile(percentile / 100))


def random_null(
    own: Float[Tensor, " layer"],
    random: Float[Tensor, "direction layer"],
    *,
    chosen_on: tuple[Float[Tensor, " layer"], Float[Tensor, "direction layer"]] | None = None,
) -> Null:
    """Return where a vector's score stands among random directions that have the same freedom: the best of all layers.

    `own` and `random` are scores, larger is better: an AUROC, or the absolute value of a correlation, whose sign a
    random direction does not have. `chosen_on` are the same two on other data, where the layers are to be chosen; by
    default each has its best layer here. A vector that beats the 97.5th percentile, `.at(97.5)`, says more than the
    best of as many random looks (`random_vector(vector, seed=i, like=activations)` makes the directions).

    Raises InputError where there is no random direction, or one of them, or the vector, has no score that is a number.
    """
    scores = torch.cat([own[None], random]).double()
    by = scores if chosen_on is None else torch.cat([chosen_on[0][None], chosen_on[1]]).double()
    if not len(random) or by.shape != scores.shape or by.isnan().all(dim=1).any():
        raise InputError(
            f"the scores are {list(own.shape)} and {list(random.shape)}, chosen on {list(by.shape)}: give [layer] and "
            "[direction, layer], the same for chosen_on, one random direction or more, and a number for each"
        )
    layers = by.nan_to_num(nan=-torch.inf).argmax(dim=1)
    best = scores.gather(1, layers[:, None])[:, 0]
    lower = (best[1:] < best[0])[~best[1:].isnan()]
    return Null(float(best[0]), int(layers[0]), best[1:].float(), float(100 * lower.double().mean()))
