"""Thoughts: which of an answer's tokens are reasoning, told by the marks that a template has a model put around it."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.tokens import Tokens, places

SPANS = ("answer", "reasoning")


class Marks(NamedTuple):
    """What opens a thought, and the patterns of what opens and of what closes one."""

    name: str
    opens: str
    closes: str


def _pair(opens: str, closes: str) -> Marks:
    return Marks(opens, re.escape(opens), re.escape(closes))


KNOWN = (
    _pair("<think>", "</think>"),
    Marks(  # a turn has channels, each a message with a header; all but this one are the answer's
        "<|channel|>analysis",
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>analysis",
        r"<\|channel\|>(?!analysis)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>",
    ),
    _pair("[THINK]", "[/THINK]"),
    _pair("<seed:think>", "</seed:think>"),
    _pair("<|START_THINKING|>", "<|END_THINKING|>"),
    _pair("◁think▷", "◁/think▷"),
    _pair("<thinking>", "</thinking>"),
)


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """Return the marks of a tokenizer's thoughts: known ones that stand in its template or its vocabulary.

    Else what the template puts around the `reasoning_content`, or `thinking`, of a message; else <think>...</think>.
    """
    return _marks(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=64)
def _marks(tokenizer: PreTrainedTokenizerBase, template: str) -> Marks:
    added = tokenizer.get_added_vocab()
    for known in KNOWN:
        first = re.match(r"<\|[^|]*\|>|.*", known.name)
        assert first is not None
        if first[0] in template or first[0] in added:
            return known
    words: Any = {"reasoning_content": "THOUGHT-0", "thinking": "THOUGHT-0", "content": "SAID-0"}
    talk: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", **words}]
    try:
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
        prompt = str(tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True))
    except Exception:  # whatever a template may raise; one that is wrong says so where it is used
        return KNOWN[0]
    before, _, after = text.partition("THOUGHT-0")
    opens, closes = before.removeprefix(prompt).strip(), after.partition("SAID-0")[0].strip()
    return _pair(opens, closes) if before.startswith(prompt) and opens and closes else KNOWN[0]


@dataclass(frozen=True)
class Span:
    """One of the two parts of a thinking model's answers: "answer" for what is said, or "reasoning" for the thoughts.

    Verbs that are given the tokenizer take the name as their `positions`; others `pv.Span(tokenizer, "answer")`. What
    opens and closes a thought, and the white space after it, belong to it, also where a thought is cut off or the
    prompt has opened it; so does a token that is partly a thought. An edit, which cannot know what follows, begins one
    token earlier, with the one that predicts the span's first (the prompt's last, or the mark), and ends before the
    one that predicts what comes after the span. In training the answers are the tokens that the loss counts.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    name: str

    def __post_init__(self) -> None:
        if self.name not in SPANS:
            raise InputError(f"positions is {self.name!r}: give all, or a part of the answer: {' or '.join(SPANS)}")

    def kept(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """Return which of an answer's tokens lie in the span, from 0."""
        outside = outside_reasoning(self.tokenizer, prompt, answer)
        return outside if self.name == "answer" else sorted(set(range(len(answer))) - set(outside))

    def within(
        self, ids: Int[Tensor, "batch token"], answers: Bool[Tensor, "batch token"]
    ) -> Bool[Tensor, "batch token"]:
        """Return which tokens lie in the span, where `answers` says which are an answer's."""
        found = torch.zeros(answers.shape, dtype=torch.bool)
        for row, first, end in _runs(answers):
            line = ids[row].tolist()
            if min(line) < 0:
                raise InputError("a span is told from token ids, and the model was given embeddings: give input_ids")
            found[row, [first + i for i in self.kept(line[:first], line[first:end])]] = True
        return found.to(answers.device)

    def __call__(self, tokens: Tokens) -> Bool[Tensor, "batch token"]:
        """Return which tokens of the running pass an edit of the span applies to."""
        if (told := places.get()) is not None:
            return self._told(tokens, *told)
        ids, begin = _ids_so_far(tokens), tokens.begin
        if tokens.decoding:
            assert tokens.boundary is not None
            runs = [(row, tokens.boundary - 1, ids.shape[1]) for row in range(tokens.batch)]
        else:
            runs = [(row, begin + first, begin + end) for row, first, end in _runs(_answers(tokens, self.name))]
        found = torch.zeros(ids.shape, dtype=torch.bool)
        for row, before, end in runs:
            line = ids[row].tolist()
            states = _open_after(self.tokenizer, line[: before + 1], line[before + 1 : end])
            found[row, before:end] = torch.tensor(states) == (self.name == "reasoning")
        return found[:, begin:].to(tokens.device)

    def _told(self, tokens: Tokens, place: Tensor, prompts: Sequence[Sequence[int]]) -> Bool[Tensor, "batch token"]:
        """Return the same for a pass over finished text, whose answers and prompts are told: see `answers_at`."""
        ids, where = _ids_of(tokens), _answers(tokens, self.name)
        found = torch.zeros_like(where)
        for row, first, end in _runs(where):
            begin = first + int(place[row, first] < 0)  # after the prompt's last token, where that is read too
            states = _open_after(self.tokenizer, prompts[row], ids[row, begin:end].tolist())[first - end :]
            found[row, first:end] = torch.tensor(states, device=found.device) == (self.name == "reasoning")
        return found


def _answers(tokens: Tokens, name: str) -> Bool[Tensor, "batch token"]:
    """Return the tokens of a pass that are an answer's, and those that predict its first ones."""
    told = tokens.boundary is not None or places.get() is not None
    if not told and tokens.labels is None:
        raise InputError(
            f"positions={name!r} is not known in a forward pass that reads finished text without labels: give 'all', "
            "or a mask [batch, token]; in decoding, call model.generate or pass the cache"
        )
    found = tokens.select("response" if told else "labels")
    assert found is not None
    return found


def span_of(tokenizer: PreTrainedTokenizerBase, positions: str) -> Span | None:
    """Return the span that a verb's `positions` name; None for "all", which is the whole answer."""
    return None if positions == "all" else Span(tokenizer, positions)


def edit_positions(tokenizer: PreTrainedTokenizerBase, positions: str) -> "str | Span":
    """Return what an edit is given for a name: a `Span` for "answer" and "reasoning", others as they are."""
    return Span(tokenizer, positions) if positions in SPANS else positions


def kept_tokens(span: Span | None, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """Return which of an answer's tokens are read, from 0: those of a span, or all."""
    return list(range(len(answer))) if span is None else span.kept(prompt, answer)


def outside_reasoning(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
    """Return which of an answer's tokens lie outside its thoughts and the white space after them, from 0.

    A thought may have been opened by the prompt, as some templates do, and is open to the end where it was cut off.
    A token that is partly reasoning counts as reasoning.
    """
    name, opens, closes = marks_of(tokenizer)
    whole, counts = _text(tokenizer, answer), range(len(answer) + 1)
    opened = opens_thought(tokenizer, _text(tokenizer, prompt[-64:])) or first_mark(tokenizer, whole) == "closes"
    lead = name if opened else ""
    kept: list[int] = []
    begin = 0
    for thought in re.finditer(rf"(?:{opens}).*?(?:(?:{closes})\s*|\Z)", lead + whole, re.DOTALL):
        before, after = thought.start() - len(lead), thought.end() - len(lead)
        kept += range(begin, bisect_right(counts, before, key=lambda n: _length(tokenizer, answer, n)) - 1)
        begin = bisect_left(counts, after, key=lambda n: _length(tokenizer, answer, n))
    return [*kept, *range(begin, len(answer))]


def opens_thought(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Say whether a prompt ends with the mark that opens a thought."""
    return without_opening(tokenizer, prompt) != prompt


def without_opening(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return a prompt without the mark at its end that opens a thought: before an answer that has it itself."""
    found = re.search(rf"(?:{marks_of(tokenizer).opens})(?:<\|message\|>)?\s*\Z", prompt)
    return prompt[: found.start()] if found else prompt


def first_mark(tokenizer: PreTrainedTokenizerBase, answer: str) -> str | None:
    """Say whether the first mark in an answer's text "opens" a thought or "closes" one; None where there is none."""
    _, opens, closes = marks_of(tokenizer)
    first = re.search(f"(?P<opens>{opens})|(?P<closes>{closes})", answer)
    return first and first.lastgroup


def _open_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], answer: Sequence[int]) -> list[bool]:
    """Say whether a thought is open after the prompt, and after each token of the answer, from what is read by then."""
    _, opens, closes = marks_of(tokenizer)
    count = range(len(answer) + 1)
    states = [opens_thought(tokenizer, _text(tokenizer, prompt[-64:]))] * len(count)
    for mark in re.finditer(f"(?P<open>{opens})|{closes}", _text(tokenizer, answer)):
        place = bisect_left(count, mark.end(), key=lambda n: _length(tokenizer, answer, n))
        states[place:] = [mark["open"] is not None] * (len(count) - place)
    return states


def _ids_so_far(tokens: Tokens) -> Int[Tensor, "batch token"]:
    """Return the ids of the pass's rows from where they begin; an uncached pass reads all of them itself."""
    ids = _ids_of(tokens)
    if tokens.call is not None and tokens.call.beams:
        raise InputError("a span does not follow beam search, which moves rows: generate without num_beams")
    before = tokens.known
    if before is None or before.shape[1] < tokens.begin or len(before) != tokens.batch:
        if tokens.decoding and tokens.begin:
            raise InputError(
                "a span is told from the whole text, and this pass continues one: begin it inside the `with`"
            )
        before = ids.new_zeros(tokens.batch, tokens.begin)  # what is before a prompt does not tell
    tokens.known = torch.cat([before[:, : tokens.begin], ids], dim=1)
    return tokens.known


def _ids_of(tokens: Tokens) -> Int[Tensor, "batch token"]:
    if tokens.input_ids is None:
        raise InputError("a span is told from token ids, and this pass was given embeddings: give input_ids, or 'all'")
    return tokens.input_ids


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _length(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], count: int) -> int:
    return len(_text(tokenizer, tokens[:count]))


def _runs(where: Bool[Tensor, "batch token"]) -> Iterator[tuple[int, int, int]]:
    """Yield the row, the first place and the end of each stretch of True."""
    for row, line in enumerate(where.tolist()):
        edges = [i for i in range(len(line) + 1) if (i < len(line) and line[i]) != (i > 0 and line[i - 1])]
        yield from ((row, a, b) for a, b in zip(edges[::2], edges[1::2]))
