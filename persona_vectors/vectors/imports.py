"""Bring vectors from other tools: what each format holds, in our conventions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.vectors.foreign import MAX_LAYERS, checked, read_foreign
from persona_vectors.vectors.formats import FORMATS, format_named, official_pooling
from persona_vectors.vectors.vector import PersonaVector


def import_vector(
    path: str | Path,
    *,
    model: str,
    trait: str,
    format: str | None = None,
    blocks: int | None = None,
    experiment: str | None = None,
) -> PersonaVector:
    """Read another tool's vector file into our conventions: outputs of the blocks, counted from 0.

    `format` is one of `FORMATS`, and needed only for a `.pt` that holds a bare tensor and does not bear the name that
    its tool gives it. `blocks` is the model's number of blocks: needed where the file leaves out the last ones, else
    checked. Blocks that the file leaves out are zero, and listed in `info["missing_layers"]`.

    - official: rows 1 and up become blocks 0 and up. Row 0, the embeddings, is dropped. The last row was read after
      the final norm, so it is not the last block's raw output: it is kept, and `info["note"]` says so.
    - assistant-axis: a role's vector is a mean activation, not a difference, and `info["note"]` says so.
    - assistant-axis-capping: one `experiment`, by its id. Its vectors point away from the axis, so they are negated,
      and `info["floors"]` holds minus the cap of each block, on the projection on v/|v|.
    - lm-eval: each vector times its coefficient, so that `coef=1` does what the file does.

    Raises InputError where the file is damaged, holds code, or is of another format or model. Nothing is unpickled.
    """
    path, format = Path(path), None if format is None else format_named(format)
    if blocks is not None and not 1 <= blocks <= MAX_LAYERS:
        raise InputError(f"blocks is {blocks}: give the model's number of decoder blocks, 1 to {MAX_LAYERS}")
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
    directions, missing = (rows, []) if isinstance(rows, Tensor) else _stack(rows, blocks, path)
    if blocks is not None and len(directions) != blocks:
        raise InputError(
            f"{path} holds {len(directions)} blocks as {found}, and blocks is {blocks}: "
            "give the model's number of decoder blocks, or another format"
        )
    if not directions.isfinite().all():
        raise InputError(f"{path} holds NaN or infinite values: make the vector again")
    pooling = facts.pop("pooling", "unknown")
    info = {"imported_from": found, "imported_file": path.name, **facts}
    if missing:
        info["missing_layers"] = missing
    return PersonaVector(trait=trait, model=model, directions=directions, pooling=pooling, info=info)


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


def _stack(rows: dict[Any, Tensor], blocks: int | None, path: Path) -> tuple[Float[Tensor, "layer hidden"], list[int]]:
    """Return one direction a block, zero where the file has none, and the blocks that it lacks."""
    if not rows:
        raise InputError(f"{path} holds no directions: give a file with one for each layer")
    bad = [k for k in rows if type(k) is not int or not 0 <= k < (blocks or MAX_LAYERS)]
    if bad:
        raise InputError(
            f"{path} has directions for layers out of range: layers are numbers below {blocks or MAX_LAYERS}"
        )
    sizes = {len(row) for row in rows.values()}
    if len(sizes) > 1:
        raise InputError(f"{path} has directions of {len(sizes)} sizes: give a file for one model")
    directions = torch.zeros(blocks or max(rows) + 1, *sizes, dtype=torch.float32)
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
    return rows[1:].clone(), {"note": note, "pooling": official_pooling(path)}


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
