"""The likelihood contrast: a score of a model's state that needs no judge and no sampling."""

import math
from collections.abc import Sequence
from itertools import chain, permutations, product
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.checks import first_fault
from persona_vectors.data.errors import InputError
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.packed import data_suffix, open_data
from persona_vectors.data.progress import bar
from persona_vectors.data.samples import is_array
from persona_vectors.data.texts import DATA, neutral_texts
from persona_vectors.data.traits import InstructionPair
from persona_vectors.evaluation.behaviours import read_behaviour
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.blocks import Model
from persona_vectors.model.identity import hash_of
from persona_vectors.model.passes import Row
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.steering.add import RowEdit

_Text = Annotated[str, Field(min_length=1)]
CHOOSING = 8
"""How many of the pairs choose a layer and dose; the others are for reporting."""
TOGETHER = 16
"""How many states are read, and kept, together."""


class Statements(BaseModel):
    """Pairs of statements of like length, one that shows a trait and one that shows its opposite."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    question: _Text | tuple[_Text, ...]
    """The neutral question that each is an answer to, or one for each pair."""
    pairs: tuple[InstructionPair, ...] = Field(min_length=2)
    orders: int = Field(default=1, ge=1)
    """How many pairs in a row are one item in as many orders, which count as one pair: their mean."""

    @model_validator(mode="after")
    def _fits(self) -> "Statements":
        if len(self.questions) != len(self.pairs):
            raise ValueError(f"{len(self.questions)} questions for {len(self.pairs)} pairs: give one, or one a pair")
        if len(self.pairs) % self.orders:
            raise ValueError(f"{len(self.pairs)} pairs are not items in {self.orders} orders")
        return self

    @property
    def questions(self) -> tuple[str, ...]:
        """Each pair's question."""
        return (self.question,) * len(self.pairs) if isinstance(self.question, str) else self.question

    def part(self, begin: int, end: int | None = None) -> "Statements":
        """Return the items from `begin` to before `end`, each in all of its orders."""
        chosen = slice(begin * self.orders, None if end is None else end * self.orders)
        question = self.question if isinstance(self.question, str) else self.question[chosen]
        return self.model_copy(update={"pairs": self.pairs[chosen], "question": question})

    def split(self) -> "tuple[Statements, Statements]":
        """Return the pairs that choose (a layer, a dose), and those that report; no pair is in both."""
        count = len(self.pairs) // self.orders
        if count < CHOOSING + 2:
            raise InputError(f"{count} statement pairs are too few: {CHOOSING} choose, and 2 or more report")
        return self.part(0, CHOOSING), self.part(CHOOSING)


class State(NamedTuple):
    """A state to put the model in: a row edit, and a system prompt."""

    edit: RowEdit | None = None
    system: str | None = None


def shipped_statements() -> list[str]:
    """Return the traits whose statements ship with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in (DATA / "statements").iterdir())


def load_statements(name_or_path: str | Path, *, first: int | None = None) -> Statements:
    """Load a shipped trait's statements by name, or those of a file; only the `first` pairs where that is given.

    A file is JSON, {"question", "pairs": [{"pos", "neg"}]}, with one question or one for each pair; or the rows of
    Anthropic's persona evals or of CAA, JSONL or a JSON list: `question`, `answer_matching_behavior` and
    `answer_not_matching_behavior`, of which the answers are Yes and No, or (A) and (B). Those are counterbalanced: a
    pair is a question in both orders of its choices, or one whose Yes shows the behaviour with one whose No does.

    Raises InputError, naming the field, where the file does not hold them.
    """
    shipped, name = shipped_statements(), str(name_or_path)
    if name not in shipped and not Path(name).is_file():
        raise InputError(f"no statements {name!r}: give a JSON file, or one of {', '.join(shipped)}")
    try:
        if name in shipped:
            found = Statements.model_validate_json((DATA / "statements" / f"{name}.json").read_bytes())
        elif data_suffix(name) in (".jsonl", ".ndjson") or is_array(Path(name)):
            found = Statements.model_validate(read_behaviour(name))
        else:
            with open_data(name) as file:
                found = Statements.model_validate_json(file.read())
    except ValidationError as error:
        raise InputError(
            f"{name} holds no statements: {first_fault(error)}; give question and pairs [{{pos, neg}}]"
        ) from None
    if first is not None and first < 1:
        raise InputError(f"first is {first}: give 1 pair or more")
    return found if first is None else found.part(0, first)


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
    ledger: Ledger | None = None,
) -> Float[Tensor, "state pair"]:
    """Return the likelihood contrast of each state. States share batches, those of one system prompt its reading."""
    rows = []
    for state in states:
        prompts = {q: chat_prompt(tokenizer, q, system=state.system) for q in dict.fromkeys(statements.questions)}
        pairs = zip(statements.questions, statements.pairs)
        rows.append([encode_answer(tokenizer, prompts[q], text) for q, pair in pairs for text in (pair.pos, pair.neg)])
    logprobs = _logprobs(model, rows, [state.edit for state in states], desc=desc, ledger=ledger)
    sides = logprobs.view(len(states), -1, statements.orders, 2)
    return (sides[..., 0] - sides[..., 1]).mean(dim=2)


def forced_choice(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    scenes: Sequence[Sequence[str]],
    asked: Sequence[str],
    *,
    edit: RowEdit | None = None,
) -> Float[Tensor, "scene paraphrase"]:
    """Return by how much the first of two actions is likelier as an answer, the mean over both orders of their list.

    A scene is its text and two actions; `asked` are paraphrases of the question that follows it. Nats a token.
    """
    rows = []
    for scene, *actions in scenes:
        for question, order in product(asked, permutations(actions)):
            listed = "\n".join(f"- {action}" for action in order)
            prompt = chat_prompt(tokenizer, f"{scene} {question}\n{listed}\nAnswer with one of them.")
            rows += [encode_answer(tokenizer, prompt, action) for action in actions]
    found = answer_logprobs(model, rows, edits=[edit] * len(rows)).view(len(scenes), len(asked), -1, 2)
    return (found[..., 0] - found[..., 1]).mean(dim=2)


def neutral_perplexity(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[RowEdit | None] = (None,),
    *,
    ledger: Ledger | None = None,
) -> list[float]:
    """Return the perplexity of answers on plain facts under each edit: what an edit costs the model."""
    rows = [encode_answer(tokenizer, chat_prompt(tokenizer, question), answer) for question, answer in neutral_texts()]
    logprobs = _logprobs(model, [rows] * len(edits), edits, desc="perplexity on plain facts", ledger=ledger)
    return [math.exp(min(-value, 50)) for value in logprobs.mean(dim=1).tolist()]


def _logprobs(
    model: Model,
    rows: Sequence[Sequence[Row]],
    edits: Sequence[RowEdit | None],
    *,
    desc: str,
    ledger: Ledger | None,
) -> Float[Tensor, "state row"]:
    """Return the mean log-probability of each state's rows under its edit, as far as the ledger does not hold it.

    States are read some together, whichever of them are known: so those that are not are read as they would have been.
    """
    ledger = ledger or Ledger(None)
    keys = [hash_of([list(own), edit and edit.told()]) for own, edit in zip(rows, edits)]
    with bar(total=len(keys), desc=desc, unit="state") as done:
        for begin in range(0, len(keys), TOGETHER):
            part = slice(begin, begin + TOGETHER)
            if not all(key in ledger.found for key in keys[part]):
                each = [edit for own, edit in zip(rows[part], edits[part]) for _ in own]
                found = answer_logprobs(model, list(chain(*rows[part])), edits=each if any(each) else None)
                values = found.view(len(keys[part]), -1).tolist()
                ledger.add({"key": key, "logprobs": value} for key, value in zip(keys[part], values))
            done.update(len(keys[part]))
    return torch.tensor([ledger.found[key]["logprobs"] for key in keys], dtype=torch.float32)
