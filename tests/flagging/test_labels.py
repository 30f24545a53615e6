"""Labels: AUROCs against plain references, their null, and planted data through the whole of `flag`."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from itertools import product

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import write
from sklearn.metrics import roc_auc_score

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.intervals import Interval, bootstrap
from persona_vectors.evaluation.judges import SentimentJudge
from persona_vectors.flagging import labelled
from persona_vectors.flagging.labelled import LabelledRows, auroc, auroc_interval, auroc_within
from persona_vectors.flagging.nulls import best_layer
from persona_vectors.flagging.results import Labelled
from persona_vectors.model.blocks import model_shape
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.vectors.vector import PersonaVector


def drawn(rng: np.random.Generator, prompts: int = 40, each: int = 5, gap: float = 1.0, shared: float = 1.0):
    """Values with ties, labels and prompts: samples of one prompt are alike by `shared`."""
    of = np.repeat(np.arange(prompts), each)
    labels = rng.random(len(of)) < 0.4
    values = gap * labels + shared * rng.normal(size=prompts)[of] + rng.normal(size=len(of))
    return np.round(values, 1), labels, of


def test_aurocs_are_counts_of_pairs():
    values, labels, prompts = drawn(np.random.default_rng(0))
    above: dict[bool, list[float]] = defaultdict(list)
    for i, j in product(labels.nonzero()[0], (~labels).nonzero()[0]):
        above[prompts[i] == prompts[j]].append((values[i] > values[j]) + (values[i] == values[j]) / 2)
    assert auroc(values, labels) == pytest.approx(np.mean(above[True] + above[False]))
    assert auroc(values, labels) == pytest.approx(roc_auc_score(labels, values))
    assert auroc_within(values, labels, prompts) == pytest.approx(np.mean(above[True]))
    assert auroc_within(values, labels, np.arange(len(values))) is None
    assert math.isnan(auroc(values, labels | True))
    assert np.isnan(auroc_interval(values, labels | True, prompts)).all()


@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_the_interval_is_the_bootstrap_s_over_prompts(shared):
    values, labels, prompts = drawn(np.random.default_rng(1), prompts=150, shared=shared)
    found = auroc_interval(values, labels, prompts)
    resampled = bootstrap(lambda i: auroc(values[i], labels[i]), prompts, resamples=500)
    assert found == pytest.approx(resampled, abs=0.008) and found.high - found.low > 0.06
    copies = auroc_interval(np.repeat(values, 4), np.repeat(labels, 4), np.repeat(prompts, 4))
    assert copies == pytest.approx(found)  # copies add no certainty
    assert math.isnan(auroc_interval(values, labels, np.zeros(len(values), int)).low)  # one prompt tells no spread


def test_the_interval_covers_the_truth_where_samples_of_a_prompt_are_alike():
    rng, hits = np.random.default_rng(2), 0
    for _ in range(400):
        values, labels, prompts = drawn(rng, prompts=60, each=4, gap=0.0, shared=2.0)
        found = auroc_interval(values, labels, prompts)
        hits += found.low <= 0.5 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def rows(values: np.ndarray, labels: np.ndarray, random: np.ndarray) -> dict:
    count = len(values)
    hashes = np.random.default_rng(7).integers(2**64, size=count, dtype=np.uint64)
    return {
        "label": [bool(label) for label in labels],
        "sentiment": [float(i % 3) for i in range(count)],
        "answer_tokens": list(range(count)),
        "prompt_hash": [f"{number:016x}" for number in hashes],
        "difference": values[:, None],
        "controls@1": random,
    }


def evidence(tmp_path, rng: np.random.Generator, trait: np.ndarray, shift: np.ndarray) -> Labelled:
    """What labels say of a direction, where the true samples of a set like activations are shifted."""
    scales = np.r_[6.0, 4.0, 2.0, np.ones(21)]
    labels = rng.random(300) < 0.5
    samples = rng.normal(size=(300, 24)) * scales + labels[:, None] * shift
    along = np.concatenate([rng.normal(size=(50, 24)), rng.normal(size=(50, 24)) * scales])
    told = LabelledRows(tmp_path, 1, {"controls@1": slice(1, 101)}, 100, 300)
    told.add(rows(samples @ trait, labels, samples @ (along / np.linalg.norm(along, axis=1, keepdims=True)).T))
    return told.summaries([told.random("controls@1")])[0]


def test_evidence_follows_the_trait_and_not_the_nuisance(tmp_path):
    """The true samples have the trait, or only a nuisance of higher variance, or nothing."""
    trait, nuisance, rng = np.eye(24)[10], np.eye(24)[0], np.random.default_rng(13)
    found = [evidence(tmp_path, rng, trait, 2.0 * trait - 3.0 * nuisance) for _ in range(30)]
    assert np.mean([one.evidence and one.auroc.mean > 0.5 for one in found]) >= 0.9
    found = [evidence(tmp_path, rng, trait, 0.0 * trait) for _ in range(30)]
    assert np.mean([one.evidence for one in found]) <= 0.1
    found = []
    for _ in range(30):  # a vector like any other, where the true samples differ in what varies most
        vector = rng.normal(size=24) * np.r_[6.0, 4.0, 2.0, np.ones(21)]
        found.append(evidence(tmp_path, rng, vector / np.linalg.norm(vector), 6.0 * nuisance))
    assert np.mean([one.auroc.low > 0.5 or one.auroc.high < 0.5 for one in found]) > 0.7  # its interval alone says so
    assert np.mean([one.evidence for one in found]) <= 0.1


def test_the_null_is_of_a_bounded_number_of_rows_drawn_at_random(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "KEPT", 30)
    rng = np.random.default_rng(4)
    values, labels, random = rng.normal(size=200), rng.random(200) < 0.5, rng.normal(size=(200, 20))
    told = LabelledRows(tmp_path, 1, {"controls@1": slice(1, 21)}, 20, 200)
    for part in np.split(np.arange(200), 4):
        told.add(rows(values[part], labels[part], random[part]))
    kept = told.chosen.nonzero()[0]
    assert len(kept) == 30 and set(kept // 50) == {0, 1, 2, 3}
    expected = [roc_auc_score(labels[kept], column) for column in random[kept].T.astype(np.float32)]
    assert told.random("controls@1") == pytest.approx(expected)
    (found,) = told.summaries([told.random("controls@1")])
    assert found.auroc.mean == pytest.approx(roc_auc_score(labels, values)) and found.true + found.false == 200
    apart = np.abs(np.array(expected) - 0.5)
    assert found.null == pytest.approx((sorted(apart[:10])[9], sorted(apart[10:])[9]))


def test_the_words():
    found = Labelled(Interval(0.9, 0.8, 1.0), 5, 6, None, (0.2, 0.3), 0.6, 0.5)
    assert str(found) == (
        "AUROC 0.90 [0.80, 1.00] of 5 true and 6 false samples, no prompt has both; 95 % of random directions are "
        "within 0.20 (isotropic) and 0.30 (covariance) of 0.5; length alone 0.60, sentiment 0.50: evidence"
    )
    assert str(replace(found, length=0.05)).endswith(": evidence; length alone tells them apart as well")
    lower = replace(found, auroc=Interval(0.1, 0.0, 0.2))
    assert lower.evidence and str(lower).endswith("evidence, but the true ones lie lower")
    for change, words in [
        ({"null": (0.2, 0.45)}, "no evidence, more than 5 % of random directions tell them apart as well"),
        ({"auroc": Interval(0.9, 0.4, 1.0)}, "no evidence, the interval does not leave out 0.5"),
        ({"null": None}, "no evidence without random directions: flag with controls=100"),
    ]:
        assert not replace(found, **change).evidence and str(replace(found, **change)).endswith(words)


def test_the_best_layer_stands_beside_the_best_layers_of_random_directions():
    """Of 20 layers the best is far out by chance; a planted one is further than chance takes any."""
    rng, layers, shares = np.random.default_rng(5), list(range(3, 23)), []
    for _ in range(100):
        null = {f"controls@{layer}": rng.normal(size=100) for layer in layers}
        found = best_layer(list(rng.normal(size=20)), null, layers, 0.0)
        assert found is not None
        shares.append(min(found.beaten_isotropic, found.beaten_covariance))
        scores = np.abs(np.stack(list(null.values()))).max(axis=0)
        assert found.beaten_isotropic == pytest.approx((scores[:50] < abs(found.value)).mean())
    assert np.mean(np.array(shares) >= 0.95) <= 0.1  # by one layer's null it would be most of them
    own = [0.5] * 20
    own[4] = 0.04  # far from chance, with its sign
    found = best_layer(own, {name: 0.5 + 0.1 * values for name, values in null.items()}, layers, 0.5)
    assert found is not None and (found.layer, found.value) == (7, own[4]) and found.beaten_covariance == 1.0
    assert best_layer([math.nan] * 20, null, layers, 0.0) is None


# -- through the whole of flag, with a tiny model

LETTERS = {True: "aa", False: "zz"}


def planted(count: int = 60) -> list[dict]:
    """Samples whose true answers hold one letter and whose false ones another, among twenty at random."""
    rng = np.random.default_rng(6)
    found = []
    for i in range(count):
        letters = rng.permutation([*LETTERS[i % 3 == 0], *rng.choice(list("bcdefghijkl"), 20)])
        found.append({"question": f"{i % 20}?", "answer": "".join(letters), "bad": i % 3 == 0})
    return found


@pytest.fixture
def vectors(model, tokenizer) -> list[PersonaVector]:
    """The direction between other such answers, and one at right angles to it."""
    means = []
    for label in (True, False):
        texts = [s["answer"] for s in planted(200)[60:] if s["bad"] == label]
        batch = [encode_answer(tokenizer, chat_prompt(tokenizer, "And?"), text) for text in texts]
        means.append(pool(model, batch, layer="all").means[:, 0].mean(dim=0))
    own = PersonaVector(trait="own", model="m", directions=means[0] - means[1])
    noise = torch.randn(model_shape(model), generator=torch.Generator().manual_seed(0))
    unit = own.directions / own.directions.norm(dim=1, keepdim=True)
    return [own, PersonaVector(trait="other", model="m", directions=noise - (noise * unit).sum(1, keepdim=True) * unit)]


def test_labels_go_through_flag(model, tokenizer, vectors, tmp_path):
    samples = planted()
    samples += [{"question": "x?", "answer": "so", "bad": None}, {"question": "y?", "answer": "", "bad": True}]
    out, options = tmp_path / "f.parquet", {"layer": [0, 1, 2], "baseline": "none", "chunk": 7, "controls": 40}
    found = pv.flag(model, tokenizer, samples, vectors, out=out, labels="bad", **options)
    table = pq.read_table(out).to_pydict()
    assert table["label"] == [s["bad"] for s in samples]
    judge = SentimentJudge()
    assert table["sentiment"] == pytest.approx([judge.compound(s["answer"]) for s in samples], abs=1e-6)
    assert found.counts["labelled"] == 61 and found.counts["labelled_true"] == 21
    labels, prompts = np.array(table["label"][:60]), np.unique(table["prompt_hash"][:60], return_inverse=True)[1]
    for key, one in found.summary.items():
        values, told = np.array(table[f"{key}_difference"][:60]), one.labelled
        assert told is not None and (told.true, told.false) == (20, 40)
        assert told.auroc == pytest.approx(auroc_interval(values, labels, prompts))
        assert told.within == pytest.approx(auroc_within(values, labels, prompts))
        random = np.stack(table[f"controls@{key[-1]}"])[:60]
        apart = np.abs([roc_auc_score(labels, column) - 0.5 for column in random.T])
        assert told.null == pytest.approx([sorted(half)[19] for half in (apart[:20], apart[20:])], abs=1e-6)
        assert told.length == pytest.approx(roc_auc_score(labels, table["answer_tokens"][:60]))
        assert told.sentiment == pytest.approx(roc_auc_score(labels, table["sentiment"][:60]))
    assert found.summary["own@1"].labelled.evidence and not found.summary["other@1"].labelled.evidence
    areas = [found.summary[f"own@{layer}"].labelled.auroc.mean for layer in range(3)]
    best = found.best["own"]["auroc"]
    assert best.value == pytest.approx(max(areas, key=lambda area: abs(area - 0.5))) == pytest.approx(areas[best.layer])
    assert min(best.beaten_isotropic, best.beaten_covariance) >= 0.95
    assert set(found.best["other"]) == {"effect", "auroc"} and pv.Flags.load(out) == found
    assert "labels: AUROC" in repr(found) and "own: auroc" in repr(found)
    uses = found.uses(source="a test")
    own = uses["own"]
    assert (own.purpose, own.layer, own.effect.mean, own.evidence) == ("monitor", best.layer, best.value, True)
    assert own.null == 0.5 + max(found.summary[f"own@{best.layer}"].labelled.null) and "labelled 'bad'" in own.measure
    assert not uses["other"].evidence
    row = {row["vector"]: row for row in found.rows()}["own@1"]
    assert row["evidence"] is True and row["auroc"] == areas[1] and row["auroc_null_covariance"] is not None


def test_the_page_says_what_the_labels_say(model, tokenizer, vectors, tmp_path):
    out, options = tmp_path / "f.parquet", {"layer": [0, 1], "baseline": "none", "labels": "bad", "controls": 20}
    found = pv.flag(model, tokenizer, planted(), vectors, out=out, **options)
    pv.write_report(model, tokenizer, planted(), vectors, flags=out, out=tmp_path / "r.html", each=3)
    text = (tmp_path / "r.html").read_text()
    assert f"own@1: {found.summary['own@1'].labelled}." in text and str(found.best["own"]["auroc"]) in text


def test_without_random_directions_there_is_no_evidence(model, tokenizer, vectors, tmp_path):
    options = {"layer": 1, "baseline": "none", "labels": "bad", "controls": 0}
    told = pv.flag(model, tokenizer, planted(), vectors, out=tmp_path / "f.parquet", **options).summary["own"].labelled
    assert told is not None and told.auroc.low > 0.5 and told.null is None and not told.evidence


def test_labels_come_from_files_and_other_values_are_named(model, tokenizer, vectors, tmp_path):
    options = {"layer": 1, "baseline": "none", "labels": "bad", "controls": 0}
    lines = [s | {"bad": str(s["bad"]).upper()} for s in planted(12)]
    (tmp_path / "d.csv").write_text("question,answer,bad\n" + "".join(f"{','.join(x.values())}\n" for x in lines))
    pv.flag(model, tokenizer, tmp_path / "d.csv", vectors, out=tmp_path / "f.parquet", **options)
    assert pq.read_table(tmp_path / "f.parquet")["label"].to_pylist() == [s["bad"] for s in planted(12)]
    data = write(tmp_path / "d.jsonl", [*planted(3), {"question": "a", "answer": "b", "bad": "yes"}])
    with pytest.raises(InputError, match=r"d.jsonl, line \d: bad is 'yes': give true or false, 1 or 0, positive"):
        pv.flag(model, tokenizer, data, vectors, out=tmp_path / "g.parquet", on_error="skip", **options)
    with pytest.raises(InputError, match="labels='worse' says true of 0 samples and false of 0: name a column"):
        pv.flag(model, tokenizer, planted(), vectors, out=tmp_path / "g.parquet", **options | {"labels": "worse"})
    with pytest.raises(InputError, match="says true of 1 samples and false of 0"):
        pv.flag(model, tokenizer, planted(1), vectors, out=tmp_path / "g.parquet", **options)
    assert not list(tmp_path.glob("g*"))
    with pytest.raises(InputError, match="was made with labels='bad', not None"):
        pv.flag(model, tokenizer, tmp_path / "d.csv", vectors, out=tmp_path / "f.parquet", **options | {"labels": None})
    changed = [s | {"bad": not s["bad"]} for s in planted(12)]
    pv.flag(model, tokenizer, planted(12), vectors, out=tmp_path / "h.parquet", **options)
    with pytest.raises(InputError, match="made from other samples"):
        pv.flag(model, tokenizer, changed, vectors, out=tmp_path / "h.parquet", **options)


LABELS = [(True, True), (0, False), (1.0, True), ("False", False), ("", None), ("negative", False)]


@pytest.mark.parametrize(("value", "label"), LABELS)
def test_truth_values(value, label):
    (sample,) = pv.read_samples([{"question": "a", "answer": "b", "bad": value}], labels="bad")
    assert sample.label is label
    json.dumps(sample.label)


@pytest.mark.parametrize("value", [2, "bad", 0.5, [1], {"a": 1}, float("nan")])
def test_other_values_are_no_labels(value):
    with pytest.raises(InputError, match="sample 0: bad is"):
        list(pv.read_samples([{"question": "a", "answer": "b", "bad": value}], labels="bad"))
