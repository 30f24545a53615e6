"""What is asked of a model: answers, drawn in batches, scored, and kept in a file that a killed run continues."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.progress import bar
from persona_vectors.data.texts import neutral_texts
from persona_vectors.evaluation.beside import score_batches
from persona_vectors.evaluation.judge import Answer, Judge, is_remote
from persona_vectors.evaluation.judges import score_both
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.evaluation.served import Generate, served_answers
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_batches
from persona_vectors.model.identity import identity
from persona_vectors.model.prompts import chat_prompt, decode, encode, encode_answer
from persona_vectors.steering.add import RowEdit, steer_rows

SAME = 0.02
"""How far, in nats a token, one state of a model may be from itself: other hardware, other kernels."""


class Ask(NamedTuple):
    """A question to answer, under a system prompt and a row edit or none."""

    question: str
    system: str | None = None
    edit: RowEdit | None = None
    pair: int = -1
    """The instruction pair that the system prompt is from, so that a judge can leave it out."""


def answer_batches(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    skip: Collection[int] = (),
    generate: Generate | None = None,
) -> Iterator[list[tuple[int, str]]]:
    """Yield answers batch by batch, each with the index of what was asked. Different edits share batches.

    `skip` holds indices that need no answer. Whatever is skipped, the batches and their seeds stay the same. With
    `generate` the answers come from there, without edits.
    """
    prompts = [encode(tokenizer, chat_prompt(tokenizer, ask.question, system=ask.system)) for ask in asks]
    if generate is not None:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        for served in served_answers(generate, model, tokenizer, prompts, skip=skip, **options):
            yield [(item.row, item.text) for item in served]
        return
    for batch in generate_batches(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
        skip=skip,
        during=lambda rows: steer_rows(model, [asks[i].edit for i in rows]),
    ):
        yield [(i, decode(tokenizer, tokens)) for i, (tokens, _) in zip(batch.rows, batch.answers)]


def keep_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    asks: Sequence[Ask],
    keys: Sequence[str],
    ledger: Ledger,
    *,
    judge: Judge | None,
    rubric: str,
    desc: str,
    facts: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Answer and judge what the ledger does not hold, and return each ask's entry: answer, score and coherence.

    `facts` stand beside each answer in the file; `options` are those of `answer_batches`. Without a judge nothing is
    scored.
    """
    known = {i for i, key in enumerate(keys) if key in ledger.found}
    unjudged = [i for i in sorted(known) if judge and "score" not in ledger.found[keys[i]]]

    def drawn() -> Iterator[list[int]]:
        if unjudged:
            yield unjudged
        for batch in answer_batches(model, tokenizer, asks, skip=known, **options):
            ledger.add({"key": keys[i], **(facts or {}), **_describe(asks[i]), "answer": a} for i, a in batch)
            yield [i for i, _ in batch]
            done.update(len(batch))

    def scores_of(indices: list[int]) -> list[tuple[float | None, float | None]]:
        if judge is None:
            return []
        answers = [Answer(asks[i].question, ledger.found[keys[i]]["answer"], asks[i].pair) for i in indices]
        return score_both(model, tokenizer, judge, answers, rubric)

    def keep(indices: list[int], scores: list[tuple[float | None, float | None]]) -> None:
        ledger.add({"key": keys[i], "score": score, "coherence": mark} for i, (score, mark) in zip(indices, scores))

    with bar(total=len(asks), initial=len(known), desc=desc, unit="answer") as done:
        score_batches(drawn(), scores_of, keep, remote=judge is not None and is_remote(judge))
    return [ledger.found[key] for key in keys]


def _describe(ask: Ask) -> dict[str, Any]:
    """Return what a reader of the ledger wants to know of an answer."""
    edit = ask.edit
    steered = {"vector": edit.vector.trait, "layer": edit.layer, "coef": edit.coef} if edit else {}
    return {**steered, "system": ask.system, "question": ask.question}


def open_ledger(
    path: str | Path | None, model: Model, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> Ledger:
    """Open the file in which a run keeps what it has; raises InputError for another model's, or other settings'."""
    ledger = Ledger(path, {**identity(model, tokenizer), **settings})
    check_state(ledger, model, tokenizer)
    return ledger


def check_state(ledger: Ledger, model: Model, tokenizer: PreTrainedTokenizerBase, *, key: str = "state") -> None:
    """Raise InputError where the file was made with other weights, or inside another edit, than the model has now.

    Which it is, is told by how likely a text on plain facts is.
    """
    if ledger.path is None:
        return
    question, answer = neutral_texts()[0]
    row = encode_answer(tokenizer, chat_prompt(tokenizer, question), answer)
    value = float(answer_logprobs(model, [row])[0])
    known = ledger.found.get(key)
    if known is None:
        ledger.add([{"key": key, "logprob": value}])
    elif abs(known["logprob"] - value) > SAME:
        raise InputError(
            f"{ledger.path} was made with other weights, or inside another edit of the model: give another file"
        )
