"""What extraction costs: from finished answers, and while they are generated."""

import statistics
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Rounds, Shape, endless, even, load, make_prompts, make_rows, unshared
from bench.measuring import Method, bare, environment, median, ratio, run_rounds, save, show
from bench.peers import official, repeng, steering_vectors
from persona_vectors.model.blocks import Model
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.model.memory import Budget
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import POOLINGS, pool, pool_while_generating
from persona_vectors.model.prompts import batch_tokens_for


def extraction(
    model_name: ModelName = EMBEDDED,
    shape: Shape = None,
    device: Device = None,
    prompts: Annotated[int, typer.Option(help="different prompts", min=1)] = 4,
    samples: Annotated[int, typer.Option(help="answers to each prompt", min=1)] = 10,
    answer_tokens: Annotated[int, typer.Option(help="mean length of an answer", min=1)] = 100,
    batch_tokens: Annotated[int | None, typer.Option(help="tokens a batch [default: as in extraction]")] = None,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Measure extraction: from finished answers, and while they are generated."""
    logging.disable_progress_bar()
    model, tokenizer = load(model_name, shape, device)
    found = environment(model, shape or model_name)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    distinct = make_prompts(tokenizer, prompts, vocabulary)
    rows = make_rows(distinct, samples, answer_tokens, vocabulary)
    budget = batch_tokens or batch_tokens_for(model)
    found |= {"prompts": prompts, "samples": samples, "batch_tokens": budget, "rounds": rounds}
    lengths = [f"{statistics.mean(map(len, side)):.0f}" for side in zip(*rows)]
    print(
        f"{prompts} prompts x {samples} answers, {lengths[0]} + {lengths[1]} tokens on average; "
        f"{budget} tokens a batch; medians of {rounds} rounds, ratios taken within a round\n"
    )

    reading = extraction_methods(model, rows, budget)
    run_rounds(reading, rounds, model.device)
    found["extraction"] = report_extraction(reading)

    asked = [distinct[i % prompts] for i in range(prompts * samples)]
    chosen, _ = next(Budget(model, "bench", 8 * budget).batches(asked, answer_tokens))
    generating = reading_methods(model, tokenizer, [asked[i] for i in chosen], answer_tokens)
    run_rounds(generating, rounds, model.device)
    found["generation"] = report_generation(generating, generating[:2])
    save(found, out)


def extraction_methods(model: Model, rows: Sequence[Row], batch_tokens: int) -> list[Method]:
    """Return every way to read finished rows; the first is the bare forward pass, the fourth the official one."""

    def ours(rows: Sequence[Row]) -> object:
        return pool(model, rows, poolings=POOLINGS, batch_tokens=batch_tokens)

    return [
        Method(
            "bare forward", "no reading, no padding", even(rows), lambda r: bare(model, r, batch_tokens=batch_tokens)
        ),
        Method("ours", "three poolings and norms, all layers; each prompt read once", rows, ours),
        Method("ours, nothing shared", "the same, a prompt of its own for each answer", unshared(rows), ours),
        Method("official procedure", "three poolings, all layers; batches of 1", rows, lambda r: official(model, r)),
        repeng(model, rows),
        steering_vectors(model, rows),
    ]


def reading_methods(model: Model, tokenizer: Any, prompts: Sequence[list[int]], new_tokens: int) -> list[Method]:
    """Return generation without and with reading. Reading samples one token more: the model reads all but the last."""
    tokenizer = tokenizer or endless()

    def plain(rows: Sequence[Row], extra: int = 0) -> None:
        ids = [prompt for prompt, _ in rows]
        generate_tokens(model, tokenizer, ids, max_new_tokens=new_tokens + extra)

    def reading(rows: Sequence[Row]) -> None:
        with pool_while_generating(model, stops=stop_tokens(model, tokenizer), poolings=POOLINGS) as pooled:
            plain(rows, extra=1)
        pooled()

    rows: list[Row] = [(prompt, []) for prompt in prompts]
    return [
        Method("generate", f"{len(rows)} answers of {new_tokens} tokens at most", rows, plain),
        Method("one token more", "", rows, lambda r: plain(r, extra=1)),
        Method("generate + reading", "one token more, three poolings and norms, all layers", rows, reading),
    ]


def report_extraction(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Print the table of extraction, and return it with each round's numbers."""
    lines = []
    for method in methods:
        seconds = median(method.seconds)
        lines.append(
            {
                "method": method.name,
                "tokens/s": method.tokens / seconds if seconds else None,
                "x bare": ratio(method, methods[0]),
                "x official": ratio(method, methods[3]),
                "peak MB": median(method.megabytes),
                "": method.does,
            }
        )
    show(lines)
    return [line | {"seconds": m.seconds, "megabytes": m.megabytes} for line, m in zip(lines, methods)]


def report_generation(methods: Sequence[Method], bases: Sequence[Method]) -> list[dict[str, Any]]:
    """Print the table of generation, and return it with each round's numbers."""
    lines = [
        {
            "method": method.name,
            "seconds": median(method.seconds),
            **{f"time x {base.name}": ratio(method, base, speed=False) for base in bases},
            "": method.does,
        }
        for method in methods
    ]
    show(lines)
    return [line | {"seconds": m.seconds} for line, m in zip(lines, methods)]
