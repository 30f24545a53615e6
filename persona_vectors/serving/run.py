"""Running the server until it is told to stop."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_shape, one_layer
from persona_vectors.serving.plan import Served
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.vector import PersonaVector

_SLOW = 120.0
"""Seconds that a request may take beyond its answer's: to send its body, and to take the reply."""
_SETTINGS: dict[str, Any] = {
    "access_log": False,
    "log_level": "warning",
    "server_header": False,
    "timeout_graceful_shutdown": 60,
    "limit_concurrency": 1000,
}


def serve(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[PersonaVector],
    *,
    layer: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 16,
    waiting: int = 64,
    seconds: float = 600.0,
    hosts: Sequence[str] = (),
    announce: Callable[[str], object] | None = None,
) -> None:
    """Serve a model and vectors to OpenAI's clients, and a page, until SIGTERM or SIGINT; answers are finished then.

    `rows` answers share each forward pass, `waiting` more may wait, and a request may take `seconds`, with two minutes
    more for a slow client. `hosts` are names besides `host` that requests may ask for. `layer` is that of edits that
    name none: by default the one that the first vector's file recommends to steer at, else the middle one. `announce`
    is told the address, once all has been checked.

    Raises InputError where the extra is missing, vectors do not fit, or the address is open and there is no key.
    """
    with needs_extra():
        import uvicorn

        from persona_vectors.serving.app import make_app
        from persona_vectors.serving.guard import Guard, api_key, is_loopback
    served = make_served(model, tokenizer, vectors, layer=layer, seconds=seconds)
    key = api_key(host)
    own = {"localhost", "127.0.0.1", "::1", host, *hosts}
    known = None if not is_loopback(host) and not hosts else sorted(own)
    app = Guard(make_app(served, rows=rows, waiting=waiting), hosts=known, key=key, seconds=seconds + _SLOW)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn takes them meanwhile, and raises them again at the end
        signal.signal(number, signal.SIG_IGN)
    if announce:
        announce(f"Serving http://{host}:{port} (Ctrl-C ends it)")
    uvicorn.Server(uvicorn.Config(app, host=host, port=port, **_SETTINGS)).run()


@contextmanager
def needs_extra() -> Iterator[None]:
    """Name the extra where an import fails."""
    try:
        yield
    except ImportError:
        raise InputError("serving needs fastapi and uvicorn: pip install 'persona-vectors-toolkit[serve]'") from None


def in_thread(app: Any) -> tuple[int, Callable[[], None]]:
    """Serve an app from a thread, on a free port of this machine; return the port, and what ends it."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **_SETTINGS))
    thread = threading.Thread(target=server.run, name="persona-vectors-http", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start: what uvicorn wrote to standard error says why")
        time.sleep(0.01)

    def end() -> None:
        server.should_exit = True
        thread.join()

    return server.servers[0].sockets[0].getsockname()[1], end


def make_served(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[PersonaVector],
    *,
    layer: SupportsIndex | None = None,
    seconds: float = 600.0,
) -> Served:
    """Return what a server serves; raises InputError for vectors, or a layer, that do not fit."""
    blocks = model_shape(model)[0]
    known = [use.layer for vector in vectors for use in vector.uses.values() if use.purpose == "steer" and use.evidence]
    layer = one_layer([*known, blocks // 2][0] if layer is None else layer, blocks)
    if vectors:
        unit_directions(model, vectors, layer)
    return Served(model, tokenizer, {vector.trait: vector for vector in vectors}, layer, seconds)
