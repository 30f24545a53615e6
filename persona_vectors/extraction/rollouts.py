"""Rollouts: answers under positive and negative instructions, kept in a file that a killed run continues."""

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.traits import Trait
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.prompts import chat_prompt, decode, encode, encode_answer, length_batches

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
    trait_score: float | None = None
    coherence: float | None = None

    @property
    def key(self) -> tuple[int, str, int]:
        """What a positive and a negative answer that belong together have in common."""
        return self.pair, self.question, self.sample


def plan(
    tokenizer: PreTrainedTokenizerBase, trait: Trait, *, questions: int | None, samples: int
) -> list[dict[str, Any]]:
    """Return what is to be generated: every pair, side, question and sample, with its prompt."""
    chosen = trait.questions.extract[:questions]
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


def rollout_batches(tasks: Sequence[dict[str, Any]], *, max_new_tokens: int, batch_tokens: int) -> list[list[int]]:
    """Return the batches, as indices of tasks, in which `generate_batch` is to be called: always the same ones."""
    return length_batches([task["prompt_ids"] for task in tasks], max_new_tokens, batch_tokens)


def generate_batch(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    number: int,
) -> list[Rollout]:
    """Answer one batch of tasks, with a seed of its own: a run that starts in the middle gives the same answers.

    One token more than is kept is sampled, so that the model reads every token that is kept.
    """
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    answers = generate_tokens(
        model,
        tokenizer,
        [task["prompt_ids"] for task in tasks],
        max_new_tokens=max_new_tokens + 1,
        temperature=temperature,
        seed=int.from_bytes(digest[:6], "big"),
    )
    return [
        Rollout(
            **task,
            answer=decode(tokenizer, ids[:max_new_tokens]),
            answer_ids=tuple(ids[:max_new_tokens]),
            finished=ended,
        )
        for task, (ids, ended) in zip(tasks, answers)
    ]


class RolloutFile:
    """A JSONL file of rollouts: a header with the run's settings, then one answer a line, appended batch by batch."""

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        """Open `path`, or start it; what it holds is in `rollouts`.

        Raises InputError where the file was made with other settings, naming the first difference.
        """
        self.path = Path(path)
        self.settings = {"persona_vectors_rollouts": FORMAT, **settings}
        self.rollouts: list[Rollout] = []
        if self.path.is_file() and self.path.stat().st_size:
            self._resume()
        else:
            self._rewrite()

    def _resume(self) -> None:
        header, self.rollouts = read_jsonl(self.path, partial=True)
        for name, value in self.settings.items():
            if header.get(name) != value:
                raise InputError(
                    f"{self.path} was made with {name}={header.get(name)!r}, not {value!r}: "
                    "give the same settings, or another file"
                )

    def trim(self, batch_sizes: Sequence[int]) -> None:
        """Drop a batch that was only partly written, and a line that was cut, from the end of the file."""
        whole = 0
        for size in batch_sizes:
            if whole + size > len(self.rollouts):
                break
            whole += size
        self.rollouts = self.rollouts[:whole]
        self._rewrite()

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Add a batch in one write, and have it on the disk before returning."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(rollout.model_dump_json() + "\n" for rollout in rollouts))
        self.rollouts += rollouts

    def _rewrite(self) -> None:
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.settings, ensure_ascii=False) + "\n")
            file.writelines(rollout.model_dump_json() + "\n" for rollout in self.rollouts)


def read_jsonl(path: Path, *, partial: bool = False) -> tuple[dict[str, Any], list[Rollout]]:
    """Return the header and the rollouts of one of our files; with `partial` a cut last line is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    if partial:
        lines = lines[:-1]
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
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}, line {number}: {reason}; give our JSONL, or an official CSV") from None
    return header, rollouts


def load_rollouts(path: str | Path, *, side: str, trait: Trait, tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    """Load the answers of one side ("pos" or "neg") from our JSONL or from an official CSV, in the file's order."""
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
        rows = list(reader)
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
