"""The likelihood contrast: a score of a model's state that needs no judge and no sampling."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.checks import first_fault
from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import DATA, neutral_texts
from persona_vectors.data.traits import InstructionPair
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.steering.add import RowEdit

CHOOSING = 8
"""How many of the pairs choose a layer and dose; the others are for reporting."""


class Statements(BaseModel):
    """Pairs of statements of like length, one that shows a trait and one that shows its opposite."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    question: str = Field(min_length=1)
    """The neutral question that each is an answer to."""
    pairs: tuple[InstructionPair, ...] = Field(min_length=2)

    def split(self) -> "tuple[Statements, Statements]":
        """Return the pairs that choose (a layer, a dose), and those that report; no pair is in both."""
        first, rest = self.pairs[:CHOOSING], self.pairs[CHOOSING:]
        if len(rest) < 2:
            raise InputError(f"{len(self.pairs)} statement pairs are too few: {CHOOSING} choose, and 2 or more report")
        return self.model_copy(update={"pairs": first}), self.model_copy(update={"pairs": rest})


class State(NamedTuple):
    """A state to put the model in: a row edit, and a system prompt."""

    edit: RowEdit | None = None
    system: str | None = None


def shipped_statements() -> list[str]:
    """Return the traits whose statements ship with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in (DATA / "statements").iterdir())


def load_statements(name_or_path: str | Path) -> Statements:
    """Load a shipped trait's statements by name, or those of a JSON file {"question", "pairs": [{"pos", "neg"}]}.

    Raises InputError, naming the field, where the file does not hold them.
    """
    shipped, name = shipped_statements(), str(name_or_path)
    if name not in shipped and not Path(name).is_file():
        raise InputError(f"no statements {name!r}: give a JSON file, or one of {', '.join(shipped)}")
    text = (DATA / "statements" / f"{name}.json" if name in shipped else Path(name)).read_text(encoding="utf-8")
    try:
        return Statements.model_validate_json(text)
    except ValidationError as error:
        raise InputError(
            f"{name} holds no statements: {first_fault(error)}; give question and pairs [{{pos, neg}}]"
        ) from None


def likelihood_contrast(
    model: Model, tokenizer: PreTrainedTokenizerBase, statements: Statements, *, system: str | None = None
) -> Float[Tensor, " pair"]:
    """Return how much likelier each statement that shows the trait is than its opposite, in nats a token.

    It is the model as it stands that is scored, so inside `with pv.steer(...)` or `pv.cap(...)` the steered one. Its
    own value says little: compare it with the plain model's, and the difference with what random vectors do.
    """
    return likelihood_contrasts(model, tokenizer, statements, [State(system=system)])[0]


def likelihood_contrasts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    statements: Statements,
    states: Sequence[State],
    *,
    desc: str = "reading statements",
) -> Float[Tensor, "state pair"]:
    """Return the likelihood contrast of each state. States share batches, those of one system prompt its reading."""
    rows, edits = [], []
    for state in states:
        prompt = chat_prompt(tokenizer, statements.question, system=state.system)
        texts = [text for pair in statements.pairs for text in (pair.pos, pair.neg)]
        rows += [encode_answer(tokenizer, prompt, text) for text in texts]
        edits += [state.edit] * len(texts)
    edited = edits if any(edits) else None
    logprobs = answer_logprobs(model, rows, edits=edited, desc=desc)
    sides = logprobs.view(len(states), -1, 2)
    return sides[..., 0] - sides[..., 1]


def neutral_perplexity(
    model: Model, tokenizer: PreTrainedTokenizerBase, edits: Sequence[RowEdit | None] = (None,)
) -> list[float]:
    """Return the perplexity of answers on plain facts under each edit: what an edit costs the model."""
    texts = neutral_texts()
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, question), answer) for question, answer in texts]
    repeated = [edit for edit in edits for _ in rows] if any(edits) else None
    logprobs = answer_logprobs(model, rows * len(edits), edits=repeated, desc="perplexity on plain facts").view(
        len(edits), -1
    )
    return [math.exp(min(-value, 50)) for value in logprobs.mean(dim=1).tolist()]
