"""The page in a notebook: a server in a thread, which its key alone opens, and which leaves nothing behind."""

import json
import re
import threading
import urllib.error
from html import unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.request import Request, urlopen

import pytest
from helpers import hooks
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import persona_vectors as pv
from persona_vectors.data.errors import InputError


@pytest.fixture
def playground(served):
    with pv.playground(served.model, served.tokenizer, list(served.vectors.values()), layer=1) as found:
        yield found


def status(url: str, key: str | None = None, **headers: str) -> int:
    given = {**headers, **({} if key is None else {"Authorization": f"Bearer {key}"})}
    try:
        return urlopen(Request(url, headers=given), timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_its_key_alone_opens_it_and_closing_leaves_nothing(playground, served):
    address, key = playground.url.split("#")
    assert status(f"{address}v1/models") == status(f"{address}v1/models", "wrong") == 401
    assert status(f"{address}v1/models", key) == 200
    assert status(f"{address}v1/models", key, Host="evil.example") == 403
    assert status(f"{address}v1/models", key, Origin="http://evil.example") == 403
    body = {"model": served.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0}
    body["persona_vectors"] = {"edits": [{"vector": "t", "coef": 3.0}]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    reply = json.load(urlopen(Request(f"{address}v1/chat/completions", json.dumps(body).encode(), headers)))
    with pv.steer(served.model, served.vectors["t"], layer=1, coef=3.0):
        expected = pv.generate(served.model, served.tokenizer, "Hi", max_new_tokens=5, temperature=0)
    assert reply["choices"][0]["message"]["content"] == expected
    playground.close()
    with pytest.raises(urllib.error.URLError):
        urlopen(address, timeout=5)
    assert hooks(served.model) == 0
    assert not [t for t in threading.enumerate() if t.name == "persona-vectors-http" and t.is_alive()]


def test_a_notebook_is_shown_a_frame_and_told_what_a_remote_one_needs(playground):
    shown = playground._repr_html_()
    assert unescape(re.search(r'<iframe src="([^"]*)"', shown)[1]) == playground.url
    assert f"ssh -L {playground.port}:127.0.0.1:{playground.port}" in shown and 'url="/proxy/{port}/"' in shown
    key = playground.url.partition("#")[2]
    assert key not in repr(playground) and str(playground.port) not in repr(playground)
    assert "frame-ancestors" not in urlopen(playground.url.partition("#")[0]).headers["content-security-policy"]


def test_behind_a_proxy_the_key_decides_whatever_its_names_are(served):
    vectors = list(served.vectors.values())
    with pv.playground(served.model, served.tokenizer, vectors, url="https://hub/user/x/proxy/{port}/") as found:
        address, key = found.url.split("#")
        assert address == f"https://hub/user/x/proxy/{found.port}/"
        own, names = f"http://127.0.0.1:{found.port}/v1/models", {"Host": "hub", "Origin": "https://hub"}
        assert status(own, key, **names) == 200 and status(own, None, **names) == 401
    with pytest.raises(InputError, match=r"give the page's address with \{port\} in it"):
        pv.playground(served.model, served.tokenizer, vectors, url="https://hub/proxy/8000/")


@pytest.mark.slow
def test_the_page_answers_in_a_frame_of_another_site(playground, served, browser):
    shown = playground._repr_html_().encode()

    class Notebook(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>notebook</title>" + shown)

        def log_message(self, *_: object) -> None: ...

    site = HTTPServer(("127.0.0.1", 0), Notebook)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    browser.get(f"http://localhost:{site.server_port}/")
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    WebDriverWait(browser, 30).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#vectors fieldset"))
    browser.execute_script("document.getElementById('temperature').value = 0")
    browser.execute_script("document.getElementById('longest').value = 12")
    browser.find_element(By.ID, "text").send_keys("Hi", Keys.CONTROL, Keys.ENTER)
    WebDriverWait(browser, 60).until(lambda _: "length" in browser.find_element(By.ID, "status").text)
    answer = browser.find_element(By.CSS_SELECTOR, ".answer").text
    assert answer == pv.generate(served.model, served.tokenizer, "Hi", max_new_tokens=12, temperature=0).strip()
    browser.find_element(By.ID, "new").click()
    assert not browser.find_elements(By.CSS_SELECTOR, ".turn")
    browser.switch_to.default_content()
    site.shutdown()
    site.server_close()
