"""Recommended uses: kept in the file, used where no layer is given, and refused where there is no evidence."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import hooks, random_direction, two_vectors, use
from safetensors import safe_open
from safetensors.torch import save_file

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval
from persona_vectors.vectors.directions import per_dose
from persona_vectors.vectors.stored import _checksum
from persona_vectors.vectors.uses import coherent_range
from persona_vectors.vectors.vector import PersonaVector

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[5, 6, 7, 8]])


def change_header(path: Path, **changes: str | None) -> None:
    """Write a file anew with other header entries, and the checksum that they ask for."""
    with safe_open(path, framework="pt") as file:
        header, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = {name: text for name, text in {**header, **changes}.items() if text is not None and name != "checksum"}
    save_file(tensors, path, metadata=header | {"checksum": _checksum(header, tensors)})


def test_uses_are_kept_in_the_file(model, tmp_path):
    path = tmp_path / "v.safetensors"
    vector = random_direction(model)
    for each in (
        use("flag"),
        use(coherent=(-1.0, 4.0)),
        use("flag", layer=2),
        use("monitor", evidence=False, null=None),
    ):
        vector = vector.with_use(each)
    vector.save(path)
    loaded = PersonaVector.load(path)
    assert loaded.uses == vector.uses and list(loaded.uses) == ["steer", "monitor", "flag"]
    assert loaded.recommended("flag") == use("flag", layer=2)  # the later one
    assert "layer 1, coef +2, coherent from -1 to +4" in loaded._repr_html_()
    assert not (2 * loaded).uses and not (loaded - loaded).uses  # what was measured is of this direction alone


def test_a_file_from_before_uses_is_read_and_a_broken_one_is_named(model, tmp_path):
    path = tmp_path / "v.safetensors"
    random_direction(model).with_use(use()).save(path)
    change_header(path, uses=None)
    assert PersonaVector.load(path).uses == {}
    change_header(path, uses='{"steer": {"purpose": "steer", "layer": 1}}')
    with pytest.raises(InputError, match=r"v\.safetensors holds a broken recommended use: .*get the file again"):
        PersonaVector.load(path)
    change_header(path, uses='{"fly": {"purpose": "fly"}}')
    with pytest.raises(InputError, match=r"v\.safetensors"):
        PersonaVector.load(path)


def test_what_is_not_recommended_is_an_error_that_names_the_command(model):
    vector = random_direction(model)
    for purpose, command in (("steer", "contrast MODEL VECTOR"), ("monitor", "--baseline none"), ("flag", "--labels")):
        with pytest.raises(InputError, match=f"no layer to {purpose} at: give a layer, .*{command}.* --store"):
            vector.recommended(purpose)
    poor = vector.with_use(use(evidence=False, effect=Interval(0.1, -0.1, 0.3)))
    with pytest.raises(
        InputError, match=r"no recommendation to steer, at its best layer, 1, AUROC \+0\.1 .* the largest"
    ):
        poor.recommended("steer")
    with pytest.raises(InputError, match="layer 3 is out of range"):
        vector.with_use(use(layer=3))
    with pytest.raises(InputError, match="purpose is 'fly': give one of steer, monitor, flag"):
        use("fly")


def test_steering_without_a_layer_is_the_recommended_edit(model):
    vector = replace(random_direction(model), residual_norms=torch.ones(3)).with_use(use())
    cases = [({}, {"layer": 1, "coef": 2.0}), ({"coef": -1.0}, {"layer": 1, "coef": -1.0})]
    for given, same in [*cases, ({"dose": 0.5}, {"layer": 1, "dose": 0.5})]:
        logits = []
        for options in (given, same):
            with pv.steer(model, vector, **options), torch.no_grad():
                logits.append(model(IDS).logits)
        assert torch.equal(*logits)
    with pytest.raises(InputError, match=r"give either coef= .* or dose="), pv.steer(model, vector, layer=1):
        pass  # the stored coefficient is of the stored layer alone
    narrow = vector.with_use(use(positions="response"))
    with pytest.raises(InputError, match="recommends positions='response': give them"), pv.steer(model, narrow):
        pass
    with pytest.raises(InputError, match="stores no layer to steer at"), pv.steer(model, random_direction(model)):
        pass
    assert hooks(model) == 0


def test_reading_without_a_layer_is_at_the_recommended_one(model, tokenizer, tmp_path):
    one, two = two_vectors(model)
    both = [one.with_use(use("monitor", 2)).with_use(use("flag", 0)), two.with_use(use("monitor", 2))]
    read = []
    for options in ({}, {"layer": 2}):
        with pv.monitor(model, both, **options) as trace:
            model(IDS)
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
        read.append([trace["t"], pv.project(model, tokenizer, [talk], both, **options)["response_mean"]["t"]])
    assert all(torch.equal(a, b) for a, b in zip(*read))
    assert pv.calibrate(model, tokenizer, both[0], ["How?"], max_new_tokens=3).layers == (2,)
    data = [{"question": "How?", "answer": "So."}]
    options = {"baseline": "prompt_last", "controls": 0}
    found = pv.flag(model, tokenizer, data, both[0], out=tmp_path / "f.parquet", **options)
    assert found.settings["layers"] == [0]
    other = two.with_use(use("monitor", 1))
    with pytest.raises(InputError, match=r"layers to monitor at differ \(t 2, .* 1\): give a layer"):
        pv.project(model, tokenizer, [talk], [both[0], other])


def test_the_coherent_range_ends_where_the_first_strength_breaks_the_model():
    assert coherent_range({1: True, 2: True, 3: False, 4: True, -1: False, -2: True}) == (0.0, 2)
    assert coherent_range({-2: True, -1: True, 0: True}) == (-2, 0.0)


ROW = re.compile(r"^(\w+) +(\d+) +([\d.]+)  (\S+) \[(\S+), (\S+)\] +\S+ +(\S+) .* (yes|no)$", re.MULTILINE)


def test_the_shipped_vectors_say_what_the_result_pages_say():
    pages = ROOT / "notebooks" / "paper"
    contrast = {row[1]: row for row in ROW.finditer((pages / "contrast.md").read_text("utf-8"))}
    with (pages / "flagging.csv").open(encoding="utf-8") as file:
        flagging = {(row["trait"], row["method"]): row for row in csv.DictReader(file)}
    assert set(contrast) == set(pv.list_traits())
    for trait, row in contrast.items():
        vector = pv.load_vector(f"smollm2-135m/{trait}")
        steer, values = vector.uses["steer"], list(map(float, row.group(4, 5, 6, 7)))
        assert steer.evidence == (row[8] == "yes")
        if trait != "optimistic":
            assert (steer.layer, *steer.effect, steer.null) == (int(row[2]), *values)
            assert steer.coef == pytest.approx(float(row[3]) * per_dose(vector, steer.layer), abs=1e-6)
        for purpose, method in (("monitor", "raw projection"), ("flag", "projection difference")):
            found, told = vector.recommended(purpose), flagging[trait, method]
            assert found.effect == tuple(float(told[name]) for name in ("auroc", "low", "high"))
            assert (found.layer, str(found.evidence)) == (int(told["layer"]), told["evidence"])
            assert found.null == max(float(told[f"{kind} 95th"]) for kind in ("isotropic", "covariance"))


def test_the_page_of_uses_says_what_the_files_say():
    page = (ROOT / "notebooks" / "paper" / "uses.md").read_text("utf-8")
    for name in pv.list_vectors():
        vector = pv.load_vector(name)
        (cells,) = [line.split(" | ")[1::2] for line in page.splitlines() if line.startswith(f"| {vector.trait} |")]
        steer, monitor, flag = vector.uses.values()
        place = f"layer {steer.layer}, {steer.coef:+.3g}"
        assert cells[0] == (place if steer.evidence else f"no recommendation (tried: {place})")
        assert cells[1:3] == [f"layer {monitor.layer}", f"layer {flag.layer}"]


def test_the_shipped_optimistic_vector_steers_as_the_sweep_chose():
    steer, page = pv.load_vector("smollm2-135m/optimistic").recommended("steer"), ROOT / "notebooks/paper/sweep.md"
    text = " ".join(page.read_text("utf-8").split())
    assert steer.source in text and f"chooses layer {steer.layer} and {steer.coef:+g}" in text
    assert f"gives {steer.effect:+.1f} of 100; the ten random vectors -5.7 to {steer.null:g}" in text
