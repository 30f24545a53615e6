"""A server as a process of its own, and plain clients of it."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.request import urlopen

from persona_vectors.data.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """A server on a port of this machine."""

    port: int
    card: dict[str, Any]
    """What it says of its model."""

    def open(self, body: dict[str, Any] | bytes) -> http.client.HTTPResponse:
        """Post to /v1/chat/completions; the reply's body is still to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)  # longer than the server takes
        content = body if isinstance(body, bytes) else json.dumps({"model": self.card["id"], **body}).encode()
        connection.request("POST", "/v1/chat/completions", content, {"Content-Type": "application/json"})
        return connection.getresponse()

    def ask(self, question: str, ours: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        """Return the whole reply to a question; raises RuntimeError where it is none."""
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, **given}
        with self.open({**body, "persona_vectors": ours or {}}) as response:
            reply = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"the server said {response.status}: {reply['error']['message']}")
        return reply

    def figures(self) -> dict[str, float]:
        """Return what /metrics says, by name."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    def idle(self, seconds: float = 60.0) -> None:
        """Wait until no row is in use."""
        until = time.monotonic() + seconds
        while any(self.figures()[f"persona_vectors_{name}"] for name in ("rows", "waiting")):
            if time.monotonic() > until:
                raise RuntimeError("rows are still in use, and nobody waits for them")
            time.sleep(0.05)


@contextlib.contextmanager
def running(model: str, vectors: Sequence[str], *, rows: int = 16, waiting: int = 64) -> Iterator[Server]:
    """Start `persona-vectors serve` on a free port; at the end it is told to end, and has to do so without an error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"--port": port, "--rows": rows, "--waiting": waiting, "--device": "cpu"}
    command = [sys.executable, "-m", "persona_vectors", "serve", model, *vectors]
    process = subprocess.Popen([*command, *(str(part) for pair in options.items() for part in pair)])
    try:
        yield Server(port, _card(process, port))
        process.send_signal(signal.SIGTERM)
        if process.wait(120) != 0:
            raise RuntimeError(f"the server ended with {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _card(process: subprocess.Popen[bytes], port: int) -> dict[str, Any]:
    while process.poll() is None:
        with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as response:
            return json.load(response)["data"][0]
        time.sleep(0.1)
    raise InputError("the server did not start: see above")


def at_once(clients: int, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Do jobs in as many threads, each taking the next one; return what they return, in order."""
    with ThreadPoolExecutor(clients) as threads:
        return [each.result() for each in [threads.submit(job) for job in jobs]]
