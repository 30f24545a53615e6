"""Running the server until it is told to stop."""

import signal
import sys
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_shape, one_layer
from persona_vectors.serving.plan import Served
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.vector import PersonaVector


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
) -> None:
    """Serve a model and vectors to OpenAI's clients, and a page, until SIGTERM or SIGINT; answers are finished then.

    `rows` answers share each forward pass, `waiting` more may wait, and a request may take `seconds`. `hosts` are
    names besides `host` that requests may ask for. `layer` is that of edits that name none: by default the one that the
    first vector's file recommends to steer at, else the middle one.

    Raises InputError where the extra is missing, vectors do not fit, or the address is open and there is no key.
    """
    try:
        import uvicorn

        from persona_vectors.serving.app import make_app
        from persona_vectors.serving.guard import Guard, api_key, is_loopback
    except ImportError:
        raise InputError("serving needs fastapi and uvicorn: pip install 'persona-vectors-toolkit[serve]'") from None
    served = make_served(model, tokenizer, vectors, layer=layer, seconds=seconds)
    key = api_key(host)
    own = {"localhost", "127.0.0.1", "::1", host, *hosts}
    known = None if not is_loopback(host) and not hosts else sorted(own)
    app = Guard(make_app(served, rows=rows, waiting=waiting), hosts=known, key=key)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn takes them meanwhile, and raises them again at the end
        signal.signal(number, signal.SIG_IGN)
    settings = {"access_log": False, "log_level": "warning", "server_header": False, "timeout_graceful_shutdown": 60}
    print(f"Serving http://{host}:{port} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, host=host, port=port, limit_concurrency=1000, **settings)).run()  # type: ignore[arg-type]


def make_served(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[PersonaVector],
    *,
    layer: int | None = None,
    seconds: float = 600.0,
) -> Served:
    """Return what a server serves; raises InputError for vectors, or a layer, that do not fit."""
    blocks = model_shape(model)[0]
    known = [use.layer for vector in vectors for use in vector.uses.values() if use.purpose == "steer" and use.evidence]
    layer = one_layer([*known, blocks // 2][0] if layer is None else layer, blocks)
    if vectors:
        unit_directions(model, vectors, layer)
    return Served(model, tokenizer, {vector.trait: vector for vector in vectors}, layer, seconds)
