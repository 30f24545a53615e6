"""How a model's activations vary over neutral answers: what random directions, and whitened vectors, are made of."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.samples import Sample, Source, read_samples
from persona_vectors.data.texts import neutral_texts
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_name, model_shape
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import encode_answer, finished_turn, fit
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.vector import PersonaVector

KIND = "persona_vectors moments 1"
CHUNK = 64
"""How many answers are pooled at a time."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the mean activations of some answers, at some layers of one model."""

    model: str
    count: int
    """How many answers they are of."""
    mean: dict[int, Float[Tensor, " hidden"]]
    covariance: dict[int, Float[Tensor, "hidden hidden"]]
    source: str = "unknown answers"
    """Whose answers they are."""

    def __repr__(self) -> str:
        return f"Moments({self.model}: {self.count} answers, layers {', '.join(map(str, self.mean))})"

    def at(self, layer: int) -> Float[Tensor, "hidden hidden"]:
        """Return the covariance at a layer; raises InputError for one that was not read."""
        if layer not in self.covariance:
            known = ", ".join(map(str, self.covariance))
            raise InputError(f"these moments have no layer {layer}: they have {known}; read the others too")
        return self.covariance[layer]

    @classmethod
    def of(cls, means: Float[Tensor, "answer layer hidden"], *, model: str) -> "Moments":
        """Return the moments of answers' mean activations at every layer."""
        layers, wide = range(means.shape[1]), means.double()
        covariance = {k: torch.cov(wide[:, k].T) for k in layers}
        return cls(model, len(means), {k: wide[:, k].mean(dim=0).float() for k in layers}, covariance)

    def whitener(self, layer: int, *, shrinkage: float = 0.1) -> Float[Tensor, "hidden hidden"]:
        """Return (S + s t I)^-1 at a layer, with S the covariance and t its mean variance, in float64.

        Raises InputError for a layer that was not read, and for a shrinkage s that is not above 0.
        """
        if not shrinkage > 0:
            raise InputError(f"shrinkage is {shrinkage}: give a number above 0, such as 0.1")
        covariance = self.at(layer)
        ridge = shrinkage * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        return torch.linalg.inv(covariance + ridge)

    def only(self, layers: Sequence[int]) -> "Moments":
        """Return the moments of some layers alone; raises InputError for one that was not read."""
        covariance = {layer: self.at(layer) for layer in layers}
        return replace(self, mean={layer: self.mean[layer] for layer in layers}, covariance=covariance)

    def check_fits(self, vector: PersonaVector) -> None:
        """Raise InputError where a vector has another hidden size, or no such layers."""
        for layer, covariance in self.covariance.items():
            if len(covariance) != len(vector.direction(layer)):
                raise InputError(f"{self!r} do not fit {vector!r}: read them from the vector's model")

    def whiten(self, vector: PersonaVector, *, shrinkage: float = 0.1, steers: bool = False) -> PersonaVector:
        """Return the vector for reading: w = (S + s t I)^-1 v, with S the covariance and t its mean variance.

        A projection on w/|w| weighs each direction by how little neutral answers vary along it, as Fisher's
        discriminant does, so that length and topic count for less. `shrinkage` s > 0 keeps the inverse bounded where S
        has seen fewer answers than it has dimensions. It has v's norm; layers that were not read are zero.

        It is made for reading: along directions that answers hardly use, a step takes the model far out, so the verbs
        that edit refuse it. `steers=True` has them take it, to compare it with the plain difference; no export does.
        """
        self.check_fits(vector)
        directions = torch.zeros_like(vector.directions)
        for layer in self.covariance:
            direction = vector.direction(layer).double()
            found = self.whitener(layer, shrinkage=shrinkage) @ direction
            directions[layer] = (found * direction.norm() / found.norm()).float()
        made = vector._derived(f"{vector.trait} whitened", directions)
        return replace(made, info={**made.info, "whitened": self._whitened(shrinkage, steers)})

    def _whitened(self, shrinkage: float, steers: bool) -> dict[str, Any]:
        known = {"answers": self.count, "shrinkage": shrinkage, "reference": self.source}
        return {**known, "layers": list(self.covariance), **({"steers": True} if steers else {})}

    def random_vectors(self, vector: PersonaVector, *, count: int, seed: int = 0) -> list[PersonaVector]:
        """Return controls with v's norm: half isotropic, half with this covariance, which are zero at other layers."""
        controls = [random_vector(vector, seed=seed + i) for i in range(count - count // 2)]
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for layer, covariance in self.covariance.items():
            tiny = 1e-8 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
            root = torch.linalg.cholesky(covariance + tiny).float()
            drawn[layer] = torch.randn(count // 2, len(root), generator=generator, dtype=torch.float32) @ root.T
        for i in range(count // 2):
            directions = torch.zeros_like(vector.directions)
            for layer, noise in drawn.items():
                directions[layer] = noise[i] * vector.direction(layer).norm() / noise[i].norm()
            controls.append(vector._derived(f"covariance {i}", directions))
        return controls

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, whole or not at all: 8 bytes times hidden squared a layer."""
        tensors = {f"mean.{layer}": mean for layer, mean in self.mean.items()}
        tensors |= {f"covariance.{layer}": covariance for layer, covariance in self.covariance.items()}
        header = {"kind": KIND, "model": self.model, "count": str(self.count), "source": self.source}
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Read a file that `save` wrote; raises InputError where it is missing, broken or another kind of file."""
        if not Path(path).is_file():
            raise InputError(f"no moments file {path}: make one with neutral_moments(...).save")
        try:
            with safe_open(path, framework="pt") as file:
                header, names = file.metadata() or {}, list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise InputError(f"{path} is no whole safetensors file ({error}): read the moments again") from None
        if header.get("kind") != KIND:
            raise InputError(f"{path} holds no moments of this release: give a file that Moments.save wrote")
        layers = sorted(int(name.partition(".")[2]) for name in names if name.startswith("mean."))
        mean, covariance = ({k: tensors[f"{kind}.{k}"] for k in layers} for kind in ("mean", "covariance"))
        return cls(header["model"], int(header["count"]), mean, covariance, header["source"])


def neutral_moments(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    data: Source | None = None,
    *,
    layer: Layer,
    columns: tuple[str, str] | None = None,
    split: str = "train",
    first: int | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
) -> Moments:
    """Read neutral data, or its `first` samples, by default 16 answers on plain facts, and return their moments.

    `data` is what `flag` takes; samples longer than `max_length` (the context unless given) are cut. Only sums are
    kept, [hidden, hidden] a layer.

    Raises InputError where there are fewer than two answers, or they do not vary.
    """
    layers = chosen_layers(layer, model_shape(model)[0])
    limit = max_length or getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    rows = _rows(tokenizer, data, columns, split, first, limit)
    hidden = model_shape(model)[1]
    count, mean = 0, {k: torch.zeros(hidden, dtype=torch.float64) for k in layers}
    squares = {k: torch.zeros(hidden, hidden, dtype=torch.float64) for k in layers}
    while part := list(islice(rows, CHUNK)):
        pooled = pool(model, part, layer=layers, batch_tokens=batch_tokens).means[:, 0]
        before, count = count, count + len(part)
        for place, k in enumerate(layers):
            own = pooled[:, place].double()
            middle = own.mean(dim=0)
            step = middle - mean[k]
            centred = own - middle
            squares[k] += centred.T @ centred + torch.outer(step, step) * before * len(part) / count
            mean[k] += step * len(part) / count
    if count < 2 or not all(square.diagonal().sum() > 0 for square in squares.values()):
        raise InputError(f"{count} answers do not vary: give two or more different ones")
    covariance = {k: square / (count - 1) for k, square in squares.items()}
    source = Path(data).name if isinstance(data, (str, Path)) else f"a {type(data).__name__}"
    source = "answers on plain facts" if data is None else source
    return Moments(model_name(model), count, {k: m.float() for k, m in mean.items()}, covariance, source)


def _rows(
    tokenizer: PreTrainedTokenizerBase,
    data: Source | None,
    columns: tuple[str, str] | None,
    split: str,
    first: int | None,
    limit: int | None,
) -> Iterator[Row]:
    source: Any = neutral_texts() if data is None else data
    samples: Iterable[Any] = (s for s in read_samples(source, columns=columns, split=split) if isinstance(s, Sample))
    for sample in islice(samples, first):
        row = fit(encode_answer(tokenizer, *finished_turn(tokenizer, sample.talk, len(sample.prompt))), limit, 0)
        if row[1]:
            yield row
