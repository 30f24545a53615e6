"""Comparisons of two datasets: a verdict only where random directions cannot give it as well."""

import numpy as np
import pytest
from scipy import stats

from persona_vectors.data.intervals import Interval
from persona_vectors.flagging.compare import Comparison, _compared, _interval, _Read

HIDDEN = 24
SCALES = np.r_[6.0, 4.0, 2.0, np.ones(HIDDEN - 3)]  # what activations vary by: length and topic first


def directions(rng: np.random.Generator, trait: np.ndarray) -> np.ndarray:
    """The trait's direction, then 50 isotropic ones and 50 with the covariance, [direction, hidden], of length 1."""
    drawn = np.concatenate([trait[None], rng.normal(size=(50, HIDDEN)), rng.normal(size=(50, HIDDEN)) * SCALES])
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def read(samples: np.ndarray, along: np.ndarray) -> _Read:
    values = samples @ along.T
    place = np.arange(len(values))
    return _Read(values[:, 0], place, place, values[:, 1:], place)


def share_of_verdicts(draw, *, trait_of, draws: int = 200) -> dict[str | None, float]:
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        along = directions(rng, trait_of(rng))
        one, two = draw(rng)
        found.append(_compared(read(one, along), read(two, along), None).verdict)
    return {verdict: found.count(verdict) / draws for verdict in ("first", "second", None)}


def like_activations(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=HIDDEN) * SCALES


def test_two_sets_of_one_source_are_seldom_told_apart():
    shares = share_of_verdicts(
        lambda rng: [rng.normal(size=(400, HIDDEN)) * SCALES for _ in range(2)], trait_of=like_activations
    )
    assert shares["first"] + shares["second"] <= 0.05


def test_two_neutral_sources_are_seldom_called_different_in_the_trait():
    """They differ in everything that varies, and nearly every direction's interval leaves out zero."""
    gaps = []

    def draw(rng):
        shift = rng.normal(size=HIDDEN) * SCALES  # another topic, length and form
        one, two = (rng.normal(size=(400, HIDDEN)) * SCALES for _ in range(2))
        along = directions(rng, like_activations(rng))
        found = _compared(read(one + shift, along), read(two, along), None)
        gaps.append(not found.gap.low <= 0 <= found.gap.high)
        return one + shift, two

    shares = share_of_verdicts(draw, trait_of=like_activations)
    assert np.mean(gaps) > 0.8 and shares["first"] + shares["second"] <= 0.1


def test_a_trait_that_is_there_is_found_with_its_sign():
    """A quarter of one set shows the trait, of one source: along a direction in which activations vary little."""
    trait = np.zeros(HIDDEN)
    trait[10] = 1.0

    def draw(rng):
        one, two = (rng.normal(size=(400, HIDDEN)) * SCALES for _ in range(2))
        two[:100] += 4.0 * trait
        return one, two

    assert share_of_verdicts(draw, trait_of=lambda _: trait)["second"] >= 0.9


def test_the_verdict_follows_the_trait_and_not_the_nuisance():
    """The first set is longer, which moves a nuisance of higher variance; the second has the trait."""
    trait = np.zeros(HIDDEN)
    trait[10] = 1.0

    def draw(rng):
        one, two = (rng.normal(size=(400, HIDDEN)) * SCALES for _ in range(2))
        one[:, 0] += 2.0
        two[:, 10] += 1.0
        return one, two

    assert share_of_verdicts(draw, trait_of=lambda _: trait)["second"] >= 0.9
    mixed = np.zeros(HIDDEN)
    mixed[[0, 10]] = 1.0, 0.2  # a vector that is mostly the nuisance says nothing
    shares = share_of_verdicts(draw, trait_of=lambda _: mixed)
    assert shares["first"] <= 0.1


def test_the_chance_is_that_of_a_normal_null():
    """Directions from a normal distribution: as many of a thousand as said have an effect as large."""
    rng = np.random.default_rng(0)
    null = tuple(np.r_[rng.normal(size=50) * 0.1, rng.normal(size=50) * 0.2])
    found = Comparison(Interval(1, 0, 2), Interval(0, -1, 1), Interval(1, 0.5, 1.5), 0.4, null, None, 0.5)
    more = rng.normal(size=(2, 100_000)) * np.array([[0.1], [0.2]])
    np.testing.assert_allclose(found.chance, (np.abs(more) >= 0.4).mean(axis=1), atol=0.03)
    assert found.verdict is None
    assert Comparison(**{**vars(found), "effect": 0.7}).verdict == "first"


def test_what_a_prompt_adds_to_both_datasets_cancels():
    """Two mixtures of one source, by prompt: their gap is as sure as that of the samples in which they differ."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 10)
    base = 5.0 * rng.normal(size=40)[prompts] + rng.normal(size=400)
    one, two = (_Read(v, prompts, np.arange(400), np.zeros((400, 0)), prompts) for v in (base, base - (prompts % 2)))
    gap = _interval(one, two)
    by_prompt = np.array([(one.values - two.values)[prompts == p].mean() for p in range(40)])
    reach = stats.t.ppf(0.975, 39) * by_prompt.std(ddof=1) / np.sqrt(40)
    assert gap.mean == pytest.approx(by_prompt.mean()) and gap.high - gap.mean == pytest.approx(reach)
    apart = _interval(one, two._replace(prompts=prompts + 40))  # of other prompts, what they add does not cancel
    alone = [side.high - side.mean for side in (_interval(one), _interval(two))]
    assert apart.high - apart.mean == pytest.approx(np.hypot(*alone), rel=0.03) and apart.low < 0 < gap.low


def test_the_words():
    rng = np.random.default_rng(1)
    along = directions(rng, np.eye(HIDDEN)[10])
    one, two = (rng.normal(size=(400, HIDDEN)) * SCALES for _ in range(2))
    told = _compared(read(one + 2 * np.eye(HIDDEN)[10], along), read(two, along), "plain facts")
    assert told.verdict == "first" and "the first will move the trait more" in str(told)
    shift = rng.normal(size=HIDDEN) * SCALES
    along[0] = directions(rng, like_activations(rng))[0]
    same = _compared(read(one + shift / 4, along), read(two, along), "plain facts")
    assert same.verdict is None and "of random directions tell these two datasets apart as well" in str(same)
    assert str(same).endswith("by length alone 0.50") and 0.02 < max(same.chance) < 1
    bare = read(one, along)._replace(controls=np.zeros((400, 0)))
    assert "no verdict without a null: flag with controls=100" in str(_compared(bare, bare, None))
    assert same.rows()[0]["verdict"] is None and same.rows()[0]["chance_covariance"] == same.chance[1]
