"""What stands before the server: who may ask, from which page, and how much."""

import asyncio
import hmac
import ipaddress
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from persona_vectors.data.errors import InputError

KEY = "PERSONA_VECTORS_API_KEY"
LARGEST = 2**20
"""How many bytes a request's body may have."""
OPEN = ("/", "/health")
"""What is answered without a key: nothing there is anybody's."""


def is_loopback(host: str) -> bool:
    """Say whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(host: str) -> str | None:
    """Return the key that the environment holds; raises InputError where an open address would have none."""
    key = os.environ.get(KEY) or None
    if key is None and not is_loopback(host):
        raise InputError(
            f"{host} can be reached from other machines: set {KEY} to a key that clients send, or leave it"
        )
    return key


def fault(status: int, message: str, kind: str = "invalid_request_error") -> tuple[int, dict[str, Any]]:
    """Return an error in OpenAI's form, with its status."""
    return status, {"error": {"message": " ".join(message.split()), "type": kind, "param": None, "code": None}}


class Guard:
    """An ASGI app around another one: refuses requests for other hosts, from other pages, without the key, too long.

    A page elsewhere that has its own name resolve to this machine is known by the host that it asks for. A request that
    is not over after `seconds`, its body read and its reply taken, is cut off. Where requests come by a proxy
    (`proxied`), which has names of its own, the key alone decides: no page elsewhere knows it.
    """

    def __init__(
        self,
        app: Any,
        *,
        hosts: Sequence[str] | None,
        key: str | None,
        seconds: float = 720.0,
        proxied: bool = False,
    ) -> None:
        self.app, self.key, self.seconds, self.proxied = app, key, seconds, proxied
        self.hosts = None if hosts is None else {host.strip("[]").lower() for host in hosts}
        """The names that requests may ask for; None: any, where there is a key."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        names = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        headers: dict[bytes, str] = dict(names)
        twice = any(sum(name == other for other, _ in names) > 1 for name in (b"host", b"origin", b"content-length"))
        refused = fault(400, "a header is there twice: send it once") if twice else self._refusal(scope, headers)
        if refused is not None:
            await _answer(send, *refused)
            return
        read, begun = 0, False

        async def counted() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > LARGEST:
                raise TooLong
            return message

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await asyncio.wait_for(self.app(scope, counted, noted), self.seconds)
        except asyncio.TimeoutError:  # what has begun to be sent ends in its middle: the connection is closed
            if not begun:
                await _answer(send, *fault(408, "the request was too slow"))

    def _refusal(self, scope: Any, headers: dict[bytes, str]) -> tuple[int, dict[str, Any]] | None:
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.hosts is not None and _name(host) not in self.hosts:
            return fault(403, "this host name is not served: use the address that the server was started with")
        if not self.proxied and origin not in (None, f"http://{host}", f"https://{host}"):
            return fault(403, "requests from another site's page are refused: open this server's own page")
        length = headers.get(b"content-length", "0")
        if not re.fullmatch(r"\d{1,18}", length) or int(length) > LARGEST:
            return fault(413, f"the body is too long: at most {LARGEST} bytes")
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
                return fault(401, f"no key, or a wrong one: send the server's {KEY} as api_key", "authentication_error")
        if scope["method"] == "POST" and headers.get(b"content-type", "").partition(";")[0] != "application/json":
            return fault(415, "the body has to be application/json")
        return None


class TooLong(Exception):
    """Raised where a body is longer than its request said, or than it may be."""


def _name(host: str) -> str:
    """Return the host's name without its port, "" where it is none."""
    found = re.fullmatch(r"\[([0-9a-f:.]+)\](?::\d+)?|([\w.-]+)(?::\d+)?", host.lower())
    return (found[1] or found[2]) if found else ""


async def _answer(send: Any, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
