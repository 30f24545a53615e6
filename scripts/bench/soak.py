"""A long run at a full queue, with clients that go away, send nonsense or read slowly."""

import collections
import json
import random
import threading
import time
from typing import Annotated, Any

import typer
from tqdm import tqdm

from bench.clients import Server, running
from bench.inputs import ModelName, Out
from bench.measuring import save
from persona_vectors.data.errors import InputError
from persona_vectors.model.loading import EMBEDDED

Vectors = Annotated[list[str] | None, typer.Option("--vector", help="a vector to serve [default: shipped ones]")]
NONSENSE = (b"", b"{", b"[" * 10_000, b'{"messages": 5}', b"\x00\xff", b'{"model": "m", "messages": [{"role": "x"}]}')
_KINDS = ("whole", "stream", "gone", "slow", "nonsense")
_WEIGHTS = (40, 35, 10, 10, 5)


def soak(
    model_name: ModelName = EMBEDDED,
    vectors: Vectors = None,
    minutes: Annotated[float, typer.Option(help="how long")] = 15.0,
    clients: Annotated[int, typer.Option(help="clients at once", min=1)] = 24,
    rows: Annotated[int, typer.Option(help="answers that share a forward pass", min=1)] = 8,
    new_tokens: Annotated[int, typer.Option(help="most tokens of an answer", min=1)] = 48,
    out: Out = None,
) -> None:
    """Keep a server's queue full; say what its memory does, and what is left when all clients have gone.

    A tenth of the requests are left in the middle, a twentieth are nonsense, a tenth are read slowly. Every other reply
    has to be whole, or an error in OpenAI's form.
    """
    names = vectors or [f"smollm2-135m/{name}" for name in ("optimistic", "evil")]
    counts: collections.Counter[str] = collections.Counter()
    memory: list[tuple[float, float]] = []
    with running(model_name, names, rows=rows, waiting=rows) as server:
        begin, over = time.monotonic(), threading.Event()
        arguments = server, counts, over, new_tokens
        threads = [threading.Thread(target=_client, args=(number, *arguments)) for number in range(clients)]
        for thread in threads:
            thread.start()
        with tqdm(total=round(60 * minutes), unit="s", leave=False) as bar:
            while (passed := time.monotonic() - begin) < 60 * minutes:
                memory.append((passed, server.figures()["process_resident_memory_bytes"] / 1e6))
                bar.update(min(round(passed), bar.total) - bar.n)
                time.sleep(min(5.0, 6 * minutes))
        over.set()
        for thread in threads:
            thread.join()
        server.idle()
        left = server.figures()
    found = {"model": model_name, "minutes": minutes, "clients": clients, "replies": dict(counts), "memory": memory}
    found |= summary(memory, left)
    print(*(f"{name}: {value}" for name, value in found.items() if name != "memory"), sep="\n")
    save(found, out)
    if counts["broken"] or found["hooks left"] or found["rows left"]:
        raise InputError("a reply was neither whole nor an error, or something was left behind: see above")


def summary(memory: list[tuple[float, float]], left: dict[str, float]) -> dict[str, Any]:
    """Return the memory after the warm-up (a fifth of the time) and in the last fifth, MB, and what is left."""
    early, late = memory[len(memory) // 5 :][: len(memory) // 5 or 1], memory[-(len(memory) // 5 or 1) :]
    first, last = (sum(value for _, value in part) / len(part) for part in (early, late))
    return {
        "MB after warm-up": round(first, 1),
        "MB at the end": round(last, 1),
        "growth %": round(100 * (last / first - 1), 2),
        "rows left": int(left["persona_vectors_rows"] + left["persona_vectors_waiting"]),
        "hooks left": int(left["persona_vectors_hooks"]),
        "open files": int(left["process_open_fds"]),
        "steps": int(left["persona_vectors_steps_total"]),
        "tokens": int(left["persona_vectors_tokens_total"]),
    }


def _client(
    number: int, server: Server, counts: "collections.Counter[str]", over: threading.Event, new_tokens: int
) -> None:
    chance = random.Random(number)
    while not over.is_set():
        kind = chance.choices(_KINDS, _WEIGHTS)[0]
        try:
            said = _one(server, kind, chance, new_tokens)
        except (OSError, ValueError, KeyError, IndexError) as error:
            said = f"broken ({kind}, {type(error).__name__})"
            counts["broken"] += 1
        counts[said] += 1
        if said == "429":
            over.wait(chance.uniform(0.05, 0.5))


def _one(server: Server, kind: str, chance: random.Random, new_tokens: int) -> str:
    """Send one request and take its reply; return what came of it."""
    if kind == "nonsense":
        return _error(server.open(chance.choice(NONSENSE)))
    vector = chance.choice(server.card["persona_vectors"]["vectors"])["name"]
    edits = [{"vector": vector, "coef": chance.uniform(-2, 2), "positions": chance.choice(["all", "response"])}]
    body = {
        "messages": [{"role": "user", "content": "How was your day? " * chance.randrange(1, 12)}],
        "max_tokens": chance.randrange(1, new_tokens + 1),
        "temperature": chance.choice([0, 1]),
        "stream": kind != "whole",
        "persona_vectors": {"edits": edits[: chance.randrange(2)], "project": [vector][: chance.randrange(2)]},
    }
    with server.open(body) as response:
        if response.status != 200:
            return _error(response)
        if kind == "whole":
            [choice] = json.loads(response.read())["choices"]
            return f"whole ({choice['finish_reason']})"
        for line in response:
            if kind == "gone" and chance.random() < 0.3:
                return "went away"
            if kind == "slow":
                time.sleep(chance.uniform(0.0, 0.1))
            if line == b"data: [DONE]\n":
                return f"stream, {kind}"
            if line.startswith(b"data: ") and "error" in json.loads(line[6:]):
                return "error in a stream"
    raise ValueError("a stream that has no end")


def _error(response: Any) -> str:
    with response:
        if not isinstance(json.loads(response.read())["error"]["message"], str) or response.status < 400:
            raise ValueError("an error of another form")
        return str(response.status)
