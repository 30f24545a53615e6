"""An OpenAI-compatible server on this machine that fails as real ones do."""

import collections
import hashlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FAULTS = ["429", "500", "timeout", "cut", "malformed", "empty"]


class FaultServer(http.server.ThreadingHTTPServer):
    """Answers requests with `reply(body)`: a dict, or the reason of a refusal.

    A share of the attempts fails, the same ones in every run.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(
        self,
        reply: Callable[[dict], dict | str],
        share: float = 0.0,
        *,
        always: str | None = None,
        hangs: float = 0.0,
        late: float = 0.6,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.share, self.always, self.hangs, self.late = reply, share, always, hangs, late
        self.requests: list[dict] = []
        self.lock, self.running, self.most = threading.Lock(), 0, 0
        self.attempts: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass

    def fault_of(self, prompt: str, attempt: int) -> str | None:
        digest = hashlib.sha256(f"{prompt}:{attempt}".encode()).digest()
        return FAULTS[digest[4] % 6] if int.from_bytes(digest[:4], "big") / 2**32 < self.share else None


class Handler(http.server.BaseHTTPRequestHandler):
    server: FaultServer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][0]["content"] if "messages" in body else str(body["prompt"])
        server, prompt = self.server, asked + f"|{body.get('seed')}"
        with server.lock:
            server.attempts[prompt] += 1
            fault = server.always or server.fault_of(prompt, server.attempts[prompt])
            server.faults[fault or "none"] += 1
            server.running += 1
            server.most = max(server.most, server.running)
        time.sleep(server.hangs or 0.002)
        with server.lock:
            server.requests.append(body)
            server.running -= 1  # before the answer: the client may send its next request at once
        self.answer(fault, body)

    def answer(self, fault: str | None, body: dict):
        if fault == "timeout":
            time.sleep(self.server.late)
        if fault in ("cut", "timeout"):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        reply = self.server.reply(body)
        refused = isinstance(reply, str)
        if isinstance(reply, str):
            reply = {"error": {"message": reply, "code": "invalid_request_error"}}
        if fault == "empty":
            reply["choices"] = []
        payload = json.dumps(reply).encode()[: 20 if fault == "malformed" else None]
        self.send_response(400 if refused else int(fault) if fault in ("429", "500", "401", "404") else 200)
        if fault == "429":
            self.send_header("Retry-After", "0.05")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@contextmanager
def started() -> Iterator[Callable[..., FaultServer]]:
    """Yield what starts a server, `start(reply, ...)`; they all end with the `with`."""
    running: list[FaultServer] = []

    def start(reply: Callable[[dict], dict | str], **options: Any) -> FaultServer:
        running.append(FaultServer(reply, **options))
        threading.Thread(target=running[-1].serve_forever, daemon=True).start()
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
