"""What is refused before it reaches the model: other hosts, other pages, no key, too much."""

import asyncio
import contextlib
import http.client
import json
import socket

import pytest
from helpers import run

from persona_vectors.data.errors import InputError
from persona_vectors.serving.guard import LARGEST, Guard, api_key, is_loopback

BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}]})


def send(server, method="POST", path="/v1/chat/completions", body=BODY, **headers):
    """Send a request as it stands; a header whose value is None is left out."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    given = {"host": server.url.removeprefix("http://"), "content-type": "application/json", **headers}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name.replace("_", "-"), value)
    if "content-length" not in given and "transfer_encoding" not in given and body is not None:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body.encode() if isinstance(body, str) else body)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


@pytest.fixture(scope="module")
def locked(served, start):
    with start(served, key="right") as found:
        yield found


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "a b", "[::2]:1"])
def test_a_name_that_somebody_else_has_resolve_to_us_is_refused(server, host):
    for path in ("/", "/v1/models", "/health", "/metrics"):
        status, text = send(server, "GET", path, None, host=host)
        assert status in (400, 403) and "persona" not in text.replace("persona_vectors", "")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1", "file://"]
)
def test_another_site_s_page_is_refused(server, origin):
    for method in ("POST", "OPTIONS", "GET"):
        status, _ = send(server, method, origin=origin)
        assert status == 403


def test_our_own_page_and_plain_clients_are_served(server):
    assert send(server, "GET", "/v1/models", None)[0] == 200
    assert send(server, "GET", "/v1/models", None, origin=server.url)[0] == 200
    assert send(server, origin=server.url)[0] == 400  # no model of that name


def test_a_form_of_another_site_is_no_request(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        headers = {"content-type": kind}
        assert send(server, **headers)[0] == 415


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer ", "right", "Bearer rightx", "Basic right", "Bearer \xe9"]
)
def test_no_key_or_a_wrong_one_is_refused(locked, given):
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/metrics")):
        status, text = send(locked, method, path, authorization=given)
        assert status == 401 and "right" not in text
    assert send(locked, "GET", "/health", None)[0] == 200
    assert send(locked, "GET", "/v1/models", None, authorization="Bearer right")[0] == 200


def test_an_open_address_needs_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv("PERSONA_VECTORS_API_KEY", raising=False)
    assert api_key("127.0.0.1") is api_key("::1") is api_key("localhost") is None
    for host in ("0.0.0.0", "192.168.0.1", "::", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(InputError, match="set PERSONA_VECTORS_API_KEY"):
            api_key(host)
    monkeypatch.setenv("PERSONA_VECTORS_API_KEY", "k")
    assert api_key("0.0.0.0") == "k"


def test_bodies_are_bounded(server):
    big, headers = "x" * (LARGEST + 1), {"content-length": str(LARGEST + 1)}
    assert send(server, body="", **headers)[0] == 413
    lying = {"transfer_encoding": "chunked"}
    chunks = f"{len(big):x}\r\n{big}\r\n0\r\n\r\n"
    with contextlib.suppress(ConnectionError):  # refused before all of it was sent
        assert send(server, body=chunks, **lying)[0] == 413
    headers = {"content-length": "-5"}
    assert send(server, body="", **headers)[0] in (400, 413)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00",
        '{"a":' * 50_000,
        "[" * 100_000,
        json.dumps("x"),
        BODY[:-1] + ', "n": 1e400}',
        "{}",
        BODY[:-1] + ', "metadata": ' + "[" * 5000 + "]" * 5000 + "}",  # well formed, in a field that nobody reads
        BODY[:-1] + ', "stream_options": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
    ],
    ids=range(12),
)
def test_malformed_bodies_are_told_in_one_line(server, body):
    status, text = send(server, body=body)
    assert status == 400 and "\n" not in json.loads(text)["error"]["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/%00",
        "/..%5c..%5cetc",
        "/static/x",
        "/docs",
        "/v1",
    ],
)
def test_nothing_of_the_file_system_can_be_reached(server, path):
    status, text = send(server, "GET", path, None)
    assert status == 404 and "root:" not in text
    assert send(server, "GET", f"/v1/models{path}", None)[0] == 404


def test_twice_the_same_header_is_refused(server):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
    connection.putrequest("GET", "/v1/models", skip_host=True)
    connection.putheader("host", server.url.removeprefix("http://"))
    connection.putheader("host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status == 400


def test_nothing_that_a_user_wrote_stands_in_the_logs(server, capfd):
    secret = "a-very-private-sentence"
    send(
        server,
        body=BODY.replace("Hi", secret)
        .replace('"m"', json.dumps(server.served.name))
        .replace("}]}", '}], "max_tokens": 2}'),
    )
    send(server, body=f'{{"{secret}": ')
    send(server, "GET", f"/{secret}", None)
    out, err = capfd.readouterr()
    assert secret not in out + err


def test_the_command_refuses_an_open_address_without_a_key(tmp_path, monkeypatch, served):
    from helpers import random_direction, save_tiny

    monkeypatch.delenv("PERSONA_VECTORS_API_KEY", raising=False)
    save_tiny(tmp_path / "tiny")
    random_direction(served.model).save(tmp_path / "v.safetensors")
    _, err = run("serve", tmp_path / "tiny", tmp_path / "v.safetensors", "--host", "0.0.0.0", "--device", "cpu", code=2)
    assert "set PERSONA_VECTORS_API_KEY" in err


def test_a_missing_extra_is_named(served, monkeypatch):
    import sys

    from persona_vectors.serving.run import serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"persona-vectors-toolkit\[serve\]"):
        serve(served.model, served.tokenizer, list(served.vectors.values()))


def raw(server, request: bytes, *, seconds: float = 30) -> bytes:
    """Send bytes as they are; return all that comes back until the connection is closed."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as opened:
        opened.sendall(request)
        found = b""
        with contextlib.suppress(ConnectionError):
            while part := opened.recv(65_536):
                found += part
    return found


@pytest.mark.parametrize(
    "line",
    [
        b"X-A: b\r\n\tSet-Cookie: evil=1",  # a folded header
        b"X-A: b\nSet-Cookie: evil=1",
        b"X-A: b\rSet-Cookie: evil=1",
        b"X A: b",
        b"X-A\x00: b",
        b"X-A: \x00",
        b"Origin: http://127.0.0.1%0d%0aSet-Cookie:%20evil=1",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 0\r\nContent-Length: 5",
        b"X-A: " + b"a" * 200_000,
    ],
    ids=range(10),
)
def test_headers_cannot_be_injected(server, line):
    """Nothing of a request becomes a header of its reply, and no second request hides in one."""
    host = server.url.removeprefix("http://").encode()
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
    request = b"GET /v1/%0d%0aSet-Cookie:%20evil=1 HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n"
    found = raw(server, request + line + b"\r\n\r\n" + smuggled)
    heads = [part.partition(b"\r\n\r\n")[0].lower() for part in found.split(b"HTTP/1.1 ")[1:]]
    assert len(heads) <= 1 and all(head[:1] == b"4" for head in heads), found
    assert all(b"evil" not in head and b"set-cookie" not in head for head in heads)


def test_hostile_names_in_a_body_are_in_no_header(server):
    name = "m\r\nSet-Cookie: evil=1\r\n\r\n<script>"
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": name}], "stop": [name], "user": name})
    lines = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.url.removeprefix('http://')}\r\nConnection: close\r\n"
    lines += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    head, _, content = raw(server, lines.encode()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"evil" not in head
    assert "\n" not in json.loads(content)["error"]["message"]


def test_a_request_that_is_sent_too_slowly_is_cut_off(served, start):
    with start(served, seconds=0.3) as server:
        host = server.url.removeprefix("http://")
        begun = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        found = raw(server, f"{begun}Content-Length: 100\r\n\r\n{{".encode(), seconds=10)
        assert found.startswith(b"HTTP/1.1 408") and b"too slow" in found
        assert server.engine.load == (0, 0)


def test_a_reply_that_is_not_taken_is_cut_off_and_frees_its_row():
    """A client that stops reading: sending waits for ever."""
    freed = []

    async def app(_scope, _receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        finally:
            freed.append(True)

    async def stuck(_message):
        await asyncio.sleep(60)

    guard = Guard(app, hosts=["h"], key=None, seconds=0.05)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"h")]}
    asyncio.run(asyncio.wait_for(guard(scope, None, stuck), 5))
    assert freed == [True]
