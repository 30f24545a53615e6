import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import zoo
from helpers import generate, random_direction, two_vectors

from persona_vectors.data.errors import InputError
from persona_vectors.model.prompts import chat_text, encode
from persona_vectors.monitoring.heatmaps import (
    _STRONGEST,
    _STYLE,
    Heatmap,
    _template,
    heatmap,
    save_heatmaps,
    token_texts,
)
from persona_vectors.monitoring.percentiles import Calibration
from persona_vectors.monitoring.readings import Readings
from persona_vectors.monitoring.trace import monitor

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='x",
    "{{ 7 * 7 }}",
    "&lt;",
    "</style>",
]


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.texts.append(data)


def test_all_text_is_escaped_in_the_fragment_and_in_the_file(tmp_path):
    shown = Heatmap(HOSTILE, {HOSTILE[1]: [float(i) for i in range(len(HOSTILE))]}, answer=2)
    shown.save(tmp_path / "page.html")
    for html in (shown._repr_html_(), (tmp_path / "page.html").read_text("utf-8")):
        page = Page(html)
        allowed = {"div", "style", "section", "h2", "small", "i", "p", "span", "html", "head", "meta", "title", "body"}
        assert {tag for tag, _ in page.tags} <= allowed
        assert all(
            set(attributes) <= {"class", "style", "title", "charset", "name", "content", "lang", "tabindex"}
            for _, attributes in page.tags
        )
        assert all(text in page.texts for text in HOSTILE)
        assert "49" not in html and "http" not in html  # nothing is evaluated, nothing is fetched


def test_one_row_a_vector_and_the_value_of_every_token(model, tokenizer):
    vectors = two_vectors(model)
    with monitor(model, vectors, layer=1, stops=[]) as trace:
        generate(model)
    shown = heatmap(tokenizer, trace, row=2)
    assert list(shown.rows) == [vector.trait for vector in vectors]
    assert len(shown.tokens) == 5 and shown.answer == 1  # one prompt token, four of the answer's
    torch.testing.assert_close(torch.tensor(shown.rows["t"]), trace["t"][2, 4:])
    titles = [attributes["title"] for _, attributes in Page(shown._repr_html_()).tags if "title" in attributes]
    assert titles == [f"{value:+.3f}" for vector in vectors for value in trace[vector.trait][2, 4:].tolist()]
    with monitor(model, vectors, layer=[0, 1]) as trace, torch.no_grad():
        model(**zoo.inputs(model))
    assert next(iter(heatmap(tokenizer, trace.last).rows)) == "t@0"
    assert heatmap(tokenizer, trace).answer is None


def test_the_colours_follow_the_value():
    values = [-9.0, -1.0, 0.0, 1.0, float("nan"), 100.0]
    html = Heatmap(list("abcdef"), {"v": values}, span=(-2, 2))._repr_html_()
    found = re.findall(r'<i tabindex="0"(?: class="(.)" style="--a: ([\d.]+)")? title="(.*?)">', html)
    strong = f"{_STRONGEST:.3f}"
    half = f"{_STRONGEST / 2:.3f}"
    assert found == [
        ("l", strong, "-9.000"),
        ("l", half, "-1.000"),
        ("", "", "+0.000"),
        ("h", half, "+1.000"),
        ("", "", "no value"),
        ("h", strong, "+100.000"),
    ]


def calibration(vector, layers=(1,)) -> Calibration:
    """Neutral tokens between -1 and 3, half of them below 0."""
    values = tuple((-1.0 + layer, 0.0 + layer, 3.0 + layer) for layer in layers)
    return Calibration(vector.trait, "m", layers, (1.0, 50.0, 99.0), values, 1, 3, 8, 1.0, 0)


def test_percentiles_are_those_of_the_calibration(model):
    vectors = two_vectors(model)
    with monitor(model, vectors, layer=[0, 1], stops=[]) as trace:
        generate(model)
    found = trace.percentiles([calibration(vector, layers=(0, 1)) for vector in vectors])
    assert list(found) == list(trace.keys)
    for layer in (0, 1):
        for vector in vectors:
            key = f"{vector.trait}@{layer}"
            expected = np.interp(trace[key].numpy() - layer, [-1, 0, 3], [1, 50, 99])
            np.testing.assert_allclose(found[key].numpy(), expected, rtol=1e-4)
            assert found[key].isnan().equal(trace[key].isnan()) and found[key].isnan().any()
    with pytest.raises(InputError, match="no calibration of 'random 3': there is t; calibrate it too"):
        trace.percentiles(calibration(vectors[0], layers=(0, 1)))
    with pytest.raises(InputError, match="'t' was not calibrated at layer 0: this one has 1"):
        trace.percentiles([calibration(vector) for vector in vectors])


def test_the_colours_follow_the_percentile_where_there_is_a_calibration(model, tokenizer):
    vector = random_direction(model)
    with monitor(model, vector, layer=1, stops=[]) as trace:
        generate(model)
    shown = heatmap(tokenizer, trace, row=1, calibration=calibration(vector))
    places = trace.percentiles(calibration(vector))["t"][1].tolist()
    assert shown.percentiles == {"t": places} and shown.rows == {"t": trace["t"][1].tolist()}
    html = shown._repr_html_()
    found = re.findall(r'<i tabindex="0"(?: class="(.)" style="--a: ([\d.]+)")? title="(.*?)">', html)
    for (side, alpha, title), value, place in zip(found, shown.rows["t"], places):
        assert title == f"{value:+.3f}, percentile {place:.0f}" and side == ("h" if place > 50 else "l")
        assert float(alpha) == pytest.approx(abs(place - 50) / 50 * _STRONGEST, abs=1e-3)
    legend = re.sub(r"<.*?>", "", re.findall(r"<small>.*?</small>", html, re.DOTALL)[0])
    assert legend == "0 away from it 50 towards it 100: percentile among the tokens of neutral answers"
    empty = Heatmap(["a", "b"], {"v": [1.0, float("nan")]}, percentiles={"v": [50.0, float("nan")]})._repr_html_()
    assert (
        'title="+1.000, percentile 50"' in empty and 'title="no value"' in empty and '<i class="h" title' not in empty
    )
    with pytest.raises(InputError, match="span and calibration both say"):
        heatmap(tokenizer, trace, span=(0, 1), calibration=calibration(vector))
    with pytest.raises(InputError, match="'v' has 1 values for 2 tokens"):
        Heatmap(["a", "b"], {"v": [1.0, 2.0]}, percentiles={"v": [1.0]})


def test_zero_has_no_colour_the_answer_makes_the_scale_and_the_template_is_grey(tokenizer):
    text = chat_text(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    ids = encode(tokenizer, text)
    values = [3000.0] * len(ids) + [-5.0, 0.0, 10.0, 10.0, 4000.0]
    ids += [*encode(tokenizer, "abcd"), tokenizer.eos_token_id]
    readings = Readings(
        ("t",),
        torch.tensor([[values]]),
        torch.tensor([ids]),
        torch.ones(1, len(ids), dtype=torch.bool),
        len(ids) - 5,
        (tokenizer.eos_token_id,),
        {1: "before the edit"},
    )
    shown = heatmap(tokenizer, readings, title="tiny, 'Hi'")
    assert [text for text, grey in zip(shown.tokens, shown.template) if not grey] == ["H", "i", "a", "b", "c", "d"]
    assert shown.title == "tiny, 'Hi': layer 1; read before the edit"
    tags = [(a.get("class"), a.get("style")) for tag, a in Page(shown._repr_html_()).tags if "tabindex" in a]
    strong, half = f"--a: {_STRONGEST:.3f}", f"--a: {_STRONGEST / 2:.3f}"
    assert tags[-5:] == [("l", half), (None, None), ("h", strong), ("h", strong), ("t", None)]
    assert set(tags[:-5]) == {("t", None), ("h", strong)}


def test_a_role_of_several_tokens_is_the_template_s():
    ids, texts = [0, 5, 6, 7, 8], ["<s>", "ass", "istant", "\n", "user"]
    assert _template({0}, ids, texts, 5) == [True, True, True, True, False]
    assert _template({0}, ids, texts, 2) == [True, False, False, False, False]


def test_the_default_span_is_not_moved_by_an_outlier():
    values = [float(i % 11) for i in range(1000)]
    legends = [
        re.findall(r"<small>.*?</small>", Heatmap(["a"] * 1000, {"v": v})._repr_html_(), re.DOTALL)
        for v in (values, [1e6, *values[1:]])
    ]
    assert legends[0] == legends[1]
    for few in ([], [3.0, 3.0], [float("nan")]):
        Heatmap(["a"] * len(few), {"v": few})._repr_html_()


def test_the_text_can_be_read_on_the_strongest_colours():
    def luminance(rgb: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in re.findall(r"--low: [^}]*--rule: #\w+;", _STYLE):
        colours = dict(re.findall(r"--(\w+): (#\w+|[\d ]+);", theme))
        ink, paper = ([int(colours[key][i : i + 2], 16) for i in (1, 3, 5)] for key in ("ink", "paper"))
        for side in ("low", "high"):
            mixed = [_STRONGEST * int(c) + (1 - _STRONGEST) * p for c, p in zip(colours[side].split(), paper)]
            bright, dark = sorted((luminance(ink), luminance(mixed)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) > 4.5
    assert _STYLE.count("--low:") == 2 and "prefers-color-scheme: dark" in _STYLE


def test_the_tokens_texts_add_up_to_the_text(tokenizer):
    text = "Hé 日本\n ok</s>"
    texts = token_texts(tokenizer, encode(tokenizer, text))
    assert "".join(t for t in texts if t != "·") == text
    assert texts[:3] == ["H", "·", "é"]
    broken = token_texts(tokenizer, encode(tokenizer, "日")[:2] + encode(tokenizer, "a"))
    assert len(broken) == 3 and broken[-1].endswith("a")


def test_bad_input_says_what_to_give(model, tokenizer):
    with pytest.raises(InputError, match="'v' has 1 values for 2 tokens"):
        Heatmap(["a", "b"], {"v": [1.0]})
    with pytest.raises(InputError, match=r"span is .*: give the lowest value and the highest"):
        Heatmap(["a"], {"v": [1.0]}, span=(1, 1))
    with monitor(model, random_direction(model), layer=1) as trace, torch.no_grad():
        model(**zoo.inputs(model))
    with pytest.raises(InputError, match="row 2 is out of range: this trace has rows 0 to 1"):
        heatmap(tokenizer, trace, row=2)
    with monitor(model, random_direction(model), layer=1) as trace, torch.no_grad():
        model(inputs_embeds=torch.zeros(1, 3, zoo.HIDDEN))
    with pytest.raises(InputError, match="given embeddings, so the heatmap has no text"):
        heatmap(tokenizer, trace)


def test_a_browser_shows_hostile_text_as_text(tmp_path, browser):
    rows = {HOSTILE[0]: [float(i) for i in range(len(HOSTILE))], "calm": [-float(i) for i in range(len(HOSTILE))]}
    save_heatmaps([Heatmap(HOSTILE, rows, answer=2), Heatmap(HOSTILE, rows)], tmp_path / "page.html")
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.title == f"{HOSTILE[0]}, calm"
    sections = browser.find_elements("css selector", "section")
    assert len(sections) == 4
    tokens = sections[0].find_elements("css selector", "p i")
    assert [token.text for token in tokens] == [text.strip() for text in HOSTILE]
    assert tokens[2].get_attribute("title") == "+2.000"
    assert not browser.find_elements("css selector", "script, img, [onerror], [onmouseover]")
    first, last = (token.value_of_css_property("background-color") for token in (tokens[0], tokens[-1]))
    assert first != last and "rgba" in first  # low and high have their own colours
