"""PersonaVector: one direction a layer, with the conventions and the evidence that it was made with."""

import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.data.notebook import html_table
from persona_vectors.model.blocks import Model, model_name, model_shape
from persona_vectors.model.identity import config_hash
from persona_vectors.vectors.stored import read, write
from persona_vectors.vectors.uses import Use, from_json, recommended, to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TENSORS = ("directions", "residual_norms", "split_half_cosine", "separation")


@dataclass(frozen=True, eq=False)
class PersonaVector:
    """A direction for each decoder block of one model.

    `directions[k]` is taken from, and added to, the raw output of block k, counted from 0. It points towards the trait
    and is the raw difference of means, not normalised (paper, section 2.2).

    >>> import torch
    >>> vector = PersonaVector(trait="calm", model="tiny", directions=torch.eye(2, 4))
    >>> (2 * vector).cosine(vector).tolist()
    [1.0, 1.0]
    """

    trait: str
    model: str
    """The model's Hub id or name."""
    directions: Float[Tensor, "layer hidden"]
    residual_norms: Float[Tensor, " layer"] | None = None
    """Mean norm of an answer token's residual stream: what a `dose` is a fraction of. None: unknown."""
    split_half_cosine: Float[Tensor, " layer"] | None = None
    """Cosine between the vectors of two halves of the questions, averaged over splits. None: unknown."""
    separation: Float[Tensor, " layer"] | None = None
    """Held-out AUROC of positive against negative answers, projected on the other questions' vector. None: unknown."""
    pooling: str = "unknown"
    info: Mapping[str, Any] = field(default_factory=dict)
    """How it was made: counts, judge, thresholds, sampling, seed, hashes, versions. Empty: unknown."""
    uses: Mapping[str, Use] = field(default_factory=dict)
    """Where to use it to "steer", "monitor" and "flag", as far as that was measured: see `with_use`."""

    def __post_init__(self) -> None:
        if self.directions.ndim != 2:
            raise InputError(
                f"directions is {list(self.directions.shape)}: give [layer, hidden], a row a decoder block"
            )
        layers = self.directions.shape[0]
        for name in _TENSORS[1:]:
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != (layers,):
                raise InputError(f"{name} is {list(value.shape)}: give one value for each of the {layers} layers")

    def __repr__(self) -> str:
        layers, hidden = self.directions.shape
        kept = f", {self.info['pairs_kept']} answer pairs" if "pairs_kept" in self.info else ""
        return f"PersonaVector({self.trait!r}, {layers} layers x {hidden}{kept}, {self.model})"

    def _repr_html_(self) -> str:
        """Show in a notebook what it is, and where to use it."""
        uses = [str(use) for use in self.uses.values()] or ["none is stored"]
        return html_table(repr(self), [{"recommended use": use} for use in uses])

    def plot(self, *, layer: SupportsIndex | None = None) -> "Figure":
        """Plot its evidence by layer, a line at `layer`; the same as `plot_vector`."""
        from persona_vectors.vectors.drawing import evidence_figure

        return evidence_figure(self, layer)

    def with_use(self, use: Use) -> "PersonaVector":
        """Return the same vector with a use that was measured, in place of an earlier one for that purpose.

        `vector.with_use(pv.contrast_effect(...).use()).save(path)` keeps it in the file.
        """
        if not 0 <= use.layer < len(self.directions):
            raise InputError(f"layer {use.layer} is out of range: {self!r} has {len(self.directions)} layers")
        return replace(self, uses={**self.uses, use.purpose: use})

    def recommended(self, purpose: str) -> Use:
        """Return where to use it: "steer", "monitor" or "flag"; raises InputError where there is no evidence."""
        return recommended(self.uses, purpose, repr(self))

    def __eq__(self, other: object) -> bool:
        """Say whether another vector has the same directions and says the same of them."""
        if not isinstance(other, PersonaVector):
            return NotImplemented
        names = ("trait", "model", "pooling", "info", "uses")
        plain = all(getattr(self, name) == getattr(other, name) for name in names)
        tensors = [(getattr(self, name), getattr(other, name)) for name in _TENSORS]
        same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in tensors)
        return plain and same

    def __hash__(self) -> int:
        return hash((self.trait, self.model, tuple(self.directions.shape)))

    def __getitem__(self, layer: SupportsIndex) -> Float[Tensor, " hidden"]:
        """Return one layer's direction, `vector[13]`; raises InputError where there is no such layer."""
        return self.direction(layer)

    def __iter__(self) -> Iterator[Float[Tensor, " hidden"]]:
        return iter(self.directions)

    def norm(self) -> Float[Tensor, " layer"]:
        """Return the length of every layer's direction."""
        return self.directions.norm(dim=1)

    def direction(self, layer: SupportsIndex) -> Float[Tensor, " hidden"]:
        """Return one layer's direction; raises InputError where there is no such layer."""
        if isinstance(layer, bool) or not 0 <= operator.index(layer) < len(self.directions):
            raise InputError(f"layer {layer} is out of range: {self!r} has layers 0 to {len(self.directions) - 1}")
        return self.directions[operator.index(layer)]

    def cosine(self, other: "PersonaVector") -> Float[Tensor, " layer"]:
        """Return the cosine with another vector of the same model, layer by layer."""
        self.check_same_model(other)
        return torch.nn.functional.cosine_similarity(self.directions, other.directions, dim=1)

    def project(self, hidden: Float[Tensor, "*any hidden"], *, layer: SupportsIndex) -> Float[Tensor, "*any"]:
        """Return the projection of hidden states of block `layer` on v/|v|, in the residual stream's units."""
        direction = self.direction(layer).to(hidden.device)
        return hidden.float() @ (direction / direction.norm())

    def __add__(self, other: "PersonaVector") -> "PersonaVector":
        self.check_same_model(other)
        return self._derived(f"{self.trait} + {other.trait}", self.directions + other.directions)

    def __sub__(self, other: "PersonaVector") -> "PersonaVector":
        self.check_same_model(other)
        return self._derived(f"{self.trait} - {other.trait}", self.directions - other.directions)

    def __mul__(self, factor: float) -> "PersonaVector":
        return self._derived(f"{factor:g} * {self.trait}", self.directions * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "PersonaVector":
        return self * (1 / divisor)

    def __neg__(self) -> "PersonaVector":
        return self._derived(f"-{self.trait}", -self.directions)

    def _derived(self, trait: str, directions: Tensor) -> "PersonaVector":
        kept = {key: self.info[key] for key in ("config_hash", "revision", "whitened") if key in self.info}
        return PersonaVector(trait, self.model, directions, self.residual_norms, pooling=self.pooling, info=kept)

    def check_same_model(self, other: "PersonaVector") -> None:
        """Raise InputError where another vector is of a different model."""
        mine, theirs = self.info.get("config_hash"), other.info.get("config_hash")
        same = mine == theirs if mine and theirs else self.model == other.model
        if not same or self.directions.shape != other.directions.shape:
            raise InputError(
                f"{self!r} and {other!r} are of different models, so their directions cannot be combined: "
                "extract both from one model"
            )

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file, whole or not at all: tensors in float32, all else as JSON in the header."""
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        fields = {
            "trait": self.trait,
            "model": self.model,
            "pooling": self.pooling,
            "hook_site": "raw output of the decoder block",
            "layer_base": 0,
            "sign": "towards the trait",
            "scale": "whitened" if "whitened" in self.info else "raw difference of means",
            "info": dict(self.info),
            "uses": to_json(self.uses),
        }
        write(path, fields, tensors)

    @classmethod
    def load(cls, path: str | Path) -> "PersonaVector":
        """Read a file that `save` wrote; raises InputError where it is truncated, changed or of another version."""
        header, tensors = read(Path(path))
        fields = {name: header[name] for name in ("trait", "model", "pooling", "info")}
        return cls(**fields, uses=from_json(header.get("uses", {}), Path(path)), **tensors)

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Commit the file and its card to a repository of the Hugging Face Hub; return the name to load it by.

        The repository, "org/name", is made where there is none, `private` or not. Its card tells of all vectors that
        were pushed to it; a card that somebody wrote is left alone. Raises InputError where it may not be written.
        """
        from persona_vectors.vectors.hub import push

        return push(self, repo, private=private)

    def check_fits(self, model: Model) -> None:
        """Raise InputError for another number of layers or hidden size; warn of a model of another name and config."""
        layers, hidden = model_shape(model)
        if tuple(self.directions.shape) != (layers, hidden):
            raise InputError(
                f"{self!r} does not fit a model of {layers} layers x {hidden}: "
                "steer the model that the vector was extracted from, or extract one from this model"
            )
        known, name = self.info.get("config_hash"), model_name(model)
        if known and name != self.model and known != config_hash(model):
            warnings.warn(
                f"{self!r} is of another model than {name}, whose config differs: extract one from {name}; or where "
                f"that was made from {self.model}, say so: dataclasses.replace(vector, model={name!r})",
                stacklevel=3,
            )

    def check_edits(self) -> None:
        """Raise InputError for a whitened vector that was not made to steer with: see `Moments.whiten`."""
        if "whitened" in self.info and not self.info["whitened"].get("steers"):
            raise InputError(f"{self!r} is whitened, for reading alone: edit with the vector that it was made from")
