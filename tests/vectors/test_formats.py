import json
import random
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from gguf import GGUFWriter
from llama_cpp import LlamaCpp, graphs_with_control_vectors
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from persona_vectors.data.errors import InputError
from persona_vectors.steering.add import steer
from persona_vectors.vectors import foreign as interop_files
from persona_vectors.vectors.exports import export_vector
from persona_vectors.vectors.formats import FORMATS, ignored_by_llama_cpp
from persona_vectors.vectors.imports import import_vector
from persona_vectors.vectors.vector import PersonaVector

NAMES = {"official": "loud_response_avg_diff.pt", "assistant-axis": "assistant_axis.pt"}
WHO = {"model": "tiny", "trait": "loud"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # for passes this short, two threads wait for each other more than they compute


def make(layers: int = 3, hidden: int = 8, seed: int = 0, **fields: Any) -> PersonaVector:
    directions = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(seed))
    return PersonaVector(**{**WHO, "directions": directions, **fields})


def with_floors(vector: PersonaVector) -> PersonaVector:
    floors = {str(k): -1.5 * k for k in range(len(vector.directions))}
    return PersonaVector(**WHO, directions=vector.directions, info={"floors": floors, "experiment": "all"})


def path_for(folder: Path, format: str) -> Path:
    return folder / NAMES.get(format, f"v{FORMATS[format]}")


# Round trips


@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_keeps_the_directions_bit_for_bit(tmp_path: Path, format: str):
    vector = with_floors(make())
    path = path_for(tmp_path, format)
    export_vector(vector, out=path, format=format)
    first = path.read_bytes()
    export_vector(vector, out=path, format=format)
    assert path.read_bytes() == first
    for options in ({}, {"format": format}, {"blocks": 3}):
        loaded = import_vector(path, **WHO, **options)
        assert torch.equal(loaded.directions, vector.directions)
        assert (loaded.trait, loaded.model, loaded.info["imported_from"]) == ("loud", "tiny", format)
        assert "missing_layers" not in loaded.info
        json.dumps(loaded.info)
        loaded.save(tmp_path / "ours.safetensors")
    assert torch.equal(PersonaVector.load(tmp_path / "ours.safetensors").directions, vector.directions)


@pytest.mark.parametrize("format", ["steering-vectors", "lm-eval", "gguf"])
def test_one_layer_alone(tmp_path: Path, format: str):
    vector, path = make(layers=4), path_for(tmp_path, format)
    assert "lost: all layers but 2" in export_vector(vector, out=path, format=format, layer=2)
    loaded = import_vector(path, **WHO, blocks=4)
    assert loaded.info["missing_layers"] == [0, 1, 3]
    assert torch.equal(loaded.directions[2], vector.directions[2])
    assert not loaded.directions[[0, 1, 3]].any()
    assert len(import_vector(path, **WHO).directions) == 3
    with pytest.raises(InputError, match="layers are numbers below 2"):
        import_vector(path, **WHO, blocks=2)


def test_an_architecture_that_ignores_control_vectors_is_warned_of(tmp_path: Path):
    for name in ("plamo2", "modernbert", "hy-v4"):
        with pytest.warns(UserWarning, match=f"adds no control vector to a {name} model"):
            export_vector(replace(make(), info={"architecture": name}), out=tmp_path / "v.gguf", format="easysteer")
    for name in ("llama", "plamo3"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            export_vector(replace(make(), info={"architecture": name}), out=tmp_path / "v.gguf", format="gguf")


@pytest.mark.slow
def test_llama_cpp_s_compiled_graphs_add_control_vectors_but_for_those_that_we_name():
    found = graphs_with_control_vectors()
    assert {name for name, adds in found.items() if not adds} == set(ignored_by_llama_cpp())
    assert found["llama"] and found["qwen3"] and found["gemma3"] and len(found) > 100


def test_repeng_is_another_name_of_gguf(tmp_path: Path):
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    notes = [export_vector(make(), out=path, format=name) for path, name in zip(files, ("gguf", "repeng"))]
    assert files[0].read_bytes() == files[1].read_bytes() and notes[0] == notes[1]
    assert import_vector(files[1], **WHO, format="repeng").info["imported_from"] == "gguf"
    with pytest.raises(InputError, match=r"no name for a file of format gguf"):
        export_vector(make(), out=tmp_path / "v.pt", format="repeng")


def test_an_export_names_what_is_lost(tmp_path: Path):
    vector = make(residual_norms=torch.ones(3), separation=torch.ones(3), pooling="response_mean", info={"seed": 1})
    lost = {f: export_vector(vector, out=path_for(tmp_path, f), format=f) for f in FORMATS if "capping" not in f}
    assert lost["safetensors"] == ["lost: trait, model, pooling, residual_norms, separation, info"]
    assert lost["gguf"][0] == "lost: trait, pooling, residual_norms, separation, info"
    assert lost["official"][0] == "lost: trait, model, residual_norms, separation, info"
    assert "embeddings" in lost["official"][1] and "final norm" in lost["official"][2]
    assert "layer 0 has no place" in lost["gguf"][1] and "all 3 directions at once" in lost["gguf"][2]


def test_official_rows_are_counted_from_the_embeddings(tmp_path: Path):
    rows = torch.randn(5, 8)
    torch.save(rows, tmp_path / "evil_prompt_last_diff.pt")
    vector = import_vector(tmp_path / "evil_prompt_last_diff.pt", **WHO)
    assert torch.equal(vector.directions, rows[1:])
    assert vector.pooling == "prompt_last"
    assert "Layer 3 was read after the final norm" in vector.info["note"]


def test_a_bare_tensor_under_another_name_needs_a_format(tmp_path: Path):
    path = tmp_path / "v.pt"
    torch.save(torch.randn(4, 8), path)
    with pytest.raises(InputError, match=r"a bare tensor, .* give format official .* or assistant-axis"):
        import_vector(path, **WHO)
    assert len(import_vector(path, **WHO, format="official").directions) == 3
    assert len(import_vector(path, **WHO, format="assistant-axis").directions) == 4
    with pytest.raises(InputError, match="holds 3 blocks as official, and blocks is 4"):
        import_vector(path, **WHO, format="official", blocks=4)


def test_assistant_axis_roles_and_axes(tmp_path: Path):
    rows = torch.randn(3, 8)
    torch.save({"vector": rows, "type": "pos_3", "role": "ghost"}, tmp_path / "ghost.pt")
    role = import_vector(tmp_path / "ghost.pt", **WHO)
    assert role.info["role"] == "ghost" and "not a difference" in role.info["note"]
    torch.save({"axis": rows.bfloat16(), "default_mean": rows, "n_roles": 4}, tmp_path / "a.pt")
    assert torch.equal(import_vector(tmp_path / "a.pt", **WHO).directions, rows.bfloat16().float())


def test_a_cap_against_the_axis_is_a_floor_along_it(tmp_path: Path):
    """Capping <h, w> at c, as assistant-axis does, is what flooring <h, -w> at -c does."""
    w, cap, hidden = torch.randn(8), 0.25, torch.randn(64, 8)
    vectors = {"a": {"layer": 2, "vector": w}, "b": {"layer": 0, "vector": torch.randn(8)}}
    items = [{"vector": "a", "cap": cap}, {"vector": "b", "coefficient": 1.0}]
    content = {
        "vectors": vectors,
        "experiments": [{"id": "x", "interventions": items}, {"id": "y", "interventions": []}],
    }
    torch.save(content, tmp_path / "capping_config.pt")
    with pytest.raises(InputError, match="2 experiments, and experiment is None: give one of x, y"):
        import_vector(tmp_path / "capping_config.pt", **WHO)
    vector = import_vector(tmp_path / "capping_config.pt", **WHO, experiment="x")
    assert vector.info["missing_layers"] == [0, 1]
    theirs, ours = w / w.norm(), vector.direction(2) / vector.direction(2).norm()
    capped = hidden - (hidden @ theirs - cap).clamp(min=0)[:, None] * theirs
    floored = hidden + (vector.info["floors"]["2"] - hidden @ ours).clamp(min=0)[:, None] * ours
    torch.testing.assert_close(floored, capped)


def test_an_lm_eval_coefficient_is_multiplied_in(tmp_path: Path):
    row = torch.randn(8)
    edit = {"steering_vector": row, "steering_coefficient": 2.0, "action": "add", "bias": None, "head_index": None}
    torch.save({"h.1": edit}, tmp_path / "v.pt")
    assert torch.equal(import_vector(tmp_path / "v.pt", **WHO).directions[1], 2 * row)
    for change in ({"action": "clamp"}, {"head_index": 3}, {"bias": row}):
        torch.save({"h.1": {**edit, **change}}, tmp_path / "v.pt")
        with pytest.raises(InputError, match="other than add to a block's output"):
            import_vector(tmp_path / "v.pt", **WHO)
    torch.save({"h.1.mlp": edit}, tmp_path / "v.pt")
    with pytest.raises(InputError, match=r"hookpoints such as layers.3"):
        import_vector(tmp_path / "v.pt", **WHO)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("pickle", {}, "format is 'pickle': give one of official, "),
        ("official", {"layer": 1}, "holds every layer: leave layer out"),
        ("gguf", {"layer": 0}, "no place for layer 0"),
        ("gguf", {"layer": 3}, "layer 3 is out of range"),
        ("lm-eval", {"hookpoint": "layers.3"}, "give a block's path with {layer}"),
        ("assistant-axis-capping", {}, "has no floors"),
    ],
)
def test_a_refused_export_writes_nothing(tmp_path: Path, format: str, options: dict, message: str):
    with pytest.raises(InputError, match=message):
        export_vector(make(), out=tmp_path / f"v{FORMATS.get(format, '.pt')}", format=format, **options)
    with pytest.raises(InputError, match=r"no name for a file of format gguf: give one that ends in .gguf"):
        export_vector(make(), out=tmp_path / "v.pt", format="gguf")
    assert not list(tmp_path.iterdir())


# Files that are not what they seem


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"vector": bad}, lambda bad: {"layer_activations": bad}])
@pytest.mark.parametrize("name", ["v.pt", "v_diff.pt", "v.gguf", "v.safetensors"])
def test_a_hostile_pickle_is_refused(tmp_path: Path, wrap: Callable[[Any], Any], name: str):
    torch.save(wrap(Hostile(tmp_path / "executed")), tmp_path / name)
    with pytest.raises(InputError, match="only float tensors, dicts, lists, strings and numbers are read"):
        import_vector(tmp_path / name, **WHO)
    torch.save(wrap(Hostile(tmp_path / "executed")), tmp_path / name, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"no .pt file of torch.save"):
        import_vector(tmp_path / name, **WHO)
    assert not (tmp_path / "executed").exists()


def rewrite(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a .pt file again with its pickle changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


SHAPE, STRIDES = b"K\x04K\x08\x86", b"K\x08K\x01\x86"


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        (b"J\x00\x00\x10\x00K\x08\x86", STRIDES, "no whole .pt file"),  # 2**20 x 8
        (b"M\x00\x04M\x00\xff\x86", b"K\x00K\x00\x86", "declares a tensor of shape"),  # 1024 x 65280, one value
        (b"J\x00\x00\x00\x7fK\x08\x86", b"K\x00K\x00\x86", "at most 1024 x 65536"),
    ],
)
def test_a_pt_that_declares_more_than_it_holds_is_refused(tmp_path: Path, shape: bytes, strides: bytes, message: str):
    path = tmp_path / "v_diff.pt"
    torch.save(torch.randn(4, 8), path)
    rewrite(path, lambda program: program.replace(SHAPE, shape, 1).replace(STRIDES, strides, 1))
    with pytest.raises(InputError, match=message):
        import_vector(path, **WHO)


def test_a_pt_is_neither_unpacked_nor_does_it_allocate(tmp_path: Path):
    path = tmp_path / "v_diff.pt"
    torch.save(torch.zeros(4, 8), path)
    rewrite(path, lambda program: program, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed members"):
        import_vector(path, **WHO)
    torch.save(torch.zeros(4, 8), path)
    rewrite(path, lambda program: program[:-1] + b"cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.")
    with pytest.raises(InputError, match=r"names builtins\.bytearray"):
        import_vector(path, **WHO)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda w: w.add_array("long", [0] * 3000), "more metadata than any control vector"),
        (lambda w: w.add_tensor("direction.1", np.zeros((2, 4), np.float32)), r"a tensor \[2, 4\]"),
        (lambda w: w.add_tensor("direction.one", np.zeros(4, np.float32)), "a tensor 'direction.one'"),
        (lambda w: w.add_tensor("direction.1", np.zeros(4, np.int8)), "I8 values"),
        (lambda w: w.add_tensor("direction.5000", np.zeros(4, np.float32)), "layers out of range"),
        (lambda w: w.add_tensor("direction.1", np.full(4, np.nan, np.float32)), "NaN or infinite"),
        (lambda w: None, "holds no directions"),
    ],
)
def test_gguf_files_that_are_no_control_vectors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable, message: str
):
    monkeypatch.setattr(interop_files, "_MAX_GGUF_READS", 2000)
    write_gguf(tmp_path / "v.gguf", "controlvector", write)
    with pytest.raises(InputError, match=message):
        import_vector(tmp_path / "v.gguf", **WHO)
    write_gguf(tmp_path / "v.gguf", "llama", lambda w: None)
    with pytest.raises(InputError, match="a GGUF file of 'llama': give one of 'controlvector'"):
        import_vector(tmp_path / "v.gguf", **WHO)


def write_gguf(path: Path, architecture: str, write: Callable[[GGUFWriter], Any]) -> None:
    writer = GGUFWriter(path, architecture)
    write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no vectors that are known here"),
        ({}, "no vectors that are known here"),
        ({"vector": "text"}, "a str where a tensor of floats belongs"),
        ({"vector": torch.ones(3, dtype=torch.double)}, r"a tensor \[3\]: give \[layers, hidden\]"),
        ({"vector": torch.ones(0, 4)}, r"a tensor \[0, 4\]"),
        ({"vectors": {}, "experiments": [{}]}, "lacks what .* hold .KeyError"),
        ({"vectors": {}, "experiments": 3}, "lacks what .* hold .TypeError"),
        ({"layer_activations": {"a": torch.ones(3)}}, "layers out of range"),
        ({"layer_activations": {10**9: torch.ones(3)}}, "layers out of range"),
        ({"layer_activations": {0: torch.ones(3), 1: torch.ones(4)}}, "directions of 2 sizes"),
        ({"layer_activations": {0: torch.ones(3)}, "layer_type": "mlp"}, "steers inside the blocks"),
        ({"layers.1": {"steering_vector": torch.ones(3)}}, "lacks what .* hold .KeyError"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: Any, message: str):
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(InputError, match=message):
        import_vector(tmp_path / "v.pt", **WHO)


def test_other_files_are_refused(tmp_path: Path):
    make().save(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="a persona-vector file already"):
        import_vector(tmp_path / "v.safetensors", **WHO)
    save_file({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}, tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="holds 2 tensors: give a file of one"):
        import_vector(tmp_path / "v.safetensors", **WHO)
    with pytest.raises(InputError, match="no vector file"):
        import_vector(tmp_path / "none.pt", **WHO)
    export_vector(make(), out=tmp_path / "v.gguf", format="gguf")
    with pytest.raises(InputError, match="a file of format gguf, not official"):
        import_vector(tmp_path / "v.gguf", **WHO, format="official")
    with pytest.raises(InputError, match="has no experiments"):
        import_vector(tmp_path / "v.gguf", **WHO, experiment="x")


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return a damaged copy: flipped bits, extreme numbers, cuts, repeats and splices, mostly in the header."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = max(1, len(out) if rng.random() < 0.3 else min(len(out), 700))
        at, size = rng.randrange(end), rng.choice((1, 2, 4, 8))
        kind = rng.randrange(7)
        if kind == 0:
            out[at : at + 1] = bytes([out[at] ^ 1 << rng.randrange(8)]) if out else b""
        elif kind == 1:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 2:
            out[at : at + size] = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x80")) * size
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 64))]
        elif kind == 4:
            out[at:at] = out[at : at + rng.choice((1, 8, 64))]
        elif kind == 5:
            start = rng.randrange(len(other))
            out[at : at + size] = other[start : start + size]
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


@pytest.mark.filterwarnings("ignore")  # of torch and numpy, about what the damaged files declare
def test_thousands_of_damaged_files_give_clean_errors_or_vectors(tmp_path: Path):
    rng, vector, whole = random.Random(0), with_floors(make()), {}
    outcomes: list[str | None] = []
    messages: list[str] = []
    for format in FORMATS:
        path = path_for(tmp_path, format)
        export_vector(vector, out=path, format=format)
        whole[format] = path.read_bytes()
    for i in range(720 * len(FORMATS)):
        format = list(FORMATS)[i % len(FORMATS)]
        path, other = path_for(tmp_path, format), whole[rng.choice(list(FORMATS))]
        if path.suffix == ".pt" and rng.random() < 0.7:  # past the checksum of the archive
            path.write_bytes(whole[format])
            rewrite(path, lambda program, other=other: mutated(program, other, rng))
        else:
            path.write_bytes(mutated(whole[format], other, rng))
        try:
            loaded = import_vector(path, **WHO)
        except InputError as error:
            outcomes.append(None)
            messages.append(str(error))
        else:
            assert loaded.directions.isfinite().all() and loaded.directions.numel() < 10**6
            outcomes.append(format)
    assert len(outcomes) >= 5000 and set(outcomes) == {None, *FORMATS}
    assert len(messages) > len(outcomes) / 3
    assert all("\n" not in message and len(message) < 800 and "weights_only" not in message for message in messages)


# The tools themselves


@pytest.fixture
def repeng(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4.0 names it, and NumPy 2 has it no more
    return pytest.importorskip("repeng")


Case = tuple[PreTrainedModel, PersonaVector, int, Tensor]


@pytest.fixture(params=["tiny", pytest.param("embedded", marks=pytest.mark.real)])
def case(request: pytest.FixtureRequest) -> Case:
    """A model, a vector of random directions for it, a layer and token ids."""
    if request.param == "tiny":
        return zoo.build("llama"), make(zoo.BLOCKS, zoo.HIDDEN), 1, torch.arange(20, 28)[None]
    model, tokenizer = request.getfixturevalue("embedded")
    ids = tokenizer("Once upon a time there was a", return_tensors="pt").input_ids
    return model, make(30, 576), 14, ids


def ours(model: PreTrainedModel, vector: PersonaVector, layer: int, coef: float, ids: Tensor) -> Tensor:
    with torch.no_grad(), steer(model, vector, layer=layer, coef=coef):
        return model(ids).logits


def assert_same(theirs: Tensor, ours: Tensor, model: PreTrainedModel, ids: Tensor) -> None:
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert (model(ids).logits - ours).abs().max() > 0.1  # the edit did something, and is gone


def test_repeng_steers_as_we_do(case: Case, repeng: ModuleType, tmp_path: Path):
    model, vector, layer, ids = case
    export_vector(vector, out=tmp_path / "v.gguf", format="gguf")
    control = repeng.ControlVector.import_gguf(tmp_path / "v.gguf")
    assert control.model_type == vector.model and len(control.directions) == len(vector.directions) - 1
    wrapped = repeng.ControlModel(model, [layer])
    try:
        wrapped.set_control(control, 1.5)
        with torch.no_grad():
            theirs = wrapped(ids).logits
    finally:
        wrapped.unwrap()
    assert_same(theirs, ours(model, vector, layer, 1.5, ids), model, ids)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(theirs, ours(model, vector, layer + 1, 1.5, ids), atol=1e-4, rtol=1e-4)


def test_a_repeng_vector_steers_here_as_there(case: Case, repeng: ModuleType, tmp_path: Path):
    model, vector, layer, ids = case
    directions = {k: row.numpy() for k, row in enumerate(vector.directions) if k}
    control = repeng.ControlVector(model_type="llama", directions=directions)
    control.export_gguf(tmp_path / "v.gguf")
    imported = import_vector(tmp_path / "v.gguf", **WHO)
    assert imported.info["model_hint"] == "llama" and imported.info["missing_layers"] == [0]
    wrapped = repeng.ControlModel(model, [layer])
    try:
        wrapped.set_control(control, -2.0)
        with torch.no_grad():
            theirs = wrapped(ids).logits
    finally:
        wrapped.unwrap()
    assert_same(theirs, ours(model, imported, layer, -2.0, ids), model, ids)


def test_steering_vectors_steers_as_we_do(case: Case, tmp_path: Path):
    package = pytest.importorskip("steering_vectors")
    model, vector, layer, ids = case
    export_vector(vector, out=tmp_path / "v.pt", format="steering-vectors", layer=layer)
    theirs = package.SteeringVector(**torch.load(tmp_path / "v.pt", weights_only=True))
    with torch.no_grad(), theirs.apply(model, multiplier=1.5):
        logits = model(ids).logits
    assert_same(logits, ours(model, vector, layer, 1.5, ids), model, ids)
    torch.save(vars(theirs), tmp_path / "saved.pt")
    assert torch.equal(import_vector(tmp_path / "saved.pt", **WHO).direction(layer), vector.direction(layer))
    torch.save(theirs, tmp_path / "object.pt")
    with pytest.raises(InputError, match=r"names steering_vectors\..*vars\(it\)"):
        import_vector(tmp_path / "object.pt", **WHO)


def test_lm_eval_steers_as_we_do(case: Case, tmp_path: Path, tokenizer: Any):
    package = pytest.importorskip("lm_eval.models.hf_steered")
    model, vector, layer, ids = case
    export_vector(1.5 * vector, out=tmp_path / "v.pt", format="lm-eval", layer=layer)
    options = {"tokenizer": tokenizer, "device": "cpu", "backend": "causal"}
    steered = package.SteeredModel(pretrained=model, steer_path=str(tmp_path / "v.pt"), **options)
    with torch.no_grad():
        theirs = steered._model_call(ids)
    assert_same(theirs, ours(model, vector, layer, 1.5, ids), model, ids)


def agreement(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


@pytest.mark.real
def test_llama_cpp_moves_the_logits_as_we_do_layer_by_layer(embedded: tuple, tmp_path: Path):
    from persona_vectors.model.loading import embedded_gguf

    pytest.importorskip("xllamacpp")
    theirs, (model, tokenizer) = LlamaCpp(embedded_gguf()), embedded
    ids = tokenizer("Once upon a time there was a", return_tensors="pt").input_ids
    vector = 5 * make(30, 576)
    export_vector(vector, out=tmp_path / "v.gguf", format="gguf")
    shifted = {k: vector.directions[k - 1].numpy() for k in range(1, 30)}  # what an off-by-one export would hold
    write_gguf(
        tmp_path / "off_by_one.gguf",
        "controlvector",
        lambda writer: [writer.add_tensor(f"direction.{k}", row) for k, row in shifted.items()],
    )
    with torch.no_grad():
        before = model(ids).logits[0, -1].numpy()
    moved = [ours(model, vector, k, 1.0, ids)[0, -1].numpy() - before for k in range(30)]
    plain = theirs.logits(ids[0].tolist())
    assert agreement(plain, before) > 0.99
    for k in range(1, 30):
        delta = theirs.logits(ids[0].tolist(), tmp_path / "v.gguf", k) - plain
        scores = [agreement(delta, move) for move in moved]
        assert scores[k] > 0.98 and max(scores[:k] + scores[k + 1 :]) < 0.9, f"block {k}: {scores}"
    for k in (1, 15, 29):
        wrong = theirs.logits(ids[0].tolist(), tmp_path / "off_by_one.gguf", k) - plain
        assert agreement(wrong, moved[k]) < 0.9


@pytest.mark.real
def test_llama_cpp_refuses_a_direction_for_block_0(tmp_path: Path):
    from persona_vectors.model.loading import embedded_gguf

    pytest.importorskip("xllamacpp")
    theirs = LlamaCpp(embedded_gguf())
    export_vector(make(), out=tmp_path / "v.gguf", format="gguf")
    assert theirs.accepts(tmp_path / "v.gguf")
    for number in (0, 1):
        write_gguf(
            tmp_path / "w.gguf",
            "controlvector",
            lambda writer, number=number: writer.add_tensor(f"direction.{number}", np.zeros(8, np.float32)),
        )
        assert theirs.accepts(tmp_path / "w.gguf") == bool(number)
