"""A judge on any OpenAI-compatible server: OpenAI, vLLM, llama.cpp, Ollama."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from persona_vectors.files import InputError
from persona_vectors.judge import Answer, fill
from persona_vectors.models import cache_dir


class OpenAIJudge:
    """Score with a chat model's token probabilities, as the paper does (appendix B).

    One token at temperature 0 with the top 20 log-probabilities: the probability-weighted mean over the whole numbers
    0 to 100 among them, or None where their mass is under `min_mass`. Requests run `concurrency` at a time and are sent
    again after passing faults; every reply is kept in the file `cache`, keyed by the whole request.

    The key is read from OPENAI_API_KEY, and the address from OPENAI_BASE_URL where `base_url` is not given.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        concurrency: int = 16,
        min_mass: float = 0.25,
        cache: str | Path | None = None,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError:
            raise InputError(
                "OpenAIJudge needs the openai package: pip install 'persona-vectors-toolkit[openai]'"
            ) from None
        if not os.environ.get("OPENAI_API_KEY"):
            raise InputError("OPENAI_API_KEY is not set: export your key (any text for a local server)")
        self.client = OpenAI(base_url=base_url, max_retries=5, timeout=60)
        self.model, self.concurrency, self.min_mass = model, concurrency, min_mass
        self.name = f"openai:{model}"
        self.cache = Path(cache) if cache else cache_dir() / "judge.jsonl"
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, float]] = {}
        if self.cache.is_file():
            lines = self.cache.read_text(encoding="utf-8").splitlines()
            self._known = {entry["key"]: entry["top"] for entry in map(_read_entry, lines) if entry}

    def __call__(self, question: str, answer: str, rubric: str) -> float | None:
        top = self._top_logprobs(fill(rubric, question, answer))
        chances = {int(t): math.exp(p) for t, p in top.items() if t.isascii() and t.isdigit() and int(t) <= 100}
        mass = sum(chances.values())
        return sum(number * p for number, p in chances.items()) / mass if mass >= self.min_mass else None

    def batch(self, answers: Sequence[Answer], rubric: str) -> list[float | None]:
        """Score answers, `concurrency` requests at a time."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda item: self(item.question, item.answer, rubric), answers))

    def _top_logprobs(self, prompt: str) -> dict[str, float]:
        from openai import OpenAIError

        request: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
            "seed": 0,
        }
        address = str(self.client.base_url)
        key = hashlib.sha256(json.dumps([address, request], sort_keys=True).encode()).hexdigest()
        if key not in self._known:
            try:
                reply = self.client.chat.completions.create(**request)
            except OpenAIError as error:
                raise InputError(
                    f"the judge at {address} failed ({type(error).__name__}: {error}): check the address, "
                    "the model's name and the key; what was judged so far is kept"
                ) from None
            logprobs = reply.choices[0].logprobs if reply.choices else None
            if logprobs is None or not logprobs.content:
                raise InputError(f"the judge at {address} gives no logprobs: use a model or a server that does")
            top = {item.token.strip(): item.logprob for item in logprobs.content[0].top_logprobs}
            with self._lock:
                self._known[key] = top
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "top": top}) + "\n")
        return self._known[key]


def _read_entry(line: str) -> dict[str, Any] | None:
    """Return a cached reply, or None for a line that a killed run left cut."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
