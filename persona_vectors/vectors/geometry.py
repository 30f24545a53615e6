"""The geometry of persona vectors: cosines between traits and layers, separation by layer, and what a vector says."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.devices import input_device
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.tokens import Tokens
from persona_vectors.vectors.vector import PersonaVector


def cosine_matrix(vectors: Sequence[PersonaVector], *, layer: SupportsIndex) -> Float[Tensor, "vector vector"]:
    """Return the cosines between vectors of one model at one layer (paper, appendix: traits are not independent)."""
    if not vectors:
        raise InputError("no vectors: give one PersonaVector or more")
    for vector in vectors:
        vectors[0].check_same_model(vector)
    units = torch.nn.functional.normalize(torch.stack([v.direction(layer).double() for v in vectors]), dim=1)
    return (units @ units.T).float()


def orthogonalize(vectors: Sequence[PersonaVector]) -> list[PersonaVector]:
    """Return vectors of one model made orthogonal to one another at each layer (Gram-Schmidt, in float64).

    The order counts: the first stays as it is, and each later one loses its projections on those before it, so put
    first what is to be kept whole. They are not made longer again: what is left is what the others do not say.

    Raises InputError where nothing is left of a vector.
    """
    made: list[PersonaVector] = []
    kept: list[Float[Tensor, "layer hidden"]] = []
    for vector in vectors:
        vectors[0].check_same_model(vector)
        whole = rest = vector.directions.double()
        for other in kept:
            length = (other * other).sum(dim=1, keepdim=True)
            rest = rest - (rest * other).sum(dim=1, keepdim=True) / length.clamp_min(1e-30) * other
        gone = (rest.norm(dim=1) < 1e-6 * whole.norm(dim=1)).nonzero()
        if len(gone):
            raise InputError(f"nothing is left of {vector!r} at layer {int(gone[0])}: it is a sum of those before it")
        kept.append(rest)
        name = f"{vector.trait} without {', '.join(v.trait for v in vectors[: len(made)])}"
        made.append(vector._derived(name, rest.float()) if made else vector)
    return made


def layer_cosines(vector: PersonaVector) -> Float[Tensor, "layer layer"]:
    """Return the cosines between a vector's directions at different layers."""
    units = torch.nn.functional.normalize(vector.directions.double(), dim=1)
    return (units @ units.T).float()


class Separation(NamedTuple):
    """How far two groups of activations stand apart at one layer. Chance: AUROC 0.5, silhouette 0."""

    auroc: float
    """Along the line between the groups' means, of which each half is projected on the other half's."""
    silhouette: float
    calinski_harabasz: float
    """Larger is further apart."""
    davies_bouldin: float
    """Smaller is further apart."""


def separation_indices(
    first: Float[Tensor, "row layer hidden"], second: Float[Tensor, "other layer hidden"], *, seed: int = 0
) -> list[Separation]:
    """Return the separation of two groups of activations, such as two personas' answers, at each layer.

    `pool(model, rows).means[:, 0]` gives such activations. The indices but the AUROC are of all dimensions.

    Raises InputError where a group has fewer than four rows.
    """
    from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, roc_auc_score, silhouette_score

    groups = [first.double(), second.double()]
    if min(map(len, groups)) < 4 or first.shape[1:] != second.shape[1:]:
        raise InputError(
            f"the groups are {list(first.shape)} and {list(second.shape)}: give [row, layer, hidden] of one model, "
            "four rows or more each"
        )
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(group), generator=generator) for group in groups]
    labels = [1] * len(first) + [0] * len(second)
    found = []
    for layer in range(first.shape[1]):
        states = [group[:, layer] for group in groups]
        halves = [(state[order[::2]], state[order[1::2]]) for state, order in zip(states, orders)]
        areas = []
        for fit in (0, 1):
            direction = halves[0][fit].mean(dim=0) - halves[1][fit].mean(dim=0)
            held_out = [half[1 - fit] for half in halves]
            sides = [1] * len(held_out[0]) + [0] * len(held_out[1])
            areas.append(float(roc_auc_score(sides, (torch.cat(held_out) @ direction).numpy())))
        both = torch.cat(states).numpy()
        scores = [f(both, labels) for f in (silhouette_score, calinski_harabasz_score, davies_bouldin_score)]
        found.append(Separation(sum(areas) / 2, float(scores[0]), float(scores[1]), float(scores[2])))
    return found


def output_rows(model: Model) -> Float[Tensor, "token hidden"]:
    """Return each token's direction in the residual stream, by the output matrix and the final norm's weight.

    Raises InputError for a model without an output matrix.
    """
    weight, gain = _output(model)
    return weight * gain


def dictionary(path: str | Path, hidden: int) -> Float[Tensor, "feature hidden"]:
    """Return the decoder rows of a sparse autoencoder's safetensors file.

    They are its tensor `W_dec` [feature, hidden], or `decoder.weight` [hidden, feature], as the common libraries write.

    Raises InputError for a file without either, or of another width.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            name = next((name for name in ("W_dec", "decoder.weight") if name in names), None)
            if name is None:
                raise InputError(f"{path} holds {', '.join(names)}: give a file with W_dec or decoder.weight")
            stored = file.get_tensor(name).float()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}): give an autoencoder's") from None
    rows = stored if name == "W_dec" else stored.T
    if rows.ndim != 2 or rows.shape[1] != hidden:
        raise InputError(f"{path}: {name} is {list(stored.shape)}, and the model's states have {hidden} units")
    return rows


def feature_cosines(
    features: Float[Tensor, "feature hidden"], directions: Float[Tensor, "*any hidden"]
) -> Float[Tensor, "*any feature"]:
    """Return the cosines of directions with features, a dictionary's decoder rows or the output matrix's."""
    units = torch.nn.functional.normalize(features, dim=-1)
    return torch.nn.functional.normalize(directions.double(), dim=-1).to(units) @ units.T


def shared_features(one: Float[Tensor, " feature"], other: Float[Tensor, " feature"], top: int) -> float:
    """Return the share of the `top` features with the largest values that two rankings have in common."""
    return len(set(one.topk(top).indices.tolist()) & set(other.topk(top).indices.tolist())) / top


class Lens(NamedTuple):
    """Tokens with how far the vector moves their logits, strongest first."""

    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


def logit_lens(
    model: Model, tokenizer: PreTrainedTokenizerBase, vector: PersonaVector, *, layer: SupportsIndex, top: int = 10
) -> Lens:
    """Return the tokens that a vector promotes and suppresses, read directly by the model's output matrix.

    The vector is scaled by the final norm's weight, where it has one, as the residual stream is. What later blocks make
    of it is not in this; at early layers it says little.
    """
    vector.check_fits(model)
    weight, gain = _output(model)
    moved = (weight @ (vector.direction(layer).to(gain) * gain))[: len(tokenizer)].cpu()
    if not 0 < top <= len(moved):
        raise InputError(f"top is {top}: give 1 to {len(moved)}")

    def named(values: Tensor, sign: int) -> list[tuple[str, float]]:
        best = (sign * values).topk(top).indices.tolist()
        return [(str(tokenizer.decode([i])), float(values[i])) for i in best]

    return Lens(named(moved, 1), named(moved, -1))


def patched_logprobs(
    model: Model, prompt: Sequence[int], states: Float[Tensor, "row hidden"], *, layer: int
) -> Float[Tensor, "row vocab"]:
    """Return the log-probabilities of what follows a prompt whose last token has other states after block `layer`.

    A prompt that repeats words so says what a state holds (Ghandeharioun et al. 2024, Patchscopes). After the last
    block it is the logit lens of the states, whatever the prompt.
    """
    ids = torch.tensor([list(prompt)] * len(states), device=input_device(model))

    def put(hidden: Tensor, _: Tokens) -> Tensor:
        return torch.cat([hidden[:, :-1], states[:, None].to(hidden)], dim=1)

    with edit_blocks(model, {layer: put}), torch.inference_mode():
        return model(input_ids=ids).logits[:, -1].float().log_softmax(dim=-1).cpu()


def _output(model: Model) -> tuple[Float[Tensor, "token hidden"], Float[Tensor, " hidden"]]:
    """Return the output matrix, and what the final norm multiplies each dimension by, in float32 on one device."""
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{type(model).__name__} has no output matrix: give a language model")
    weight, gain = head.weight.detach().float(), _final_gain(model)
    return weight, weight.new_ones(weight.shape[1]) if gain is None else gain.detach().clone().to(weight)


def _final_gain(model: Model) -> Tensor | None:
    """Return what the norm after the last block multiplies each dimension by; None where there is no such norm."""
    hidden = model_shape(model)[1]
    norms = [
        m for m in model.get_decoder().children() if getattr(getattr(m, "weight", None), "shape", None) == (hidden,)
    ]
    if not norms:
        return None
    weight: Tensor = norms[-1].weight
    probe = torch.ones(hidden, device=weight.device, dtype=weight.dtype)
    probe[::2] = -1  # of mean 0 and mean square 1: a norm gives it back times its gain, plus its bias
    with torch.inference_mode():
        return (norms[-1](probe) - norms[-1](-probe)) / 2 * probe
