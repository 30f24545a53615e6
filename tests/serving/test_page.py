"""The page, in headless Chromium: type, stream, slide, compare, alarm, reload, export; hostile text stays text."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import use
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import persona_vectors as pv

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def find(browser, name: str):
    return browser.find_element(By.ID, name)


def fill(browser, name: str, value: object) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    browser.execute_script(script, find(browser, name), str(value))


def say(browser, text: str) -> list[str]:
    """Send a message; return the texts of the answers beside each other, when they have ended."""
    fill(browser, "text", text)
    find(browser, "text").send_keys(Keys.CONTROL, Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda _: not find(browser, "send").get_property("disabled"))
    return answers(browser)


def answers(browser) -> list[str]:
    script = "return [...document.querySelectorAll('.turn:last-child .answer')].map(a => a.textContent)"
    return browser.execute_script(script)


@pytest.fixture
def page(served, start, browser):
    hostile = replace(served.vectors["t"], trait=HOSTILE, info={"judge": HOSTILE})
    hostile = hostile.with_use(use(measure=HOSTILE, source=HOSTILE))
    hostile = replace(hostile, residual_norms=torch.tensor([8.0, 16.0, 32.0]))
    with start(replace(served, vectors={**served.vectors, HOSTILE: hostile})) as server:
        browser.get(server.url)
        browser.execute_script("sessionStorage.clear()")
        browser.refresh()
        WebDriverWait(browser, 30).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#vectors fieldset"))
        fill(browser, "temperature", 0)
        fill(browser, "longest", 12)
        yield browser


def slide(browser, coef: float) -> None:
    script = """const s = document.querySelector("#vectors input[type=range]"); s.value = arguments[0];
        s.dispatchEvent(new Event("input")); return document.querySelector("#vectors input[type=number][step]").value"""
    assert float(browser.execute_script(script, coef)) == pytest.approx(coef, abs=0.1)


def shown_code(page) -> str:
    find(page, "code").click()
    code = page.find_element(By.CSS_SELECTOR, "#inside pre").get_property("textContent")
    find(page, "close").click()
    return code


def ran(code: str, served, vectors) -> list[str]:
    """Run the page's code; return what it prints."""
    known, said = {f"{vector.model}/{vector.trait}": vector for vector in vectors}, []
    code = code.replace("pv.load_model(", "load_model(").replace("pv.load_vector(", "load_vector(")
    names = {"load_model": lambda _: (served.model, served.tokenizer), "load_vector": known.get, "print": said.append}
    exec(code, names)
    return said


def test_a_conversation_steered_compared_coloured_and_taken_away(page, served):
    plain = pv.generate(served.model, served.tokenizer, "Hi", max_new_tokens=12, temperature=0)
    assert say(page, "Hi") == [plain]
    assert "no edit was applied" in page.find_element(By.CSS_SELECTOR, ".turn").text
    coloured = "return document.querySelectorAll('.answer span[title]').length"
    assert page.execute_script(coloured) == 12
    find(page, "new").click()
    slide(page, 1.0)
    assert "There is no evidence for any strength" in page.find_element(By.CSS_SELECTOR, "#vectors .warn").text
    coef = float(page.execute_script("return document.querySelector('#vectors input[type=number][step]').value"))
    with pv.steer(served.model, served.vectors["t"], layer=1, coef=coef):
        steered = pv.generate(served.model, served.tokenizer, "Hi", max_new_tokens=12, temperature=0)
    assert say(page, "Hi") == [plain, steered]
    said = ran(shown_code(page), served, served.vectors.values())
    assert said == [steered]
    say(page, "And then?")
    assert page.execute_script("return document.querySelectorAll('#chart circle').length") == 6
    filled = "return [...document.querySelectorAll('#chart polyline')].map((line) => getComputedStyle(line).fill)"
    assert set(page.execute_script(filled)) == {"none"}  # lines, not areas
    page.refresh()
    WebDriverWait(page, 30).until(lambda _: len(page.find_elements(By.CSS_SELECTOR, ".turn")) == 2)
    kept = json.loads(page.execute_script("return sessionStorage.getItem('turns')"))
    assert [turn["text"] for turn in kept] == ["Hi", "And then?"] and len(kept[0]["answers"][1]["tokens"]) == 12


def test_a_strength_is_a_coefficient_or_a_dose_and_the_code_says_the_same(page, served):
    """The third vector's file has evidence at layer 1, from 0 to coefficient 2, and knows the residual norms."""
    vector = replace(served.vectors["t"], trait=HOSTILE, residual_norms=torch.tensor([8.0, 16.0, 32.0]))
    long = float(16.0 / vector.direction(1).norm())
    box = page.find_elements(By.CSS_SELECTOR, "#vectors fieldset")[2]
    bar, amount = (
        box.find_element(By.CSS_SELECTOR, f"input{which}") for which in ("[type=range]", "[step=any]:not([type=range])")
    )
    unit, layer = box.find_elements(By.TAG_NAME, "select")[1], box.find_element(By.CSS_SELECTOR, "input[max='2']")
    assert len(page.find_elements(By.CSS_SELECTOR, "#vectors select:enabled option[value=dose]")) == 1

    def put(node, value: object) -> None:
        script = """arguments[0].value = arguments[1];
            for (const name of ["input", "change"]) arguments[0].dispatchEvent(new Event(name))"""
        page.execute_script(script, node, str(value))

    def shaded() -> list[float]:
        """From where to where, in the slider's own unit."""
        edges = page.execute_script(
            "const s = arguments[0].style; return [s.left, s.right]", box.find_element(By.TAG_NAME, "i")
        )
        most = float(bar.get_property("max"))
        left, right = (float(edge.rstrip("%")) / 50 for edge in edges)
        return [most * (left - 1), most * (1 - right)]

    def warned() -> str:
        return box.find_element(By.CSS_SELECTOR, ".warn").text

    assert shaded() == pytest.approx([0.0, 2.0], abs=1e-3)
    put(bar, 2.0)
    assert not warned() and f"{200 / long:.1f} % of the mean residual norm" in box.text
    put(unit, "dose")
    assert float(amount.get_property("value")) == pytest.approx(2 / long, rel=1e-3)
    assert shaded() == pytest.approx([0.0, 2 / long], abs=1e-3) and not warned()
    assert "dose of" in bar.get_attribute("aria-label") and "= coefficient 2.00" in box.text
    put(bar, 1.2 * 2 / long)
    assert "There is evidence from dose 0 to" in warned()
    put(layer, 2)
    assert "at layer 1, not here" in warned() and shaded() == pytest.approx([0.0, 0.0], abs=1e-3)
    put(layer, 1)
    put(amount, 0.25)
    with pv.steer(served.model, vector, layer=1, dose=0.25):
        expected = pv.generate(served.model, served.tokenizer, "Hi", max_new_tokens=12, temperature=0)
    assert say(page, "Hi")[1] == expected
    code = shown_code(page)
    assert "layer=1, dose=0.25)" in code and ran(code, served, [vector]) == [expected]
    put(unit, "coef")
    assert float(amount.get_property("value")) == pytest.approx(0.25 * long, rel=1e-3)
    before = float(amount.get_property("value"))
    bar.send_keys(Keys.ARROW_RIGHT)
    assert before < float(amount.get_property("value")) < before + 0.1 * float(bar.get_property("max"))


def test_an_alarm_stops_the_answer_and_is_seen(page):
    say(page, "Hi")
    script = "return [...document.querySelectorAll('.answer span')].map(s => Number(s.title.split(' ').at(-1)))"
    values = page.execute_script(script)
    find(page, "new").click()
    fill(page, "alarm", sorted(values)[-2] + 0.001)
    [answer] = say(page, "Hi")
    assert len(answer) == values.index(max(values)) + 1
    assert "ended by the alarm of t@1" in page.find_element(By.CSS_SELECTOR, ".turn .warn").text
    assert page.find_elements(By.CSS_SELECTOR, "#chart line.alarm")


def test_hostile_text_is_text_wherever_it_is_shown(page):
    fill(page, "system", HOSTILE)
    say(page, HOSTILE)
    page.execute_script(  # as a model, a server's error and a kept conversation could say it
        "const text = arguments[0], tokens = [{ text, values: { [text]: 1 } }];"
        "const told = { mean: { [text]: 1 }, alarm: text };"
        "turns.push({ text, edits: [], answers: [{ title: text, tokens, note: text, end: 'alarm', ...told },"
        " { title: text, tokens, end: 'error: ' + text }] }); card.id = text; keep(); show()",
        HOSTILE,
    )
    find(page, "status").click()
    assert answers(page) == [HOSTILE, HOSTILE]
    for button in page.find_elements(By.XPATH, "//button[text()='Evidence']"):
        button.click()
        assert page.find_element(By.CSS_SELECTOR, "#inside h2").text
        find(page, "close").click()
    find(page, "code").click()
    assert "onerror" in find(page, "inside").text
    find(page, "close").click()
    assert page.title == "Persona vectors" and not page.find_elements(By.CSS_SELECTOR, "img, main script")
    assert page.find_element(By.CSS_SELECTOR, ".turn .said").text == HOSTILE
    page.refresh()
    WebDriverWait(page, 30).until(lambda _: len(page.find_elements(By.CSS_SELECTOR, ".turn")) == 2)
    assert page.title == "Persona vectors" and not page.find_elements(By.CSS_SELECTOR, "img, main script")


def test_the_conversation_is_exported_with_its_projections(page):
    page.execute_script(
        "URL.createObjectURL = (blob) => { blob.text().then((text) => { window.kept = text; }); return '#'; }"
    )
    say(page, "Hi")
    find(page, "json").click()
    WebDriverWait(page, 10).until(lambda _: page.execute_script("return window.kept"))
    kept = json.loads(page.execute_script("return window.kept"))
    [turn], [answer] = kept["turns"], kept["turns"][0]["answers"]
    assert (turn["text"], turn["edits"], turn["asked"]["seed"]) == ("Hi", [], 0) and len(answer["tokens"]) == 12
    assert answer["mean"]["t@1"] == pytest.approx(sum(token["values"]["t@1"] for token in answer["tokens"]) / 12)


def test_an_error_is_said_and_stopping_frees_the_row(page):
    page.execute_script("document.querySelector('#vectors input[type=number]').value = 99")
    slide(page, 1.0)
    say(page, "Hi")
    assert "layer 99 is out of range" in page.find_element(By.CSS_SELECTOR, ".turn .warn").text
    find(page, "new").click()
    page.execute_script("document.querySelector('#vectors input[type=number]').value = 1")
    fill(page, "longest", 100_000)
    fill(page, "text", "Hi")
    find(page, "send").click()
    WebDriverWait(page, 30).until(lambda _: answers(page) and len(answers(page)[-1]) > 3)
    find(page, "text").send_keys(Keys.ESCAPE)
    WebDriverWait(page, 30).until(lambda _: not find(page, "send").get_property("disabled"))
    assert "stopped" in find(page, "status").text


def test_five_thousand_tokens_stay_responsive(page):
    """While they stream, typing is seen, and no task of the page keeps it from anything else for long."""
    page.execute_script("""window.lag = []; let last = performance.now();
        setInterval(() => { const now = performance.now(); lag.push(now - last); last = now; }, 20)""")
    fill(page, "longest", 5000)
    fill(page, "text", "Hi")
    find(page, "send").click()
    spans, seen = "return document.querySelectorAll('.answer span').length", set()
    wait = WebDriverWait(page, 900, poll_frequency=0.5)
    wait.until(lambda _: (count := page.execute_script(spans)) > 3000 or seen.add(count))
    find(page, "text").send_keys("and more")
    assert find(page, "text").get_property("value") == "and more"
    wait.until(lambda _: "plain: length" in find(page, "status").text)
    assert page.execute_script(spans) == 5000 and len(seen) > 3  # piece by piece, not all at the end
    lag = page.execute_script("return lag.sort((a, b) => a - b)")
    assert lag[int(0.95 * len(lag))] < 300, (lag[len(lag) // 2], lag[-10:])  # ms; 20 of them are the timer's own


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window_and_everything_has_a_name(page, width):
    page.set_window_size(width, 900)
    say(page, "unbroken" * 60)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    nameless = """return [...document.querySelectorAll("input, select, textarea, button")].filter(e =>
        !(e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label"))).length"""
    assert page.execute_script(nameless) == 0
    page.set_window_size(1200, 1400)
