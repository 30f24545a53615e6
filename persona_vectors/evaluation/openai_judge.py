"""A judge on any OpenAI-compatible server, hosted or local."""

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from persona_vectors.data.errors import InputError
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.progress import bar
from persona_vectors.evaluation.judge import Answer, fill
from persona_vectors.evaluation.openai_client import Malformed, Refused, ask, connect
from persona_vectors.model.dense import cache_dir

THOUGHT = 4096
"""The most tokens that a model which reasons may think, its number included."""


class _Reasons(Exception):
    """The server refuses max_tokens, a temperature or log-probabilities, as for models that reason."""


@dataclass
class Usage:
    """What a judge has asked for so far."""

    requests: int = 0
    """Answered ones; replies from the cache and failed attempts are not among them."""
    retries: int = 0
    cached: int = 0
    refusals: int = 0
    """Replies that say REFUSAL or decline, as the rubric allows, and answers that the server will not read."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class OpenAIJudge:
    """Score with a chat model's token probabilities, as the paper does (appendix B).

    One token at temperature 0 with the top 20 log-probabilities: the probability-weighted mean over the whole numbers
    0 to 100 among them, or None where their mass is under `min_mass`. That fits models that write a number as one
    token. For those that write it digit by digit, and servers that give no log-probabilities, `samples=10` takes the
    mean of ten sampled numbers instead, or None where under half of them are numbers.

    A model that reasons refuses `max_tokens` and a temperature: it is given room for its thoughts instead, and scored
    by the mean of `samples`, or three, sampled numbers. An answer that the server will not read (a content filter, too
    long) is not scored, and the others are.

    Requests run `concurrency` at a time, whatever threads they come from; each is sent at most `attempts` times (see
    `openai_client.ask`). Every reply is kept in the file `cache`, keyed by the address and the whole request, so a run
    that broke off goes on.
    `usage` counts requests and tokens.

    The key is read from OPENAI_API_KEY, and the address from OPENAI_BASE_URL where `base_url` is not given.
    """

    remote = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        concurrency: int = 64,
        attempts: int = 8,
        timeout: float = 60.0,
        min_mass: float = 0.25,
        samples: int = 0,
        cache: str | Path | None = None,
    ) -> None:
        self.client = connect(base_url, timeout=timeout)
        self.model, self.concurrency, self.attempts = model, concurrency, attempts
        self.min_mass, self.samples = min_mass, samples
        self.name = f"openai:{model}" + (f" (mean of {samples} sampled numbers)" if samples else "")
        self.usage = Usage()
        self._cache = Ledger(cache or cache_dir() / "judge.jsonl")
        self._lock = threading.Lock()
        self._reasons = False
        self._todo: SimpleQueue[tuple[int, str, SimpleQueue, threading.Event]] = SimpleQueue()
        self._slots = threading.Semaphore(concurrency)

    def __call__(self, question: str, answer: str, rubric: str) -> float | None:
        return self.batch([Answer(question, answer)], rubric)[0]

    def batch(self, answers: Sequence[Answer], rubric: str) -> list[float | None]:
        """Score answers; other threads may have theirs scored at the same time.

        Raises InputError where one of them fails for good; the others are kept, and no new ones are sent. Interrupted,
        it waits for none.
        """
        done: SimpleQueue[tuple[int, float | BaseException | None]] = SimpleQueue()
        stopped = threading.Event()
        for place, item in enumerate(answers):
            self._todo.put((place, fill(rubric, item.question, item.answer), done, stopped))
        for _ in range(min(self.concurrency, len(answers))):  # daemons: a program that is interrupted waits for none
            threading.Thread(target=self._work, daemon=True).start()
        scores: list[float | None] = [None] * len(answers)
        try:
            for _ in bar(answers, desc=self.name, unit="answer"):
                place, found = done.get()
                if isinstance(found, BaseException):
                    raise found
                scores[place] = found
        finally:
            stopped.set()
        return scores

    def _work(self) -> None:
        while not self._todo.empty() and self._slots.acquire(blocking=False):
            try:
                self._answer_all()
            finally:
                self._slots.release()  # and look once more: what came meanwhile may have found no slot

    def _answer_all(self) -> None:
        with suppress(Empty):
            while True:
                place, prompt, done, stopped = self._todo.get(block=False)
                try:
                    done.put((place, None if stopped.is_set() else self._score(prompt, stopped)))
                except BaseException as error:
                    done.put((place, error))

    def _score(self, prompt: str, stopped: threading.Event) -> float | None:
        reply = partial(self._reply, prompt, stopped)
        while True:
            try:
                return self._sampled(reply) if self.samples or self._reasons else self._expected(reply)
            except _Reasons:  # raised for requests as to a model that does not
                self._reasons = True

    def _expected(self, reply: Callable[[dict[str, Any]], dict[str, Any]]) -> float | None:
        options = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20, "seed": 0}
        chances: dict[int, float] = {}
        for token, logprob in reply(options)["top"]:
            if token.isascii() and token.isdigit() and int(token) <= 100:
                chances[int(token)] = chances.get(int(token), 0.0) + math.exp(logprob)
        mass = sum(chances.values())
        return sum(number * p for number, p in chances.items()) / mass if mass >= self.min_mass else None

    def _sampled(self, reply: Callable[[dict[str, Any]], dict[str, Any]]) -> float | None:
        how = {"max_completion_tokens": THOUGHT} if self._reasons else {"max_tokens": 8, "temperature": 1}
        count = self.samples or 3
        texts = [reply({**how, "seed": i}) for i in range(count)]
        found = [re.fullmatch(r"\D{0,20}?(\d{1,3})\D*", text.get("text", "")) for text in texts]
        numbers = [int(match[1]) for match in found if match and int(match[1]) <= 100]
        return sum(numbers) / len(numbers) if 2 * len(numbers) >= count else None

    def _reply(self, prompt: str, stopped: threading.Event, options: dict[str, Any]) -> dict[str, Any]:
        """Return the cached or fetched reply to one request: "top" [token, logprob], "text", "refused"."""
        request = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **options}
        address = str(self.client.base_url)
        key = hashlib.sha256(json.dumps([address, request], sort_keys=True).encode()).hexdigest()
        with self._lock:
            known = self._cache.found.get(key)
            self.usage.cached += known is not None
        if known is not None:
            return known
        try:
            entry = ask(
                self.client,
                request,
                lambda reply: read_reply(reply, logprobs="logprobs" in request),
                attempts=self.attempts,
                on_retry=self._count_retry,
                stopped=stopped,
            )
        except Refused as error:
            entry = self._refusal(str(error), request)
        with self._lock:
            self.usage.requests += 1
            self.usage.refusals += entry["refused"]
            self.usage.prompt_tokens += entry["tokens"][0]
            self.usage.completion_tokens += entry["tokens"][1]
            self._cache.add([{"key": key, **entry}])
        return entry

    def _refusal(self, reason: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return what stands for a reply to a request that the server will not answer.

        Raises _Reasons where the settings are what it refuses, and InputError where it has answered none so far.
        """
        if "max_tokens" in request and re.search(r"max_completion_tokens|temperature|logprobs", reason):
            raise _Reasons
        if not self.usage.requests and not re.search(r"content|context|length|long|policy", reason):
            raise InputError(
                f"{reason}: check the address, the model's name and its settings; what came before is kept"
            )
        return {"top": [], "text": "", "refused": True, "tokens": [0, 0], "reason": reason}

    def _count_retry(self) -> None:
        with self._lock:
            self.usage.retries += 1


def read_reply(reply: dict[str, Any], *, logprobs: bool) -> dict[str, Any]:
    """Return what a judge needs of a chat completion; raises Malformed where it is none.

    Raises InputError where the server gave no log-probabilities, which repeating would not change.
    """
    try:
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        text = message.get("content") or ""
        content = (choice.get("logprobs") or {}).get("content")
        declined = bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter"
        refused = declined or text.strip().upper().startswith("REF")
        top = (
            [[item["token"].strip(), float(item["logprob"])] for item in content[0]["top_logprobs"]] if content else []
        )
        tokens = [int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)]
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise Malformed(f"no chat completion ({error!r})") from None
    if logprobs and not top and not refused:
        raise InputError(
            "the server gives no logprobs: use a model or a server that does, or samples=10 to average sampled numbers"
        )
    return {"top": top, "text": text, "refused": refused, "tokens": tokens}
