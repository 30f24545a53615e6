"""Answers from somewhere else than the model that reads them: what gives them, and what becomes of them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_name
from persona_vectors.model.generation import stop_tokens
from persona_vectors.model.hooks import edits_are_active
from persona_vectors.model.prompts import check_length, decode, encode
from persona_vectors.model.sampling import row_seed


class Completion(NamedTuple):
    """An answer as a generator gives it."""

    row: int
    """Which prompt it answers, from 0."""
    text: str
    tokens: list[int] | None = None
    """The token ids that were generated, an end token among them or not; None where they are not known."""
    ended: bool = True
    """False where the answer was cut at the limit."""


Generate = Callable[[Sequence[Sequence[int]], Sequence[int], int, float], Iterable[Sequence[Completion]]]
"""Answers (prompts, seeds, max_new_tokens, temperature): prompts as token ids, each with the seed of its answer.

Gives one `Completion` to each prompt, in any order, some at a time as they are ready, sampled from the model's whole
distribution; the samples of a question are equal prompts side by side. It may have a `name` to stand in files.
"""


class Served(NamedTuple):
    """An answer from somewhere else, in the tokens that a model here reads."""

    row: int
    tokens: list[int]
    """Without the end token."""
    text: str
    ended: bool
    retokenised: bool
    """True where the tokens were made from the text, and need not be those that were generated."""


def served_answers(
    generate: Generate,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    skip: Collection[int] = (),
) -> Iterator[list[Served]]:
    """Have prompts answered by `generate`, and yield the answers as they come; `skip` needs none.

    Raises InputError inside an edit of the model, where a prompt does not get one answer, and for tokens of another
    vocabulary.
    """
    if edits_are_active(model):
        raise InputError("the answers come from elsewhere, where nothing is edited: leave the `with`, or generate here")
    rows = [row for row in range(len(prompts)) if row not in skip]
    if not rows:
        return
    left, stops = set(range(len(rows))), set(stop_tokens(model, tokenizer))
    check_length(model, max(len(prompts[row]) for row in rows) + max_new_tokens)
    asked, checked = [prompts[row] for row in rows], False
    for batch in generate(asked, [row_seed(seed, row) for row in rows], max_new_tokens, temperature):
        for item in batch:
            if item.row not in left:
                raise InputError(
                    f"generate answered prompt {item.row} twice, or it is none of {len(rows)}: give one each"
                )
            left.remove(item.row)
        checked = checked or _same_vocabulary(tokenizer, model_name(model), batch)
        yield [_served(tokenizer, asked[item.row], stops, item)._replace(row=rows[item.row]) for item in batch]
    if left:
        raise InputError(f"generate left {len(left)} of {len(rows)} prompts without an answer: give one to each")


def _served(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Collection[int], item: Completion
) -> Served:
    if item.tokens is not None:
        end = next((i for i, token in enumerate(item.tokens) if token in stops), None)
        tokens = item.tokens[:end]
        return Served(item.row, tokens, decode(tokenizer, tokens), item.ended, retokenised=False)
    before = str(tokenizer.decode(list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    whole = encode(tokenizer, before + item.text)
    tokens = whole[len(prompt) :]
    if whole[: len(prompt)] != list(prompt):  # the prompt's last token and the answer's first would have been one
        tokens = encode(tokenizer, item.text)
    return Served(item.row, tokens, item.text, item.ended, retokenised=True)


def _same_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, batch: Sequence[Completion]) -> bool:
    """Say whether there was a text to check; raises InputError where no answer's tokens read here as its text."""

    def begins(text: str) -> str:
        return "".join(text.split())[:8]

    told = [(item.text, decode(tokenizer, item.tokens)) for item in batch if item.tokens and item.text.strip()]
    if told and all(begins(theirs) != begins(ours) for theirs, ours in told):
        raise InputError(
            f"the answer {told[0][0][:40]!r} has tokens that read {told[0][1][:40]!r} with the tokenizer of {name}: "
            "serve the same model"
        )
    return bool(told)
