"""Sharing on the Hub, against a server on loopback that speaks its endpoints; and the card."""

import pickle
from dataclasses import replace

import pytest
import torch
from helpers import random_direction, run, use
from hub_server import TOKEN, serving
from huggingface_hub import ModelCard, constants

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.vectors import hub as hub_files
from persona_vectors.vectors.card import MADE, vectors_card
from persona_vectors.vectors.vector import PersonaVector

REPO = "lab/traits"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, as the one Hub that there is; its cache is empty, and the user is logged in."""
    with serving() as running:
        for name, value in {
            "ENDPOINT": running.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its tries
        yield running


@pytest.fixture
def vector(model) -> PersonaVector:
    info = {"command": "persona-vectors extract m calm", "pairs_kept": 9, "licence": "MIT | <b>"}
    norms = {"residual_norms": torch.full((3,), 2.0), "separation": torch.tensor([0.5, 0.6, 0.7])}
    made = replace(random_direction(model), trait="calm", model="lab/tiny", info=info, **norms)
    return made.with_use(use(coherent=(-1.0, 4.0))).with_use(use("flag", evidence=False))


def bits(vector: PersonaVector) -> bytes:
    return vector.directions.numpy().tobytes() + vector.residual_norms.numpy().tobytes()


def test_what_is_pushed_comes_back_bit_identical(hub, vector):
    name = vector.push_to_hub(REPO)
    kept = hub_files.download(hub_files.parse(name))
    assert kept.read_bytes() == hub.repos[REPO][-1]["calm.safetensors"]
    for asked in (f"{REPO}/calm", f"{REPO}/calm@main", name):
        loaded = pv.load_vector(asked)
        assert bits(loaded) == bits(vector) and (loaded.info, loaded.uses) == (vector.info, vector.uses)
    assert pv.list_vectors(REPO) == [f"{REPO}/calm"] and not hub.private


def test_a_revision_is_the_file_as_it_was(hub, vector):
    first = vector.push_to_hub(REPO)
    second = (2 * vector)._derived("calm", 3 * vector.directions).push_to_hub(REPO)
    assert first != second
    assert pv.load_vector(first).directions.equal(vector.directions)
    assert pv.load_vector(f"{REPO}/calm").directions.equal(3 * vector.directions)
    assert pv.list_vectors(first.replace("/calm", "")) == [first]
    with pytest.raises(InputError, match=r"lab/traits has no revision 'v9': give a branch, a tag or a commit"):
        pv.load_vector(f"{REPO}/calm@v9")
    with pytest.raises(InputError, match="has no revision 'v9'"):
        pv.list_vectors(f"{REPO}@v9")


def test_offline_the_cache_is_enough(hub, vector, monkeypatch):
    name = vector.push_to_hub(REPO)
    pv.load_vector(f"{REPO}/calm")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    for known in (f"{REPO}/calm", name):
        assert bits(pv.load_vector(known)) == bits(vector)
    with pytest.raises(InputError, match="is not in the cache, and the Hub was not reached"):
        pv.load_vector(f"{REPO}/evil")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        pv.list_vectors(REPO)
    assert len(hub.asked) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = len(hub.asked)
    pv.load_vector(f"{REPO}/calm")
    assert [method for method, *_ in hub.asked[before:]] == ["HEAD"]  # the same etag: nothing is sent again


def test_an_interrupted_download_goes_on_and_never_passes_for_whole(hub, vector, monkeypatch):
    vector.push_to_hub(REPO)
    hub.cut_at = 300
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what it has got is on the disk chunk by chunk
    whole = pv.load_vector(f"{REPO}/calm")  # the client itself asks again for what is missing
    ranges = [given for method, _, given in hub.asked if method == "GET" and given]
    assert ranges[:2] == ["bytes=300-", "bytes=600-"] and bits(whole) == bits(vector)
    vector.push_to_hub("lab/other")
    hub.cut_at = 0
    with pytest.raises(InputError, match=r"lab/other/calm\.safetensors broke off .* run it again"):
        pv.load_vector("lab/other/calm")
    hub.cut_at = None
    assert bits(pv.load_vector("lab/other/calm")) == bits(vector)


@pytest.mark.parametrize("where", ["on the way", "in the cache"])
def test_a_tampered_file_is_refused(hub, vector, where, tmp_path):
    vector.push_to_hub(REPO)
    replace(vector, directions=-vector.directions).save(tmp_path / "evil.safetensors")  # a checksum of its own
    other = (tmp_path / "evil.safetensors").read_bytes()
    if where == "on the way":
        assert len(other) == len(hub.repos[REPO][-1]["calm.safetensors"])
        hub.serves["calm.safetensors"] = other
    else:
        pv.load_vector(f"{REPO}/calm")
        hub_files.download(hub_files.parse(f"{REPO}/calm")).resolve().write_bytes(other)
    with pytest.raises(InputError, match=r"is not what the Hub says \(its hash differs"):
        pv.load_vector(f"{REPO}/calm")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("it was executed",))


def test_what_is_no_vector_is_refused_and_not_executed(hub, vector):
    vector.push_to_hub(REPO)
    bomb = pickle.dumps(Bomb())
    hub.commit(REPO, {"bomb.safetensors": bomb, "bomb.pt": bomb, "pytorch_model.bin": bomb})
    with pytest.raises(InputError, match="is no whole safetensors file"):
        pv.load_vector(f"{REPO}/bomb")
    asked = len(hub.asked)
    with pytest.raises(InputError, match=r"has no pytorch_model\.safetensors at main: pv.list_vectors\('lab/traits'\)"):
        pv.load_vector(f"{REPO}/pytorch_model")
    assert not [path for _, path, _ in hub.asked[asked:] if path.endswith((".pt", ".bin"))]
    assert pv.list_vectors(REPO) == [f"{REPO}/bomb", f"{REPO}/calm"]


def test_who_may_not_is_told_and_no_token_is_in_an_error(hub, vector, monkeypatch):
    vector.push_to_hub("lab/secret", private=True)
    assert hub.private == {"lab/secret"} and bits(pv.load_vector("lab/secret/calm")) == bits(vector)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    errors = []
    for action in (lambda: pv.list_vectors("lab/secret"), lambda: pv.load_vector("lab/none/calm")):
        with pytest.raises(InputError, match=r"has no repository lab/(secret|none) that you may read") as caught:
            action()
        errors.append(caught)
    with pytest.raises(InputError, match=r"you may not do that in lab/traits: log in .*hf auth login") as caught:
        vector.push_to_hub(REPO)
    assert all("hf_" not in str(error.value) for error in [*errors, caught])
    assert not hub.repos.get(REPO)


def test_names_that_are_none(vector, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vectors" / "tiny").mkdir(parents=True)
    for name in ("vectors/tiny/calm", "a/b", "a/../b", "a//b/c", "../a/b/c", "a/b/c@", "a/b/c@x@y"):
        with pytest.raises(InputError, match=r"no vector is called .*org/repo/vector on the Hub"):
            pv.load_vector(name)
    with pytest.raises(InputError, match="is no name on the Hub: give org/name"):
        replace(vector, trait="a?").push_to_hub(REPO)
    assert hub_files.parse("lab/traits/deep/calm@refs/pr/1") == ("lab/traits", "deep/calm.safetensors", "refs/pr/1")


def test_a_card_says_what_the_file_says(vector, tmp_path):
    vector.save(tmp_path / "calm.safetensors")
    text, _ = run("card", tmp_path / "calm.safetensors")
    assert text == vectors_card([vector])
    card = ModelCard(text)
    assert card.data.base_model == ["lab/tiny"] and card.data.license == "other" and "persona-vectors" in card.data.tags
    for said in (
        "**Made by**: `persona-vectors extract m calm`",
        "| steer | layer 1, coef +2 | AUROC +0.7 [+0.6, +0.8] beside +0.55, the largest of 9 | `pv.flag`, m, 2026",
        "no recommendation (tried: layer 1)",
        "coherent from coefficient -1 to +4",
        "**Licence**: MIT \\| &lt;b>",
        "pv.load_vector('calm.safetensors')",
    ):
        assert said in text, said
    norm = float(vector.directions[2].norm())
    assert f"| 2 | {norm:.2f} | {norm / 2:.2f} | ? | 0.70 |" in text
    run("card", tmp_path / "calm.safetensors", "--out", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == text
    bare = vectors_card([PersonaVector("x", "m", torch.ones(1, 2))])
    assert "None was measured" in bare and "base_model" not in bare and "**Made by**: unknown" in bare


def test_a_repository_s_card_tells_of_all_its_vectors_and_a_written_one_is_left_alone(hub, vector):
    vector.push_to_hub(REPO)
    replace(vector, trait="evil", model="lab/big").push_to_hub(REPO)
    vector.with_use(use("monitor", 2)).push_to_hub(REPO)
    text = hub.repos[REPO][-1]["README.md"].decode()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## calm", "## evil"]
    assert text.count("| monitor | layer 2 |") == 1 and f"pv.load_vector('{REPO}/evil')" in text
    assert ModelCard(text).data.base_model == ["lab/big", "lab/tiny"] and text.count(MADE) == 1
    hub.commit(REPO, {"README.md": b"# Mine"})
    vector.push_to_hub(REPO)
    assert hub.repos[REPO][-1]["README.md"] == b"# Mine"
