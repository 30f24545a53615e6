"""The report, in a real browser: sorting, search, hostile text, and thousands of rows."""

import time

import pytest
from helpers import random_direction

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.flagging import report
from persona_vectors.flagging.report import _histogram, pick_rows, render
from persona_vectors.vectors.controls import random_vector

HOSTILE = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"></script>"
SAMPLES = [{"question": f"Question {i}?", "answer": f"{'yes ' * (i % 7)}answer {i}"} for i in range(120)]


@pytest.fixture
def flagged(model, tokenizer, tmp_path):
    """A report on tiny random vectors, whose first sample is hostile."""
    vectors = [random_direction(model), random_vector(random_direction(model), seed=2)]
    samples = [{"id": HOSTILE, "question": HOSTILE, "answer": HOSTILE[:60]}, *SAMPLES]
    found = pv.flag(
        model, tokenizer, samples, vectors, layer=1, out=tmp_path / "f.parquet", baseline="prompt_last", percentile=90
    )
    return found, samples, vectors


def lines(browser) -> list[list[str]]:
    script = "return [...document.querySelectorAll('#samples tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    return browser.execute_script(script)


def test_rows_are_picked_by_difference(flagged):
    found, _, _ = flagged
    picked = {row: entry for (row, _), entry in pick_rows(found, each=5, seed=0).items()}
    import pyarrow.parquet as pq

    table = pq.read_table(found.path).to_pylist()
    for key in found.summary:
        order = sorted(range(len(table)), key=lambda i: table[i][f"{key}_difference"])
        assert {row for row, entry in picked.items() if f"bottom {key}" in entry["set"].split(", ")} == set(order[:5])
        assert {row for row, entry in picked.items() if f"top {key}" in entry["set"].split(", ")} == set(order[-5:])
    assert sum("random" in entry["set"].split(", ") for entry in picked.values()) == 5


def test_a_result_shows_itself_in_a_notebook(flagged):
    found, _, _ = flagged
    html = found._repr_html_()
    assert all(f"<td style='text-align:left'>{key}</td>" in html for key in found.summary)
    assert len(html) < 10_000 and HOSTILE not in html


def test_the_page_sorts_searches_and_escapes(flagged, model, tokenizer, tmp_path, browser):
    found, samples, vectors = flagged
    pv.write_report(model, tokenizer, samples, vectors, flags=found.path, out=tmp_path / "r.html", each=120)
    text = (tmp_path / "r.html").read_text()
    assert "http" not in text.split("<script")[0] and "<script>document.title" not in text
    browser.get((tmp_path / "r.html").as_uri())
    assert "owned" not in browser.title and "Flags" in browser.title
    assert "1 to 50 of 121" in browser.find_element("id", "where").text
    buttons = browser.find_elements("css selector", "[data-sort]")
    values = [float(line[2].split()[0]) for line in lines(browser)]
    assert values == sorted(values, reverse=True) and len(values) == 50
    buttons[2].click()
    values = [float(line[2].split()[0]) for line in lines(browser)]
    assert values == sorted(values)
    browser.find_element("id", "next").click()
    assert float(lines(browser)[0][2].split()[0]) >= values[-1]
    search = browser.find_element("id", "search")
    search.send_keys("answer 77")
    assert [line[0] for line in lines(browser)] == ["78"]
    tokens = browser.find_elements("css selector", ".answer span")
    assert "".join(t.get_attribute("textContent") for t in tokens) == SAMPLES[77]["answer"]
    assert len({t.value_of_css_property("background-color") for t in tokens}) > 2
    search.clear()
    search.send_keys("OWNED")
    assert lines(browser)[0][0] == HOSTILE and HOSTILE in lines(browser)[0][-1]
    assert not browser.find_elements("css selector", "td img, td script")
    assert "owned" not in browser.title
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert len(browser.find_elements("css selector", "svg rect:not(.null)")) == 80
    assert len(browser.find_elements("css selector", "svg rect.null")) == 2  # the random directions, and their note
    assert "inside the\ngrey, a random direction says as much" in browser.page_source
    assert browser.find_element("id", "summary").text.count(" %") == 4


def told(differences: list[float], words: int, i: int = 0) -> dict:
    """A sample of the page, as `render` is given it."""
    row = {"id": str(i), "set": "random", "prompt": f"user: question {i}", "differences": differences}
    row |= {"tokens": [f" word{j}" for j in range(words)], "percentiles": [50.0, 50.0]}
    return row | {"values": [[(i * j) % 7 / 7 for j in range(words)]] * 2}


def test_long_answers_are_folded_and_the_sorted_column_has_an_arrow(flagged, tmp_path, browser):
    found, _, _ = flagged
    render(found, [told([1.0, 0.0], 2000), told([0.5, 1.0], 3, 1)], tmp_path / "r.html")
    browser.get((tmp_path / "r.html").as_uri())
    (more,) = browser.find_elements("css selector", ".more")  # the short answer has none
    box = browser.find_element("css selector", ".answer")
    folded = box.size["height"]
    more.click()
    assert box.size["height"] > 2 * folded and more.text == "show less"
    more.click()
    assert box.size["height"] == folded and more.get_attribute("aria-expanded") == "false"
    script = "return [...document.querySelectorAll('#samples th')].map(h => [h.innerText.trim(), getComputedStyle("
    script += "h.firstElementChild, '::after').content]).filter(([, arrow]) => arrow != 'none')"
    assert browser.execute_script(script) == [[next(iter(found.summary)), '" ▼"']]
    browser.find_elements("css selector", "[data-sort]")[0].click()
    assert browser.execute_script(script) == [["id", '" ▲"']]


def test_on_a_phone_rows_are_cards_that_name_their_numbers(flagged, tmp_path, browser):
    found, _, _ = flagged
    render(found, [told([1.0, 0.0], 400), told([0.5, 1.0], 3, 1)], tmp_path / "r.html")
    phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.get((tmp_path / "r.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        cards = browser.find_elements("css selector", "#samples tbody tr")
        assert [line[0] for line in lines(browser)] == ["0", "1"]
        assert all(card.size["width"] > 340 for card in cards)
        names = browser.execute_script(
            "return [...document.querySelectorAll('tbody td')].map(c => getComputedStyle(c, '::before').content)"
        )
        assert {f'"{name}"' for name in ("id", "set", "threshold", "mean difference", *found.summary)} <= set(names)
        browser.find_elements("css selector", "[data-sort]")[3].click()  # sorting is at hand there too
        assert lines(browser)[0][0] == "1"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_line_is_promised_that_is_not_drawn(model, tokenizer, tmp_path, browser):
    vector, options = random_direction(model), {"layer": 1, "baseline": "prompt_last"}
    for controls in (0, 20):
        out = tmp_path / f"{controls}.parquet"
        pv.flag(model, tokenizer, SAMPLES, vector, out=out, controls=controls, **options)
        pv.write_report(model, tokenizer, SAMPLES, vector, flags=out, out=tmp_path / "r.html")
        browser.get((tmp_path / "r.html").as_uri())
        drawn = (
            len(browser.find_elements("css selector", "line.mean")),
            len(browser.find_elements("css selector", "rect.null")),
        )
        assert drawn == ((1, 1) if controls else (0, 0))
        said = browser.find_element("tag name", "body").text
        assert ("The dashed line" in said) == ("Grey:" in said) == bool(controls)
        assert "orange from the threshold" not in said  # none was asked for


@pytest.mark.parametrize(("values", "zero"), [([-1.0, 3.0, None], 90.0), ([1.0, 2.0], None), ([-2.0, -1.0], None)])
def test_the_histogram_says_where_zero_is(flagged, monkeypatch, values: list, zero: float | None):
    found, _, _ = flagged
    monkeypatch.setattr(report, "flag_batches", lambda _, columns: [{columns[0]: values}])
    assert _histogram(found, next(iter(found.summary)))["places"].get("zero") == zero


def test_no_more_than_a_quarter_of_a_dataset_is_read_again(flagged, model, tokenizer, tmp_path, monkeypatch):
    found, samples, vectors = flagged
    asked = []
    monkeypatch.setattr(report, "pick_rows", lambda *_, each, seed: asked.append(each) or {})
    monkeypatch.setattr(report, "render", lambda *_: None)
    monkeypatch.setattr(report, "token_projections", lambda *_, **__: [])
    for count in (121, 600, 10_000):
        monkeypatch.setitem(found.counts, "samples", count)
        monkeypatch.setattr(report.Flags, "load", lambda _: found)
        pv.write_report(model, tokenizer, samples, vectors, flags=found.path, out=tmp_path / "r.html")
    assert asked == [10, 30, 50]


def test_five_thousand_rows_stay_responsive(flagged, tmp_path, browser):
    found, _, _ = flagged
    rows = [told([(i * 7919) % 5000 / 5000, -i], 100, i) for i in range(5000)]
    render(found, rows, tmp_path / "r.html")
    start = time.monotonic()
    browser.get((tmp_path / "r.html").as_uri())
    assert "of 5000" in browser.find_element("id", "where").text
    loaded = time.monotonic() - start
    took = []
    for action in (
        "document.querySelector('[data-sort=\"0\"]').click()",
        "search.value = 'question 49'; search.oninput()",
    ):
        script = (
            f"const t = performance.now(), search = document.getElementById('search'); {action}; "
            "document.body.offsetHeight; return performance.now() - t"  # the height makes it lay the page out
        )
        took.append(browser.execute_script(script))
    assert "1 to 50 of 111" in browser.find_element("id", "where").text
    assert loaded < 20 and max(took) < 1500, (loaded, took)  # milliseconds; a busy machine is several times as slow


def test_other_vectors_and_one_shot_samples_are_refused(flagged, model, tokenizer, tmp_path):
    found, samples, vectors = flagged
    with pytest.raises(InputError, match=r"was made with model .* give the same ones"):
        pv.write_report(model, tokenizer, samples, vectors[:1], flags=found.path, out=tmp_path / "r.html")
    with pytest.raises(InputError, match="can be read only once"):
        pv.write_report(model, tokenizer, iter(samples), vectors, flags=found.path, out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
