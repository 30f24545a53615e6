import json
from dataclasses import replace

import pytest
import torch
from helpers import block_outputs, hooks, make_tokenizer, random_direction, vectors_of_their_own

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.model.pooling import POOLINGS, pool
from persona_vectors.model.prompts import chat_prompt, encode, encode_answer
from persona_vectors.monitoring import projection
from persona_vectors.monitoring.plots import plot_drift
from persona_vectors.monitoring.projection import Scores, project, token_projections
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.moments import neutral_moments

PAIRS = [("How?", "Well."), ("Why so?", "No idea, sorry"), ("How?", "Badly")]
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Bye"},
]


def test_the_poolings_are_those_of_pool(model, tokenizer):
    vector = random_direction(model)
    vectors = [vector, random_vector(vector, seed=3)]
    scores = project(model, tokenizer, PAIRS, vectors, layer=[1, 2], poolings=POOLINGS)
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, question), answer) for question, answer in PAIRS]
    means = pool(model, rows, poolings=POOLINGS).means
    for index, name in enumerate(POOLINGS):
        for one in vectors:
            for layer in (1, 2):
                expected = one.project(means[:, index, layer], layer=layer)
                torch.testing.assert_close(scores[name][f"{one.trait}@{layer}"], expected, rtol=1e-4, atol=1e-4)
    assert scores.answer_tokens.tolist() == [5, 14, 5]
    assert hooks(model) == 0


def test_every_token_is_the_block_output_projected(model):
    vector, rows = random_direction(model), [([5, 6, 7], [20, 21]), ([5, 6, 7], [22]), ([9], [])]
    for budget in (4, 1024):
        found = token_projections(model, rows, unit_directions(model, [vector], "all"), batch_tokens=budget)
        for values, (prompt, answer) in zip(found, rows):
            states = block_outputs(model, [*prompt, *answer])
            expected = torch.stack([vector.project(states[k], layer=k) for k in range(3)], dim=1)
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)


def test_each_turn_is_scored_as_if_the_conversation_ended_there(model, tokenizer):
    vector = random_direction(model)
    drift = project(model, tokenizer, [CHAT, PAIRS[0]], vector, layer=1, by_turn=True)
    alone = project(model, tokenizer, [CHAT[:3], CHAT, PAIRS[0]], vector, layer=1)
    torch.testing.assert_close(drift.values, alone.values, rtol=1e-4, atol=1e-4)
    assert drift.conversation.tolist() == [0, 0, 1] and drift.turn.tolist() == [0, 1, 0]
    last = project(model, tokenizer, [CHAT, PAIRS[0]], vector, layer=1)
    torch.testing.assert_close(last.values, drift.values[1:], rtol=1e-4, atol=1e-4)
    assert last.turn.tolist() == [1, 0]


def test_a_conversation_is_read_once_however_many_turns_it_has(model, tokenizer, monkeypatch):
    turns = [{"role": role, "content": "ok"} for _ in range(6) for role in ("user", "assistant")]
    bars = []
    monkeypatch.setattr(projection, "bar", lambda **options: bars.append(bar(**options)) or bars[-1])
    scores = project(model, tokenizer, [turns], random_direction(model), layer=1, by_turn=True)
    assert len(scores.turn) == 6 and [(shown.n, shown.total) for shown in bars] == [(1, 1)]


def test_scores_are_a_table(model, tokenizer, tmp_path):
    vectors = [random_direction(model), replace(random_direction(model), trait="other")]
    conversations = [CHAT, ("How?", "")]
    scores = project(model, tokenizer, conversations, vectors, layer=[0, 2], by_turn=True)
    rows = scores.rows()
    assert len(rows) == 3 * 2 and set(rows[0]) >= {"conversation", "turn", "pooling", "t@0", "other@2"}
    last = [row for row in rows if (row["conversation"], row["turn"], row["pooling"]) == (0, 1, "response_mean")]
    assert [row["other@2"] for row in last] == [float(scores["response_mean"]["other@2"][1])]
    scores.save(tmp_path / "scores.json")
    loaded = Scores.load(tmp_path / "scores.json")
    assert (loaded.keys, loaded.poolings) == (scores.keys, scores.poolings)
    for name in ("values", "conversation", "turn", "answer_tokens", "reasoning_tokens"):
        torch.testing.assert_close(getattr(loaded, name), getattr(scores, name), rtol=0, atol=0, equal_nan=True)
    before = json.loads((tmp_path / "scores.json").read_text())
    del before["nulls"]  # as in files from before there were any
    (tmp_path / "scores.json").write_text(json.dumps(before))
    assert Scores.load(tmp_path / "scores.json").rows()[0] == rows[0]


def test_random_directions_are_read_in_the_same_passes_and_are_no_columns(model, tokenizer, tmp_path):
    vectors = vectors_of_their_own(model)
    reference = neutral_moments(model, tokenizer, PAIRS, layer=[0, 1])
    ran = []
    model.get_decoder().layers[1].register_forward_hook(lambda *_: ran.append(1))
    plain, passes = project(model, tokenizer, PAIRS, vectors, layer=[0, 1]), len(ran)
    found = project(model, tokenizer, PAIRS, vectors, layer=[0, 1], controls=40, reference=reference)
    assert len(ran) == 2 * passes and found.keys == plain.keys
    torch.testing.assert_close(found.values, plain.values, rtol=1e-5, atol=1e-5)
    # each random direction, read as a vector of its own
    drawn = [replace(each, trait=f"r{i}") for i, each in enumerate(reference.random_vectors(vectors[0], count=40))]
    alone = project(model, tokenizer, PAIRS, drawn, layer=[0, 1])
    for pooling in ("prompt_last", "response_mean"):
        place = found.nulls.place("t", layer=1, pooling=pooling)
        own = found[pooling]["t@1"]
        assert place.effect == pytest.approx(float(own.mean() / own.std()), rel=1e-3)
        random = torch.stack([alone[pooling][f"{each.trait}@1"] for each in drawn], dim=1)
        smaller = (random.mean(dim=0) / random.std(dim=0)).abs() < abs(place.effect)
        assert place.beaten_isotropic == pytest.approx(float(smaller[:20].float().mean()))
        assert place.beaten_covariance == pytest.approx(float(smaller[20:].float().mean()))
    assert found.nulls.reference == "a list" and plain.nulls is None
    found.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json").nulls.rows() == found.nulls.rows()
    facts = project(model, tokenizer, PAIRS, vectors, layer=1, controls=20)
    assert facts.nulls.reference == "answers on plain facts" and len(facts.nulls.rows()) == 2 * 2


def test_a_template_that_rewrites_earlier_turns_is_followed(model):
    """Here, as with some reasoning models, only the last answer is written out."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}"
        "{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer, vector = make_tokenizer(template), random_direction(model)
    drift = project(model, tokenizer, [CHAT], vector, layer=1, by_turn=True)
    alone = project(model, tokenizer, [CHAT[:3], CHAT], vector, layer=1)
    torch.testing.assert_close(drift.values, alone.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        [("<think>hm\nhm</think>\n\n", False), ("Yes", True)],
        [("hm</think>", False), ("Yes", True)],  # opened by the template
        [("Yes", True)],
        [("A", True), ("<think>b</think> ", False), ("c", True), ("<think>d", False)],
        [("<think>cut off", False)],
        [("é", True), ("<think>ü</think>", False), ("ö", True)],
    ],
)
def test_reasoning_can_be_left_out(model, tokenizer, parts: list):
    vector, answer = random_direction(model), "".join(text for text, _ in parts)
    kept = torch.tensor([keep for text, keep in parts for _ in encode(tokenizer, text)])
    scores = project(model, tokenizer, [("How?", answer)], vector, layer=1, positions="answer")
    left_out = int((~kept).sum())
    assert (int(scores.answer_tokens), int(scores.reasoning_tokens)) == (int(kept.sum()), left_out)
    assert f"tokens of the answer ({left_out} are reasoning)" in repr(scores)
    prompt, ids = encode_answer(tokenizer, chat_prompt(tokenizer, "How?"), answer)
    values = vector.project(block_outputs(model, [*prompt, *ids])[1], layer=1)
    expected = values[len(prompt) :][kept].mean()
    torch.testing.assert_close(scores["response_mean"]["t"][0], expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores["prompt_last"]["t"][0], values[len(prompt) - 1], rtol=1e-4, atol=1e-4)
    whole = project(model, tokenizer, [("How?", answer)], vector, layer=1)
    assert int(whole.reasoning_tokens) == 0


def test_a_prompt_that_opens_the_reasoning(model):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant><think>\n"
    tokenizer, vector = make_tokenizer(template), random_direction(model)
    scores = project(model, tokenizer, [("a", "b</think>c"), ("a", "never ends")], vector, layer=1, positions="answer")
    assert scores.answer_tokens.tolist() == [1, 10]  # what closes no thought is an answer, as the template finishes it
    assert not scores["response_mean"]["t"].isnan().any()


@pytest.mark.parametrize(
    ("conversations", "options", "message"),
    [
        ([CHAT[:2]], {}, "conversation 0 has no answer: give messages that end with role 'assistant'"),
        ([], {}, "no conversations: give one or more"),
        (PAIRS, {"poolings": ["mean"]}, "pooling 'mean' is unknown: give one or more of response_mean"),
        (PAIRS, {"poolings": []}, "pooling 'none' is unknown"),
        (PAIRS, {"layer": 7}, "layer 7 is out of range"),
    ],
)
def test_bad_input_is_one_line(model, tokenizer, conversations: list, options: dict, message: str):
    with pytest.raises(InputError, match=message) as error:
        project(model, tokenizer, conversations, random_direction(model), **({"layer": 1} | options))
    assert "\n" not in str(error.value)


def test_a_missing_pooling_says_which_there_are(model, tokenizer):
    scores = project(model, tokenizer, PAIRS, random_direction(model), layer=1)
    with pytest.raises(InputError, match="have no 'prompt_mean': they have prompt_last, response_mean"):
        scores["prompt_mean"]


def test_the_drift_plot_has_a_panel_for_each_vector(model, tokenizer):
    vectors = [random_direction(model), replace(random_direction(model), trait="other")]
    talk = [{"role": role, "content": text} for text in "abc" for role in ("user", "assistant")]
    scores = project(model, tokenizer, [talk, talk[:4]], vectors, layer=1, by_turn=True)
    figure = plot_drift(scores)
    assert [axes.get_ylabel() for axes in figure.axes] == ["t", "other"]
    *lines, mean = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [3, 2] and list(mean.get_xdata()) == [1, 2, 3]
    expected = [float(scores["response_mean"]["t"][scores.turn == turn].mean()) for turn in range(3)]
    assert list(mean.get_ydata()) == pytest.approx(expected)
