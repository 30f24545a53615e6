"""A server on a free port of this machine, in a thread."""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from helpers import make_tokenizer, vectors_of_their_own

from persona_vectors.serving.plan import Served


@dataclass
class Running:
    """A server, and what it serves."""

    url: str
    served: Served
    engine: Any

    def client(self, key: str = "any"):
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def idle(self) -> None:
        """Wait until no row is in use."""
        begin = time.monotonic()
        while self.engine.load != (0, 0):
            assert time.monotonic() - begin < 30
            time.sleep(0.01)


@contextlib.contextmanager
def running(served: Served, *, key: str | None = None, rows: int = 8, waiting: int = 64, seconds: float = 720.0):
    from persona_vectors.serving.app import make_app
    from persona_vectors.serving.guard import Guard
    from persona_vectors.serving.run import in_thread

    app = make_app(served, rows=rows, waiting=waiting)
    port, end = in_thread(Guard(app, hosts=["127.0.0.1"], key=key, seconds=seconds))
    yield Running(f"http://127.0.0.1:{port}", served, app.state.engine)
    end()


@pytest.fixture(scope="session")
def served() -> Served:
    """The tiny model, which writes letters, and the vectors "t" and "u"."""
    model, tokenizer = zoo.build("llama"), make_tokenizer()
    model.config.max_position_embeddings = 65_536  # an answer that nobody ends takes minutes
    letters = tokenizer("abcdefgh ", add_special_tokens=False).input_ids
    bias = torch.full((len(model.lm_head.weight),), -99.0)
    bias[letters] = 0.0
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    vectors = {vector.trait: vector for vector in vectors_of_their_own(model)}
    return Served(model, tokenizer, vectors, 1)


@pytest.fixture(scope="session")
def start():
    """What starts a server: `with start(served) as server`."""
    return running


@pytest.fixture(scope="module")
def server(served):
    with running(served) as found:
        yield found
