"""Rollouts: answers under positive and negative instructions, kept in a file that a killed run continues."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.checks import check_settings, first_fault
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import append, atomic_path
from persona_vectors.data.progress import bar
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.served import Generate, served_answers
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_batches
from persona_vectors.model.prompts import chat_prompt, decode, encode, encode_answer

FORMAT = 1


class Rollout(BaseModel):
    """One answer, the prompt that it followed, and its scores."""

    model_config = ConfigDict(frozen=True)
    side: str
    """"pos" or "neg": which instruction of the pair the system prompt held."""
    pair: int
    """Index of the instruction pair, or -1 where the file does not say."""
    question: str
    sample: int
    prompt: str
    """The templated text up to where the answer begins."""
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """The answer's tokens as generated, without the end token."""
    finished: bool = True
    """False for an answer that was cut at the token limit."""
    retokenised: bool = False
    """True where `answer_ids` were made from the text, and need not be the tokens that were generated."""
    outside_reasoning: tuple[int, ...] | None = None
    """Which of `answer_ids`, from 0, are judged, and averaged, where reasoning is left out; None: all of them."""
    reasoning: bool = False
    """True where the others are averaged instead."""
    trait_score: float | None = None
    coherence: float | None = None

    @property
    def kept(self) -> list[int]:
        """Which of `answer_ids` are averaged."""
        return sorted(set(range(len(self.answer_ids))) - set(self.judged)) if self.reasoning else self.judged

    @property
    def judged(self) -> list[int]:
        """Which of `answer_ids` are judged: never the reasoning where it is told apart."""
        return list(range(len(self.answer_ids)) if self.outside_reasoning is None else self.outside_reasoning)

    @property
    def key(self) -> tuple[int, str, int]:
        """What a positive and a negative answer that belong together have in common."""
        return self.pair, self.question, self.sample


def plan(tokenizer: PreTrainedTokenizerBase, trait: Trait, *, first: int | None, samples: int) -> list[dict[str, Any]]:
    """Return what is to be generated: every pair, side, question and sample, with its prompt."""
    chosen = trait.questions.extract[:first]
    if not chosen:
        raise InputError(f"trait {trait.name!r} has no questions to extract with: add some to questions.extract")
    tasks = []
    for pair in range(len(trait.instruction)):
        for side in ("pos", "neg"):
            for question in chosen:
                prompt = chat_prompt(tokenizer, question, system=trait.system_prompt(side, pair))
                shared: dict[str, Any] = {"side": side, "pair": pair, "question": question, "prompt": prompt}
                shared["prompt_ids"] = tuple(encode(tokenizer, prompt))
                tasks += [{**shared, "sample": sample} for sample in range(samples)]
    return tasks


def draw_rollouts(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[dict[str, Any]],
    file: "RolloutFile",
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_tokens: int | None,
    desc: str,
    during: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
    generate: Generate | None = None,
) -> Iterator[tuple[list[Rollout], Any]]:
    """Yield the rollouts that `file` lacks, batch by batch, and what `during` gave around each. Append them.

    Each depends on its task and the seed alone: a run that goes on in the middle, in batches of another size, gives the
    same ones. With `generate` the answers come from there, in whatever order, and nothing is read around them.
    """
    prompts = [task["prompt_ids"] for task in tasks]
    known = _answered(tasks, file)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    options["skip"] = known
    with bar(total=len(tasks), initial=len(known), desc=desc, unit="answer") as shown:
        if generate is not None:
            for served in served_answers(generate, model, tokenizer, prompts, **options):
                yield [_rollout(tasks[item.row], *item[1:]) for item in served], None
                shown.update(len(served))
            return
        options |= {"batch_tokens": batch_tokens, "reading": True, "during": during}
        for batch in generate_batches(model, tokenizer, prompts, **options):
            found = zip(batch.rows, batch.answers)
            yield [_rollout(tasks[row], ids, decode(tokenizer, ids), end) for row, (ids, end) in found], batch.read
            shown.update(len(batch.rows))
            del batch  # and with it what was read of it, before the next one is


def _answered(tasks: Sequence[dict[str, Any]], file: "RolloutFile") -> set[int]:
    """Return which tasks the file answers; raises InputError where it has answers to others, or two to one."""
    places = {(task["side"], task["pair"], task["question"], task["sample"]): i for i, task in enumerate(tasks)}
    known: set[int] = set()
    for rollout in file.rollouts:
        place = places.get((rollout.side, *rollout.key))
        if place is None or place in known:
            told, own = f"question {rollout.question[:60]!r}, sample {rollout.sample}", "none, or one already"
        elif rollout.prompt != tasks[place]["prompt"]:
            told, own = f"prompt {rollout.prompt[:60]!r}", repr(tasks[place]["prompt"][:60])
            own += " (a template that writes the date makes other prompts every day)"
        else:
            known.add(place)
            continue
        raise InputError(f"{file.path} holds an answer with {told} where this run has {own}: give another file")
    return known


def _rollout(task: dict[str, Any], ids: Sequence[int], text: str, ended: bool, retokenised: bool = False) -> Rollout:
    return Rollout(**task, answer=text, answer_ids=tuple(ids), finished=ended, retokenised=retokenised)


class RolloutFile:
    """A JSONL file of rollouts: a header with the run's settings, then one answer a line, appended batch by batch."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        """Open `path`, or start it; what it holds is in `rollouts`. With None they are kept in memory alone.

        Raises InputError where the file was made with other settings, naming the first difference.
        """
        self.path = Path(path) if path is not None else None
        self.settings = {"persona_vectors_rollouts": FORMAT, **settings}
        self.rollouts: list[Rollout] = []
        if self.path and self.path.is_file() and self.path.stat().st_size:
            header, self.rollouts = read_jsonl(self.path, partial=True)
            check_settings(self.path, header, self.settings)
        self._rewrite()  # without a line that was cut

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Add a batch in one write, and have it on the disk before returning."""
        if self.path:
            append(self.path, "".join(rollout.model_dump_json() + "\n" for rollout in rollouts))
        self.rollouts += rollouts

    def _rewrite(self) -> None:
        if self.path is None:
            return
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.settings, ensure_ascii=False) + "\n")
            file.writelines(rollout.model_dump_json() + "\n" for rollout in self.rollouts)


def read_jsonl(path: Path, *, partial: bool = False) -> tuple[dict[str, Any], list[Rollout]]:
    """Return the header and the rollouts of one of our files; with `partial` a cut last line is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[: -1 if partial else None]
    rollouts: list[Rollout] = []
    header: dict[str, Any] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if number == 1:
                header = json.loads(line)
                if not isinstance(header, dict) or header.get("persona_vectors_rollouts") != FORMAT:
                    raise ValueError(f"the first line is no header of rollout format {FORMAT}")
            else:
                rollouts.append(Rollout.model_validate_json(line))
        except (ValidationError, ValueError) as error:
            reason = first_fault(error) if isinstance(error, ValidationError) else str(error).splitlines()[0]
            raise InputError(f"{path}, line {number}: {reason}; give our JSONL, or an official CSV") from None
    return header, rollouts


def load_rollouts(
    path: str | Path, *, side: str, trait: Trait, tokenizer: PreTrainedTokenizerBase, scored: bool = True
) -> list[Rollout]:
    """Load the answers of one side ("pos" or "neg") from our JSONL or from an official CSV, in the file's order.

    Raises InputError for a CSV without a score for the trait and a coherence, unless `scored` is False.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no rollout file {path}: give our JSONL, or an official CSV")
    if path.suffix != ".csv":
        return [rollout for rollout in read_jsonl(path)[1] if rollout.side == side]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"question", "prompt", "answer"} - set(reader.fieldnames or ())
        if missing:
            raise InputError(
                f"{path} lacks the column {', '.join(sorted(missing))}: an official rollout CSV has question, prompt, "
                f"answer, question_id, {trait.name}, coherence"
            )
        rows, held = list(reader), reader.fieldnames or ()
    if scored and not {trait.name, "coherence"} <= set(held):
        raise InputError(
            f"{path} has no scores for {trait.name!r}, or no coherence: it has {', '.join(held)}. Give the trait that "
            "it was scored for, a judge, or unfiltered (all answers count)"
        )
    return [_from_csv(row, index, side, trait, tokenizer, path) for index, row in enumerate(rows)]


def _from_csv(
    row: dict[str, str], index: int, side: str, trait: Trait, tokenizer: PreTrainedTokenizerBase, path: Path
) -> Rollout:
    """Row i of the positive file and row i of the negative one belong together, so the row number is the sample."""

    def score(column: str) -> float | None:
        text = row.get(column) or ""
        try:
            return float(text) if text.strip() and text != "nan" else None
        except ValueError:
            raise InputError(f"{path}, row {index + 1}: {column} is {text!r}, not a number or empty") from None

    prompt, answer = row["prompt"] or "", row["answer"] or ""
    prompt_ids, answer_ids = encode_answer(tokenizer, prompt, answer)
    return Rollout(
        side=side,
        pair=-1,
        question=row["question"],
        sample=index,
        prompt=prompt,
        answer=answer,
        prompt_ids=tuple(prompt_ids),
        answer_ids=tuple(answer_ids),
        trait_score=score(trait.name),
        coherence=score("coherence"),
    )
