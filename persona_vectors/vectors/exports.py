"""Take vectors to other tools, and say what each format cannot hold."""

import re
import warnings
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from gguf import GGUFWriter
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.vectors.foreign import GGUF_BLOCK_0
from persona_vectors.vectors.formats import FORMATS, format_named, ignored_by_llama_cpp, official_pooling
from persona_vectors.vectors.vector import PersonaVector

_BY_LAYER = ("steering-vectors", "lm-eval", "gguf")


def export_vector(
    vector: PersonaVector,
    *,
    out: str | Path,
    format: str,
    layer: SupportsIndex | None = None,
    hookpoint: str = "layers.{layer}",
) -> list[str]:
    """Write a vector in another tool's format, and return what is lost or changed there, a line each.

    `layer` writes one block's direction alone: for steering-vectors, lm-eval and gguf, whose tools add every direction
    of a file at once. For another strength, export `2 * vector`. `hookpoint` is lm-eval's name of a block, its path
    inside `model.base_model`.

    Raises InputError for a whitened vector, and where the format cannot hold it; then nothing is written.

    >>> vector = PersonaVector(trait="calm", model="tiny", directions=torch.eye(2, 4))
    >>> export_vector(vector, out="calm.gguf", format="gguf", layer=1)  # doctest: +SKIP
    ['lost: trait', 'lost: all layers but 1']
    """
    if "whitened" in vector.info:
        raise InputError(f"{vector!r} is whitened, which no other tool's file says: export what it was made from")
    path, format = Path(out), format_named(format)
    if path.suffix != FORMATS[format]:
        raise InputError(f"{path} is no name for a file of format {format}: give one that ends in {FORMATS[format]}")
    if layer is not None and format not in _BY_LAYER:
        raise InputError(f"format {format} holds every layer: leave layer out, or use one of {', '.join(_BY_LAYER)}")
    directions = vector.directions.detach().to("cpu", torch.float32).contiguous()
    if layer is None:
        rows = {k: row.clone() for k, row in enumerate(directions)}
    else:
        rows = {index(layer): vector.direction(layer).detach().to("cpu", torch.float32, copy=True)}
    with atomic_path(path) as temporary:
        if format in ("official", "assistant-axis", "safetensors"):
            notes = _write_matrix(temporary, directions, format)
        elif format == "assistant-axis-capping":
            notes = _write_capping(temporary, rows, vector)
        elif format == "gguf":
            notes = _write_gguf(temporary, rows, vector.model)
            architecture = re.sub("[-_]", "", str(vector.info.get("architecture")))
            if architecture in [name.replace("_", "") for name in ignored_by_llama_cpp()]:
                warnings.warn(
                    f"llama.cpp adds no control vector to a {vector.info['architecture']} model: it loads this file "
                    "and does nothing; use repeng, or serve the model here",
                    stacklevel=2,
                )
        else:
            notes = _write_layers(temporary, rows, hookpoint if format == "lm-eval" else None)
    kept = {"model"} if format == "gguf" else set()
    if format == "official" and official_pooling(path) == vector.pooling:
        kept = {"pooling"}
    if layer is not None:
        notes = [f"lost: all layers but {index(layer)}", *notes]
    elif format in _BY_LAYER:
        notes.append(f"tools that read {format} add all {len(rows)} directions at once: export one with layer=")
    return [_lost(vector, kept), *notes]


def _lost(vector: PersonaVector, kept: set[str]) -> str:
    names = ("trait", "model", "pooling", "residual_norms", "split_half_cosine", "separation", "info", "uses")
    values = {name: getattr(vector, name) for name in names}
    known = [name for name, value in values.items() if isinstance(value, Tensor) or value not in (None, "unknown", {})]
    return f"lost: {', '.join(name for name in known if name not in kept)}"


def _write_matrix(path: Path, directions: Float[Tensor, "layer hidden"], format: str) -> list[str]:
    if format == "safetensors":
        save_file({"directions": directions}, path)
    elif format == "assistant-axis":
        _save({"axis": directions}, path)
    else:
        _save(torch.cat([torch.zeros_like(directions[:1]), directions]), path)
        return [
            "row 0, the embeddings, is zero: blocks alone have directions here",
            "the last row is the last block's raw output; in official files it is read after the final norm",
        ]
    return []


def _save(content: Any, path: Path) -> None:
    with path.open("wb") as file:  # given a name, torch.save would write it into the file
        torch.save(content, file)


def _write_capping(path: Path, rows: dict[int, Tensor], vector: PersonaVector) -> list[str]:
    floors = {int(layer): float(floor) for layer, floor in vector.info.get("floors", {}).items()}
    if not floors or not floors.keys() <= rows.keys():
        raise InputError(f"{vector!r} has no floors: put info['floors'] = {{layer: floor of the projection}} first")
    experiment = str(vector.info.get("experiment", vector.trait))
    content = {
        "vectors": {f"layer_{k}": {"layer": k, "vector": -rows[k]} for k in floors},
        "experiments": [
            {"id": experiment, "interventions": [{"vector": f"layer_{k}", "cap": -floors[k]} for k in floors]}
        ],
    }
    _save(content, path)
    left = [str(k) for k in rows if k not in floors]
    return [f"lost: layers without a floor, {', '.join(left)}"] if left else []


def _write_layers(path: Path, rows: dict[int, Tensor], hookpoint: str | None) -> list[str]:
    if hookpoint is None:
        _save({"layer_activations": rows, "layer_type": "decoder_block"}, path)
        return []
    if "{layer}" not in hookpoint:
        raise InputError(f"hookpoint is {hookpoint!r}: give a block's path with {{layer}} for its number")
    edit = {"action": "add", "steering_coefficient": 1.0, "bias": None, "head_index": None}
    names = {k: hookpoint.replace("{layer}", str(k)) for k in rows}
    _save({names[k]: {"steering_vector": row, **edit} for k, row in rows.items()}, path)
    return []


def _write_gguf(path: Path, rows: dict[int, Tensor], model: str) -> list[str]:
    if not any(rows):
        raise InputError("a control vector has no place for layer 0, the first block: export another layer")
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", model)
    writer.add_uint32("controlvector.layer_count", len([k for k in rows if k]))
    if 0 in rows:
        writer.add_array(GGUF_BLOCK_0, rows[0].tolist())
    for k, row in rows.items():
        if k:
            writer.add_tensor(f"direction.{k}", row.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ["layer 0 has no place in a control vector: only import reads it back"] if 0 in rows else []
