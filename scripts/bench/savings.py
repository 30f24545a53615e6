"""What each way of doing less gains: the same answers with it and without it, in turn."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any
from unittest.mock import patch

import typer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Rounds, TraitName, load
from bench.measuring import environment, median_interval, save, show, synchronize
from persona_vectors.data.texts import neutral_texts
from persona_vectors.data.traits import Trait, load_trait
from persona_vectors.evaluation.judge import Answer
from persona_vectors.evaluation.judges import ContrastJudge
from persona_vectors.extraction.rollouts import plan
from persona_vectors.model import beginnings, generation, memory, passes
from persona_vectors.model.blocks import Model
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.model.prompts import decode, encode


@dataclass
class Saving:
    """Work that is done with a saving and without it."""

    name: str
    work: str
    count: int
    """How many answers it makes or judges."""
    run: Callable[[], Any]
    without: Callable[[], AbstractContextManager[Any]]
    """Makes what leaves the saving out, inside a `with`."""


def savings(
    model_name: ModelName = EMBEDDED,
    device: Device = None,
    trait: TraitName = "optimistic",
    questions: Annotated[int, typer.Option(help="asked under one instruction, an answer each", min=2)] = 20,
    samples: Annotated[int, typer.Option(help="answers to each question where rows are what counts", min=1)] = 4,
    new_tokens: Annotated[list[int] | None, typer.Option(help="tokens of an answer, several in turn")] = None,
    judged_tokens: Annotated[int, typer.Option(help="tokens of an answer that is judged", min=1)] = 50,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Measure what generating and judging save, each with and without it, in processor time.

    What prompts begin with is read once; new keys and values are written in place; answers that have ended leave the
    batch; and a batch has as many rows as are of use.
    """
    logging.disable_progress_bar()
    model, tokenizer = load(model_name, None, device)
    found = environment(model, model_name) | {"trait": trait, "rounds": rounds}
    lengths = new_tokens or [1, 32]
    ways = sharing(model, tokenizer, load_trait(trait), questions, lengths, judged_tokens)
    ways += of_many_rows(model, tokenizer, load_trait(trait), questions, samples, max(lengths))
    found["savings"] = [timed(way, model, rounds) for way in tqdm(ways, unit="saving", leave=False, disable=None)]
    show(found["savings"])
    save(found, out)


def sharing(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    questions: int,
    new_tokens: Sequence[int],
    judged_tokens: int,
) -> list[Saving]:
    """Return answering and judging under one instruction, with and without reading once what prompts begin with."""
    tasks = plan(tokenizer, trait, first=questions, samples=1)[:questions]
    prompts = [list(task["prompt_ids"]) for task in tasks]
    text = encode(tokenizer, " ".join(answer for _, answer in neutral_texts()))
    pieces = [text[(i * judged_tokens) % (len(text) - judged_tokens) :][:judged_tokens] for i in range(questions)]
    answers = [
        Answer(task["question"], decode(tokenizer, ids), i % 5) for i, (task, ids) in enumerate(zip(tasks, pieces))
    ]
    judge = ContrastJudge(model, tokenizer, trait, pairs=2)

    def answering(count: int) -> Callable[[], Any]:
        return lambda: list(generation.generate_batches(model, tokenizer, prompts, max_new_tokens=count))

    works = {f"answers of {count} tokens": answering(count) for count in new_tokens}
    works[f"judged answers of {judged_tokens} tokens"] = lambda: judge.batch(answers, "")
    alone = replaced((passes, "WORTH", 10**9), (beginnings, "SHARE", 0.0))
    return [Saving("beginnings read once", name, questions, run, alone) for name, run in works.items()]


def of_many_rows(
    model: Model, tokenizer: PreTrainedTokenizerBase, trait: Trait, questions: int, samples: int, new_tokens: int
) -> list[Saving]:
    """Return answering with many rows, with and without what steps of many rows save."""
    tasks = plan(tokenizer, trait, first=questions, samples=samples)[: questions * samples]
    prompts = [list(task["prompt_ids"]) for task in tasks]
    stops = [*generation.stop_tokens(model, tokenizer), *encode(tokenizer, ".")]

    def answer() -> Any:
        return list(generation.generate_batches(model, tokenizer, prompts, max_new_tokens=new_tokens))

    def sentence() -> Any:
        with patch.object(generation, "stop_tokens", lambda *_: stops):
            return answer()

    def idle(*_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    few = max(len(prompts) // 4, 1)
    narrow = replaced((memory, "CPU_WIDTH", few), (memory, "WIDTH", few))
    copied, all_stay = (replaced((generation, name, idle)) for name in ("room_in_cache", "ended_rows_leave"))
    work, count = f"answers of {new_tokens} tokens", len(prompts)
    return [
        Saving("keys and values in place", work, count, answer, copied),
        Saving("ended answers leave", "answers of a sentence", count, sentence, all_stay),
        Saving(f"batches of more than {few} rows", work, count, answer, narrow),
    ]


def replaced(*changes: tuple[Any, str, Any]) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes a `with` inside which these modules have other values under these names."""

    def make() -> ExitStack:
        stack = ExitStack()
        for module, name, value in changes:
            stack.enter_context(patch.object(module, name, value))
        return stack

    return make


def timed(saving: Saving, model: Model, rounds: int) -> dict[str, Any]:
    """Return a line of the table: answers a minute of the processor's time, with the saving and without, in turn."""

    def seconds() -> float:
        clock = time.process_time if model.device.type == "cpu" else time.perf_counter
        start = clock()
        saving.run()
        synchronize(model.device)
        return clock() - start

    having, without = [], []
    for number in range(rounds):
        if number % 2 == 0:
            having.append(seconds())
        with saving.without():
            without.append(seconds())
        if number % 2:
            having.append(seconds())
    ratios = [b / a for a, b in zip(having, without)]
    low, high = median_interval(ratios) or (0.0, 0.0)
    return {
        "saving": saving.name,
        "a minute": 60 * saving.count / statistics.median(having),
        "without": 60 * saving.count / statistics.median(without),
        "x": statistics.median(ratios),
        "from": low,
        "to": high,
        "": f"{saving.count} {saving.work}",
    }
