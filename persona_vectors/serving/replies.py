"""Replies in OpenAI's forms, with ours under `persona_vectors`."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from persona_vectors.serving.asked import ChatAsked, TextAsked
from persona_vectors.serving.plan import Plan, Served
from persona_vectors.serving.rows import End, Token

Event = tuple[int, Token | End]
"""What one of a request's answers has to tell: its number, and a token or its end."""


class Failed(Exception):
    """An answer that the server could not finish."""


class Replies:
    """Writes what a request's answers tell, all at once or piece by piece."""

    def __init__(self, served: Served, asked: ChatAsked | TextAsked, plan: Plan) -> None:
        self.served, self.asked, self.plan = served, asked, plan
        self.chat = isinstance(asked, ChatAsked)
        self.head = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": served.name,
        }
        self.sampled = 0

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the reply to a request that is not streamed; raises Failed where an answer has failed."""
        tokens: list[list[Token]] = [[] for _ in self.plan.jobs]
        choices, told = [], []
        for number, event in events:
            if isinstance(event, Token):
                tokens[number].append(event)
        for number, end in sorted((number, event) for number, event in events if isinstance(event, End)):
            mine = tokens[number]
            text = "".join(token.text for token in mine)
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": number, **said, "logprobs": self._logprobs(mine), "finish_reason": self._end(end)})
            told.append({"index": number, **_summary(end), **self._read(mine)})
        kind = "chat.completion" if self.chat else "text_completion"
        ours = {**self._applied(), "choices": told}
        return {**self.head, "object": kind, "choices": choices, "usage": self._usage(), "persona_vectors": ours}

    def opening(self) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        if not self.chat:
            return []
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": number, **delta}]) for number in range(len(self.plan.jobs))]

    def piece(self, event: Event) -> dict[str, Any]:
        """Return a chunk of a stream; raises Failed where the answer has failed."""
        number, told = event
        if isinstance(told, End):
            reason = self._end(told)
            delta: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
            ours = {**self._applied(), "choices": [{"index": number, **_summary(told)}]}
            choice = {"index": number, **delta, "logprobs": None, "finish_reason": reason}
            return {**self._chunk([choice]), "persona_vectors": ours}
        delta = {"delta": {"content": told.text}} if self.chat else {"text": told.text}
        choice = {"index": number, **delta, "logprobs": self._logprobs([told]), "finish_reason": None}
        read = self._read([told])
        ours = {"persona_vectors": {"choices": [{"index": number, **read}]}} if read else {}
        return {**self._chunk([choice]), **ours}

    def closing(self) -> list[dict[str, Any]]:
        """Return what a stream ends with: the usage, where it was asked for."""
        wanted = (self.asked.stream_options or {}).get("include_usage")
        return [{**self._chunk([]), "usage": self._usage()}] if wanted else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}

    def _end(self, end: End) -> str:
        if end.error is not None:
            raise Failed(end.error)
        self.sampled += end.tokens
        return end.reason

    def _usage(self) -> dict[str, int]:
        read = sum(len(job.prompt) for job in self.plan.jobs[:: self.asked.n])
        return {"prompt_tokens": read, "completion_tokens": self.sampled, "total_tokens": read + self.sampled}

    def _applied(self) -> dict[str, Any]:
        """Say which edits were applied, and so when none was."""
        edits = []
        for change in self.plan.changes:
            name = {"steer": "coef", "ablate": None}.get(change.kind, "limit")
            number = {} if name is None else {name: change.amount}
            edit = {"vector": change.vector.trait, "kind": change.kind, "layer": change.layer, **number}
            edits.append({**edit, "positions": change.positions})
        said = f"{len(edits)} edit{'s' * (len(edits) > 1)} applied" if edits else "no edit was applied"
        return {"note": said, "edits": edits, "seed": self.plan.seed}

    def _read(self, tokens: Sequence[Token]) -> dict[str, Any]:
        keys = list(self.plan.jobs[0].keys)
        if not keys:
            return {}
        values = {key: [token.values.get(key) for token in tokens] for key in keys}
        return {"tokens": [token.text for token in tokens], "projections": values}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.asked.top is None:
            return None
        if self.chat:
            content = [
                {
                    **self._word(token.id, token.logprob),
                    "top_logprobs": [self._word(i, value) for i, value in token.top],
                }
                for token in tokens
            ]
            return {"content": content, "refusal": None}
        names, offsets, at = [self._text(token.id) for token in tokens], [], 0
        for token in tokens:
            offsets.append(at)
            at += len(token.text)
        top = [{self._text(i): value for i, value in token.top} or None for token in tokens]
        logs = [token.logprob for token in tokens]
        return {"tokens": names, "token_logprobs": logs, "top_logprobs": top, "text_offset": offsets}

    def _word(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self.served.tokenizer.decode([token]))


def _summary(end: End) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt_last": dict(end.before), "mean": dict(end.means)} if end.before else {}
    if end.thoughts:
        found["thinking"] = list(end.thoughts)
    return {**found, "alarm": end.alarm} if end.alarm else found
