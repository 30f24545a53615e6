"""One answer in the making: what was asked of it, its tokens, and when it ends."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TopPLogitsWarper

from persona_vectors.model.prompts import decode
from persona_vectors.model.sampling import Draws
from persona_vectors.model.thoughts import outside_reasoning
from persona_vectors.serving.changes import Change


@dataclass(frozen=True)
class Token:
    """A token of an answer, with the part of the text that it ends."""

    text: str
    id: int
    logprob: float | None
    """None where no log-probabilities were asked for; of the edited model, at temperature 1."""
    top: Sequence[tuple[int, float]] = ()
    """The likeliest tokens and their log-probabilities."""
    values: Mapping[str, float | None] = field(default_factory=dict)
    """Its projections; none for a last token that the model never read."""


@dataclass(frozen=True)
class End:
    """The end of an answer."""

    reason: str
    """"stop", "length", "alarm" or "error"."""
    tokens: int = 0
    """How many were generated, the end token left out."""
    before: Mapping[str, float | None] = field(default_factory=dict)
    """The projections of the prompt's last token."""
    means: Mapping[str, float | None] = field(default_factory=dict)
    """Mean projections over the answer's tokens, thoughts left out."""
    thoughts: Sequence[int] = ()
    """Which tokens, from 0, are reasoning."""
    alarm: str | None = None
    """The key whose limit was passed."""
    error: str | None = None


@dataclass(eq=False)
class Job:
    """What is asked of one answer. `put` is given its tokens and its end, from the thread that runs the model."""

    prompt: list[int]
    put: Callable[[Token | End], object]
    max_new_tokens: int
    deadline: float = math.inf
    """When it must have ended, by `time.monotonic`."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    """The row's own, from `row_seed`."""
    stop: Sequence[str] = ()
    top: int | None = None
    """How many of the likeliest tokens are told with each token's log-probability; None: not even that."""
    echo: bool = False
    """Whether the prompt's tokens are told too, and the one that ends the answer."""
    changes: Sequence[Change] = ()
    keys: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The projections that are told: for each name the layer, and the vector's index."""
    alarm: Mapping[str, float] = field(default_factory=dict)
    """The projections that end the answer when they are passed, by the same names."""
    cancelled: bool = False


class Row:
    """A job that is being answered."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> None:
        self.job, self.tokenizer, self.stops = job, tokenizer, stops
        self.prompt, self.changes = job.prompt, job.changes
        self.layers = frozenset(layer for layer, _ in job.keys.values())
        self.tokens: list[int] = []
        self.ended = False
        self._draws = Draws([job.seed], job.temperature) if job.temperature > 0 else None
        self._text, self._cut = "", False
        self._words = _Words(tokenizer)
        self._held: list[tuple[int, Token]] = []
        self._before: dict[str, float | None] = {}
        self._values: list[dict[str, float | None]] = []

    def read(self, values: Mapping[int, Sequence[Sequence[float]]], row: int) -> None:
        """Take in the projections of the token that was just read: the prompt's last, or the answer's."""
        found = {key: _finite(values[layer][row][column]) for key, (layer, column) in self.job.keys.items()}
        if not self.tokens:
            self._before = found
            return
        if found:
            self._values.append(found)
            end, token = self._held[-1]
            self._held[-1] = end, replace(token, values=found)
            alarm = next((key for key, limit in self.job.alarm.items() if (found[key] or 0.0) > limit), None)
            if alarm is not None:
                self.end("alarm", alarm=alarm)
            elif len(self.tokens) == self.job.max_new_tokens:
                self.end("length")
            else:
                self._release()

    def read_prompt(self, logits: Float[Tensor, "token vocab"]) -> None:
        """Tell the prompt's tokens, each with what the ones before it say of it."""
        words = _Words(self.tokenizer)
        for place, token in enumerate(self.prompt):
            logprob, top = self._logs(logits[place - 1], token) if place else (None, [])
            self.job.put(Token(words.add(token), token, logprob, top))

    def choose(self, logits: Float[Tensor, " vocab"], greedy: int) -> None:
        """Take the next token; `greedy` is the likeliest."""
        token = greedy if self._draws is None else self._draw(logits[None])
        logprob, top = self._logs(logits, token)
        if token in self.stops:
            if self.job.echo:
                self.job.put(Token("", token, logprob, top))
            self.end("stop")
            return
        piece = self._words.add(token)
        self._text += piece
        self.tokens.append(token)
        self._held.append((len(self._text), Token(piece, token, logprob, top)))
        found = [self._text.find(stop, max(0, len(self._text) - len(piece) - len(stop))) for stop in self.job.stop]
        cuts = [at for at in found if at >= 0]
        if cuts:
            self._text, self._cut = self._text[: min(cuts)], True
            self.end("stop")
        elif not self.job.keys:  # else once it has been read
            if len(self.tokens) == self.job.max_new_tokens:
                self.end("length")
            else:
                self._release()

    def end(self, reason: str, *, alarm: str | None = None, error: str | None = None) -> None:
        """End the answer: tell what is held back of it, and how it ended."""
        self.ended = True
        whole = decode(self.tokenizer, self.tokens)
        if not self._cut and self._held and whole.startswith(self._text):  # half a character at the end
            _, last = self._held[-1]
            self._held[-1] = len(whole), replace(last, text=last.text + whole[len(self._text) :])
            self._text = whole
        self._release(everything=True)
        outside = set(outside_reasoning(self.tokenizer, self.prompt, self.tokens)) if self._values else set()
        counted = [values for i, values in enumerate(self._values) if i in outside] or self._values
        means = {key: _mean([values[key] for values in counted]) for key in self.job.keys if counted}
        thoughts = [i for i in range(len(self.tokens)) if self._values and i not in outside]
        self.job.put(End(reason, len(self.tokens), self._before, means, thoughts, alarm, error))

    def _logs(self, logits: Float[Tensor, " vocab"], token: int) -> tuple[float | None, list[tuple[int, float]]]:
        """Return a token's log-probability and the likeliest tokens, where they were asked for."""
        if self.job.top is None:
            return None, []
        logs = logits.float().log_softmax(dim=-1)
        best = logs.topk(self.job.top)
        return float(logs[token]), list(zip(best.indices.tolist(), best.values.tolist()))

    def _draw(self, logits: Float[Tensor, "1 vocab"]) -> int:
        assert self._draws is not None
        if self.job.top_p < 1:
            kept = TopPLogitsWarper(self.job.top_p)(None, logits / self.job.temperature)
            logits = logits.masked_fill(kept == -torch.inf, -torch.inf)
        return int(self._draws(torch.empty(1, len(self.tokens)), logits).argmax())

    def _release(self, *, everything: bool = False) -> None:
        """Tell the tokens whose text cannot become a stop string."""
        held = (k for stop in self.job.stop for k in range(1, len(stop)) if self._text.endswith(stop[:k]))
        safe = len(self._text) - (0 if everything else max(held, default=0))
        while self._held and (everything or self._held[0][0] <= safe):
            end, token = self._held.pop(0)
            over = max(end - safe, 0)
            if over:  # a stop string begins in it, or before it
                token = replace(token, text=token.text[: max(len(token.text) - over, 0)])
            if token.text or not over:
                self.job.put(token)


class _Words:
    """The text of tokens as they come: a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.told = 0
        """How many of `ids` have been told; those before are there for the spaces between words alone."""

    def add(self, token: int) -> str:
        """Return what the token adds to the text."""
        before = decode(self.tokenizer, self.ids[: self.told])
        self.ids.append(token)
        now = decode(self.tokenizer, self.ids)
        if now.endswith("\ufffd") and len(self.ids) - self.told < 4:
            return ""
        self.ids, self.told = self.ids[self.told :], len(self.ids) - self.told
        return now[len(before) :]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
