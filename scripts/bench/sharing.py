"""What it gains to read once what the prompts of a batch begin with."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Rounds, load
from bench.measuring import environment, median_interval, save, show, synchronize
from persona_vectors.data.texts import neutral_texts
from persona_vectors.data.traits import Trait, load_trait
from persona_vectors.evaluation.judge import Answer
from persona_vectors.evaluation.judges import ContrastJudge
from persona_vectors.extraction.rollouts import plan
from persona_vectors.model import beginnings, passes
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_batches
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.model.prompts import decode, encode


def sharing(
    model_name: ModelName = EMBEDDED,
    device: Device = None,
    trait: Annotated[str, typer.Option(help="a shipped trait, or a JSON file")] = "optimistic",
    questions: Annotated[int, typer.Option(help="asked under one instruction, an answer each", min=2)] = 20,
    new_tokens: Annotated[list[int] | None, typer.Option(help="tokens of an answer, several in turn")] = None,
    judged_tokens: Annotated[int, typer.Option(help="tokens of an answer that is judged", min=1)] = 50,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Measure answers, and answers judged by contrast:2, in processor time, with and without shared beginnings."""
    logging.disable_progress_bar()
    model, tokenizer = load(model_name, None, device)
    found = environment(model, model_name) | {"trait": trait, "questions": questions, "rounds": rounds}
    works = works_of(model, tokenizer, load_trait(trait), questions, new_tokens or [1, 32], judged_tokens)
    found["sharing"] = [timed(name, work, questions, model, rounds) for name, work in works.items()]
    show(found["sharing"])
    save(found, out)


def works_of(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    questions: int,
    new_tokens: Sequence[int],
    judged_tokens: int,
) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    tasks = plan(tokenizer, trait, first=questions, samples=1)[:questions]
    prompts = [list(task["prompt_ids"]) for task in tasks]
    text = encode(tokenizer, " ".join(answer for _, answer in neutral_texts()))
    pieces = [text[(i * judged_tokens) % (len(text) - judged_tokens) :][:judged_tokens] for i in range(questions)]
    answers = [
        Answer(task["question"], decode(tokenizer, ids), i % 5) for i, (task, ids) in enumerate(zip(tasks, pieces))
    ]
    judge = ContrastJudge(model, tokenizer, trait, pairs=2)

    def answering(count: int) -> Callable[[], Any]:
        return lambda: list(generate_batches(model, tokenizer, prompts, max_new_tokens=count))

    works = {f"answers of {count} tokens": answering(count) for count in new_tokens}
    return {**works, f"judged answers of {judged_tokens} tokens": lambda: judge.batch(answers, "")}


@contextmanager
def nothing_shared() -> Iterator[None]:
    """Have different prompts share nothing inside the `with`."""
    before, passes.WORTH, beginnings.SHARE = (passes.WORTH, beginnings.SHARE), 10**9, 0.0
    try:
        yield
    finally:
        passes.WORTH, beginnings.SHARE = before


def timed(name: str, work: Callable[[], Any], count: int, model: Model, rounds: int) -> dict[str, Any]:
    """Return a line of the table: `count` of it a minute of the processor's time, with and without, in turn."""

    def seconds() -> float:
        start = time.process_time() if model.device.type == "cpu" else time.perf_counter()
        work()
        synchronize(model.device)
        return (time.process_time() if model.device.type == "cpu" else time.perf_counter()) - start

    having, without = [], []
    for number in range(rounds):
        if number % 2 == 0:
            having.append(seconds())
        with nothing_shared():
            without.append(seconds())
        if number % 2:
            having.append(seconds())
    ratios = [b / a for a, b in zip(having, without)]
    low, high = median_interval(ratios) or (0.0, 0.0)
    return {
        "work": name,
        "a minute": 60 * count / statistics.median(having),
        "nothing shared": 60 * count / statistics.median(without),
        "x": statistics.median(ratios),
        "from": low,
        "to": high,
        "": f"{count} prompts under one instruction",
    }
