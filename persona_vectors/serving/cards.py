"""What the server says of its model and vectors: names, layers, and the evidence that the files hold."""

from typing import Any

from torch import Tensor

from persona_vectors.model.blocks import model_shape
from persona_vectors.serving.plan import Served
from persona_vectors.vectors.directions import per_dose
from persona_vectors.vectors.vector import PersonaVector

_TOLD = ("pairs_kept", "pos_answers", "neg_answers", "questions", "judge", "seed", "date", "licence", "whitened")


def model_card(served: Served) -> dict[str, Any]:
    """Return the entry of /v1/models."""
    ours = {
        "layers": model_shape(served.model)[0],
        "layer": served.layer,
        "context": served.longest,
        "vectors": [vector_card(vector, served.layer) for vector in served.vectors.values()],
    }
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "local", "persona_vectors": ours}


def vector_card(vector: PersonaVector, layer: int) -> dict[str, Any]:
    """Return what a vector's file says of it; `per_dose` is each layer's coefficient as long as the residual stream.

    It is None where the file does not know the residual norms, and at a layer where the vector is zero. `steer` is what
    the file recommends to steer with, None without evidence.
    """
    use = next((use for use in vector.uses.values() if use.purpose == "steer" and use.evidence), None)
    known = {name: vector.info[name] for name in _TOLD if name in vector.info}
    return {
        "name": vector.trait,
        "model": vector.model,
        "pooling": vector.pooling,
        "norm": float(vector.direction(layer).norm()),
        "per_dose": None if vector.residual_norms is None else _doses(vector),
        "separation": _rounded(vector.separation),
        "split_half_cosine": _rounded(vector.split_half_cosine),
        "steer": None if use is None else {"layer": use.layer, "coef": use.coef, "coherent": use.coherent},
        "uses": [str(use) for use in vector.uses.values()],
        "info": known,
    }


def _doses(vector: PersonaVector) -> list[float | None]:
    known = vector.directions.float().norm(dim=1) > 0
    return [per_dose(vector, layer) if known[layer] else None for layer in range(len(known))]


def _rounded(values: Tensor | None) -> list[float] | None:
    return None if values is None else [round(value, 4) for value in values.tolist()]
