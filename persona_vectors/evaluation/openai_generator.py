"""Answers from a model on any OpenAI-compatible server."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.openai_client import Malformed, Refused, ask, connect
from persona_vectors.evaluation.served import Completion

_WHOLE = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""Nothing of a server's own way of sampling: what vLLM, SGLang and llama.cpp call it."""
_TOKENS = {"return_token_ids": True, "n_probs": 1}
"""Token ids, as vLLM and SGLang give them, and as llama.cpp does, with the likeliest token's probability."""


@dataclass(frozen=True)
class OpenAIGenerator:
    """Answers from a model on a server: vLLM, SGLang, llama.cpp, or another that takes token ids as a prompt.

    The prompts are sent to /v1/completions as the tokens of our own template, so that nothing is templated twice, and
    sampled from the whole distribution. The samples of a prompt are asked for in one request where the server can do
    that. Token ids are taken where the server gives them (vLLM, SGLang, llama.cpp), and refused where they are of
    another vocabulary; else the text is tokenised here, which is marked. Have the same weights served as are read here.

    `concurrency` answers are under way at a time; on a slow server fewer, so that none waits `timeout` seconds. A
    failed request is sent at most `attempts` times (see `openai_client.ask`). The key is read from OPENAI_API_KEY, and
    the address from OPENAI_BASE_URL where `base_url` is not given.
    """

    model: str
    _: KW_ONLY
    base_url: str | None = None
    concurrency: int = 256
    attempts: int = 8
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        connect(self.base_url, timeout=self.timeout)  # a missing key or a wrong address is told at once

    @property
    def name(self) -> str:
        """How it is named in files."""
        return f"openai:{self.model}"

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> Iterator[list[Completion]]:
        """See `Generate`. Raises InputError where a request fails for good; interrupted, it waits for none."""
        client, stopped = connect(self.base_url, timeout=self.timeout), threading.Event()
        options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": 1.0}
        options |= _WHOLE | _TOKENS

        def complete(rows: Sequence[int]) -> list[Completion]:
            request = {"model": self.model, "prompt": list(prompts[rows[0]]), "n": len(rows), **options}
            request["seed"] = seeds[rows[0]] % 2**31
            found = ask(client, request, _choices, attempts=self.attempts, stopped=stopped)
            return [item._replace(row=row) for row, item in zip(rows, found)]

        groups = [list(rows) for _, rows in groupby(range(len(prompts)), key=lambda row: tuple(prompts[row]))]
        groups.sort(key=len, reverse=True)  # a run that goes on has some in part
        answered = _first(complete, groups[0])
        yield answered
        together, groups[0] = len(answered), groups[0][len(answered) :]
        parts = [rows[i : i + together] for rows in groups for i in range(0, len(rows), together)]
        yield from _as_ready(complete, parts, max(1, self.concurrency // together), stopped)


def _first(complete: Callable[[list[int]], list[Completion]], rows: list[int]) -> list[Completion]:
    """Answer as many of the first rows as the server does in one request; raises InputError where it does not one."""
    count = len(rows)
    while True:
        try:
            return complete(rows[:count])
        except Refused as error:
            if count == 1:
                raise InputError(f"{error}: give a server that takes prompts as token ids, and our context") from None
            count //= 2


def _as_ready(
    complete: Callable[[list[int]], list[Completion]],
    parts: Sequence[list[int]],
    threads: int,
    stopped: threading.Event,
) -> Iterator[list[Completion]]:
    """Yield the answers to parts, each in a request of its own, as many as are ready at a time."""
    todo: SimpleQueue[list[int]] = SimpleQueue()
    done: SimpleQueue[list[Completion] | BaseException] = SimpleQueue()
    for rows in parts:
        todo.put(rows)

    def work() -> None:
        with suppress(Empty):
            while not stopped.is_set():
                rows = todo.get(block=False)
                try:
                    answered = complete(rows)
                except BaseException as error:
                    done.put(InputError(str(error)) if isinstance(error, Refused) else error)
                    break
                if len(answered) < len(rows):
                    todo.put(rows[len(answered) :])
                done.put(answered)

    for _ in range(min(threads, len(parts))):  # daemons: a program that is interrupted waits for none
        threading.Thread(target=work, daemon=True).start()
    missing = sum(map(len, parts))
    try:
        while missing:
            ready, error = _ready(done)
            missing -= len(ready)
            if ready:
                yield ready
            if error is not None:
                raise error
    finally:
        stopped.set()


def _ready(
    done: "SimpleQueue[list[Completion] | BaseException]",
) -> tuple[list[Completion], BaseException | None]:
    """Wait for answers; return all that are there, up to an error."""
    ready: list[Completion] = []
    while not ready or not done.empty():
        found = done.get()
        if isinstance(found, BaseException):
            return ready, found
        ready += found
    return ready, None


def _choices(reply: dict[str, Any]) -> list[Completion]:
    """Return a reply's answers; raises Malformed where it is none, or an answer was broken off."""
    try:
        found = [
            Completion(0, choice["text"], _tokens(choice), {"stop": True, "length": False}[choice["finish_reason"]])
            for choice in reply["choices"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Malformed(f"no completion ({error!r})") from None
    if not found:
        raise Malformed("no completion (no choices)")
    return found


def _tokens(choice: dict[str, Any]) -> list[int] | None:
    named = [choice[name] for name in ("token_ids", "response_token_ids") if choice.get(name) is not None]
    content = (choice.get("logprobs") or {}).get("content")
    if not named and content and all("id" in item for item in content):
        named = [[item["id"] for item in content]]
    return [int(token) for token in named[0]] if named else None
