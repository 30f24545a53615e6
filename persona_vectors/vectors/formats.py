"""Bring vectors from other tools, and take them there: what each format holds, in its own conventions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from persona_vectors.data.files import InputError, atomic_path
from persona_vectors.vectors.foreign import GGUF_BLOCK_0, MAX_LAYERS, checked, read_foreign
from persona_vectors.vectors.vector import PersonaVector

FORMATS = {
    "official": ".pt",
    "assistant-axis": ".pt",
    "assistant-axis-capping": ".pt",
    "steering-vectors": ".pt",
    "lm-eval": ".pt",
    "gguf": ".gguf",
    "safetensors": ".safetensors",
}
"""Each format's name and file suffix. "gguf" is the control vector of repeng and llama.cpp."""
_BY_LAYER = ("steering-vectors", "lm-eval", "gguf")
_OFFICIAL_POOLING = {"response_avg": "response_mean", "prompt_avg": "prompt_mean", "prompt_last": "prompt_last"}


def import_vector(
    path: str | Path,
    *,
    model: str,
    trait: str,
    format: str | None = None,
    layers: int | None = None,
    experiment: str | None = None,
) -> PersonaVector:
    """Read another tool's vector file into our conventions: outputs of the blocks, counted from 0.

    `format` is one of `FORMATS`, and needed only for a `.pt` that holds a bare tensor and does not bear the name that
    its tool gives it. `layers` is the model's number of blocks: needed where the file leaves out the last ones, else
    checked. Blocks that the file leaves out are zero, and listed in `info["missing_layers"]`.

    - official: rows 1 and up become blocks 0 and up. Row 0, the embeddings, is dropped. The last row was read after
      the final norm, so it is not the last block's raw output: it is kept, and `info["note"]` says so.
    - assistant-axis: a role's vector is a mean activation, not a difference, and `info["note"]` says so.
    - assistant-axis-capping: one `experiment`, by its id. Its vectors point away from the axis, so they are negated,
      and `info["floors"]` holds minus the cap of each block, on the projection on v/|v|.
    - lm-eval: each vector times its coefficient, so that `coef=1` does what the file does.

    Raises InputError where the file is damaged, holds code, or is of another format or model. Nothing is unpickled.
    """
    path = Path(path)
    if format is not None:
        _check_format(format)
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        raise InputError(f"layers is {layers}: give the model's number of decoder blocks, 1 to {MAX_LAYERS}")
    kind, content = read_foreign(path)
    found = _recognise(path, kind, content, format)
    if experiment is not None and found != "assistant-axis-capping":
        raise InputError(f"{path} is of format {found}, which has no experiments: leave experiment out")
    try:
        rows, facts = _READ[found](path, content, experiment)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} lacks what {found} files hold ({type(error).__name__}): make it again") from None
    directions, missing = (rows, []) if isinstance(rows, Tensor) else _stack(rows, layers, path)
    if layers is not None and len(directions) != layers:
        raise InputError(
            f"{path} holds {len(directions)} layers as {found}, and layers is {layers}: "
            "give the model's number of decoder blocks, or another format"
        )
    if not directions.isfinite().all():
        raise InputError(f"{path} holds NaN or infinite values: make the vector again")
    pooling = facts.pop("pooling", "unknown")
    info = {"imported_from": found, "imported_file": path.name, **facts}
    if missing:
        info["missing_layers"] = missing
    return PersonaVector(trait=trait, model=model, directions=directions, pooling=pooling, info=info)


def export_vector(
    vector: PersonaVector,
    path: str | Path,
    *,
    format: str,
    layer: int | None = None,
    hookpoint: str = "layers.{layer}",
) -> list[str]:
    """Write a vector in another tool's format, and return what is lost or changed there, a line each.

    `layer` writes one block's direction alone: for steering-vectors, lm-eval and gguf, whose tools add every direction
    of a file at once. For another strength, export `2 * vector`. `hookpoint` is lm-eval's name of a block, its path
    inside `model.base_model`.

    Raises InputError where the format cannot hold the vector; then nothing is written.

    >>> vector = PersonaVector(trait="calm", model="tiny", directions=torch.eye(2, 4))
    >>> export_vector(vector, "calm.gguf", format="gguf", layer=1)  # doctest: +SKIP
    ['lost: trait', 'lost: all layers but 1']
    """
    path = Path(path)
    _check_format(format)
    if path.suffix != FORMATS[format]:
        raise InputError(f"{path} is no name for a file of format {format}: give one that ends in {FORMATS[format]}")
    if layer is not None and format not in _BY_LAYER:
        raise InputError(f"format {format} holds every layer: leave layer out, or use one of {', '.join(_BY_LAYER)}")
    directions = vector.directions.detach().to("cpu", torch.float32).contiguous()
    if layer is None:
        rows = {k: row.clone() for k, row in enumerate(directions)}
    else:
        rows = {layer: vector.direction(layer).detach().to("cpu", torch.float32, copy=True)}
    with atomic_path(path) as temporary:
        if format in ("official", "assistant-axis", "safetensors"):
            notes = _write_matrix(temporary, directions, format)
        elif format == "assistant-axis-capping":
            notes = _write_capping(temporary, rows, vector)
        elif format == "gguf":
            notes = _write_gguf(temporary, rows, vector.model)
        else:
            notes = _write_layers(temporary, rows, hookpoint if format == "lm-eval" else None)
    kept = {"model"} if format == "gguf" else set()
    if format == "official" and _official_pooling(path) == vector.pooling:
        kept = {"pooling"}
    if layer is not None:
        notes = [f"lost: all layers but {layer}", *notes]
    elif format in _BY_LAYER:
        notes.append(f"tools that read {format} add all {len(rows)} directions at once: export one with layer=")
    return [_lost(vector, kept), *notes]


def _check_format(format: str) -> None:
    if format not in FORMATS:
        raise InputError(f"format is {format!r}: give one of {', '.join(FORMATS)}")


def _lost(vector: PersonaVector, kept: set[str]) -> str:
    names = ("trait", "model", "pooling", "residual_norms", "split_half_cosine", "separation", "info")
    values = {name: getattr(vector, name) for name in names}
    known = [name for name, value in values.items() if isinstance(value, Tensor) or value not in (None, "unknown", {})]
    return f"lost: {', '.join(name for name in known if name not in kept)}"


def _official_pooling(path: Path) -> str:
    """Return what an official file's name says of its pooling."""
    return next((ours for theirs, ours in _OFFICIAL_POOLING.items() if f"{theirs}_diff" in path.name), "unknown")


def _recognise(path: Path, kind: str, content: Any, format: str | None) -> str:
    """Return the format of a file's content, from its keys or, for a bare tensor, from `format` or the file's name."""
    keys = set(content) if isinstance(content, dict) else set()
    if kind != "pt":
        found = kind
    elif isinstance(content, Tensor):
        named = {"_diff.pt": "official", "axis.pt": "assistant-axis"}
        by_name = next((name for end, name in named.items() if path.name.endswith(end)), "")
        found = format if format and format in named.values() else by_name
        if not found:
            raise InputError(
                f"{path} holds a bare tensor, which does not say what its rows are: give format official (row 0 the "
                "embeddings, block k in row k + 1) or assistant-axis (block k in row k)"
            )
    elif {"vectors", "experiments"} <= keys:
        found = "assistant-axis-capping"
    elif keys & {"axis", "vector"}:
        found = "assistant-axis"
    elif "layer_activations" in keys:
        found = "steering-vectors"
    elif keys and all(isinstance(entry, dict) and "steering_vector" in entry for entry in content.values()):
        found = "lm-eval"
    else:
        raise InputError(f"{path} holds no vectors that are known here: give one of {', '.join(FORMATS)}")
    if format not in (None, found):
        raise InputError(f"{path} is a file of format {found}, not {format}: give that, or leave format out")
    return found


def _stack(rows: dict[Any, Tensor], layers: int | None, path: Path) -> tuple[Float[Tensor, "layer hidden"], list[int]]:
    """Return one direction a block, zero where the file has none, and the blocks that it lacks."""
    if not rows:
        raise InputError(f"{path} holds no directions: give a file with one for each layer")
    bad = [k for k in rows if type(k) is not int or not 0 <= k < (layers or MAX_LAYERS)]
    if bad:
        raise InputError(
            f"{path} has directions for layers out of range: layers are numbers below {layers or MAX_LAYERS}"
        )
    sizes = {len(row) for row in rows.values()}
    if len(sizes) > 1:
        raise InputError(f"{path} has directions of {len(sizes)} sizes: give a file for one model")
    directions = torch.zeros(layers or max(rows) + 1, *sizes)
    for k, row in rows.items():
        directions[k] = row
    return directions, [k for k in range(len(directions)) if k not in rows]


def _read_official(path: Path, content: Any, _: Any) -> tuple[Tensor, dict[str, Any]]:
    rows = checked(content, path, ndim=2)
    if len(rows) < 2:
        raise InputError(f"{path} has one row: an official file has the embeddings' and one for each block")
    note = (
        f"Row 0, the embeddings, was dropped. Layer {len(rows) - 2} was read after the final norm: it is not the raw "
        "output of its block, so do not steer or project there."
    )
    return rows[1:].clone(), {"note": note, "pooling": _official_pooling(path)}


def _read_axis(path: Path, content: Any, _: Any) -> tuple[Tensor, dict[str, Any]]:
    if isinstance(content, Tensor):
        return checked(content, path, ndim=2), {}
    if "axis" in content:
        return checked(content["axis"], path, ndim=2), {}
    facts = {key: content[key] for key in ("type", "role") if isinstance(content.get(key), str)}
    note = "A role's mean activation, not a difference of means: subtract the default role's vector before use."
    return checked(content["vector"], path, ndim=2), {**facts, "note": note}


def _read_capping(path: Path, content: Any, experiment: str | None) -> tuple[dict[Any, Tensor], dict[str, Any]]:
    experiments = {str(entry["id"]): entry for entry in content["experiments"] if isinstance(entry["id"], str | int)}
    chosen = experiment if experiment is not None or len(experiments) != 1 else next(iter(experiments))
    if chosen not in experiments:
        some = ", ".join(list(experiments)[:20])
        raise InputError(f"{path} has {len(experiments)} experiments, and experiment is {chosen!r}: give one of {some}")
    rows: dict[Any, Tensor] = {}
    floors: dict[str, float] = {}
    for item in experiments[chosen]["interventions"]:
        if "cap" in item:
            entry = content["vectors"][item["vector"]]
            _add_row(rows, entry["layer"], -checked(entry["vector"], path, ndim=1), path)
            floors[str(entry["layer"])] = -float(item["cap"])
    return rows, {"experiment": chosen, "floors": floors}


def _add_row(rows: dict[Any, Tensor], layer: Any, row: Tensor, path: Path) -> None:
    if type(layer) is not int or layer in rows:
        raise InputError(f"{path} has two directions for one layer, or one for none: give a file with one for each")
    rows[layer] = row


def _read_steering_vectors(path: Path, content: Any, _: Any) -> tuple[dict[Any, Tensor], dict[str, Any]]:
    if content.get("layer_type", "decoder_block") != "decoder_block":
        raise InputError(f"{path} steers inside the blocks: only vectors of layer_type 'decoder_block' are read")
    return {k: checked(row, path, ndim=1) for k, row in content["layer_activations"].items()}, {}


def _read_lm_eval(path: Path, content: Any, _: Any) -> tuple[dict[Any, Tensor], dict[str, Any]]:
    rows: dict[Any, Tensor] = {}
    for hookpoint, entry in content.items():
        block = re.fullmatch(r"(?:.*\.)?([0-9]{1,4})", hookpoint)
        if block is None or entry["action"] != "add" or any(entry.get(k) is not None for k in ("bias", "head_index")):
            raise InputError(
                f"{path} does other than add to a block's output: only hookpoints such as layers.3 are read"
            )
        row = checked(entry["steering_vector"], path, ndim=1) * float(entry.get("steering_coefficient", 1.0))
        _add_row(rows, int(block[1]), row, path)
    return rows, {}


def _read_gguf(path: Path, content: Any, _: Any) -> tuple[dict[Any, Tensor], dict[str, Any]]:
    return {k: checked(row, path, ndim=1) for k, row in content["directions"].items()}, {"model_hint": content["hint"]}


def _read_safetensors(path: Path, content: Any, _: Any) -> tuple[Tensor, dict[str, Any]]:
    return checked(content, path, ndim=2), {}


_READ: dict[str, Callable[[Path, Any, str | None], tuple[Any, dict[str, Any]]]] = {
    "official": _read_official,
    "assistant-axis": _read_axis,
    "assistant-axis-capping": _read_capping,
    "steering-vectors": _read_steering_vectors,
    "lm-eval": _read_lm_eval,
    "gguf": _read_gguf,
    "safetensors": _read_safetensors,
}


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
