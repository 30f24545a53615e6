"""What flagging costs: reading samples, generating baselines, and two workers against one."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Rounds, any_vector, even, load, make_prompts, make_rows, unshared
from bench.measuring import Method, bare, environment, median, ratio, run_rounds, save, show
from bench.peers import official_projection
from persona_vectors.flagging import job as flag_ray
from persona_vectors.flagging.run import flag
from persona_vectors.flagging.work import answer_means
from persona_vectors.model.blocks import Model, decoder_layers
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.model.memory import Budget
from persona_vectors.model.passes import Row
from persona_vectors.model.prompts import batch_tokens_for
from persona_vectors.monitoring.trace import monitor
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.moments import neutral_moments


def flagging(
    model_name: ModelName = EMBEDDED,
    device: Device = None,
    samples: Annotated[int, typer.Option(help="training samples, each with a prompt of its own", min=1)] = 64,
    answer_tokens: Annotated[int, typer.Option(help="mean length of an answer", min=1)] = 100,
    new_tokens: Annotated[int, typer.Option(help="length of a generated baseline", min=1)] = 64,
    layer: Annotated[int | None, typer.Option(help="[default: the middle one]")] = None,
    workers: Annotated[bool, typer.Option(help="also time two Ray actors against one, a thread each")] = False,
    controls: Annotated[bool, typer.Option(help="only time runs with 100 random directions and none")] = False,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Measure flagging: reading samples, generating baselines, and two workers against one."""
    logging.disable_progress_bar()
    model, tokenizer = load(model_name, None, device)
    found = environment(model, model_name)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    middle = len(decoder_layers(model)) // 2 if layer is None else layer
    prompts = make_prompts(tokenizer, 8, vocabulary)
    rows = make_rows([prompts[i % 8] for i in range(samples)], 1, answer_tokens, vocabulary)
    print(f"{samples} samples, layer {middle}; medians of {rounds} rounds, ratios taken within a round\n")
    if controls:
        found["controls"] = time_controls(model, tokenizer, rows, middle, rounds)
        return save(found, out)
    methods = flagging_methods(model, tokenizer, rows, new_tokens, batch_tokens_for(model), middle)
    run_rounds(methods, rounds, model.device)
    found["flagging"] = report_flagging(methods)
    if workers:
        found["workers"] = time_workers(model, tokenizer, rows, middle)
        print(f"two workers: {found['workers']['ratio']:.2f}x one, a thread each (the start of the actors left out)")
    save(found, out)


def flagging_methods(
    model: Model, tokenizer: Any, rows: Sequence[Row], new_tokens: int, batch_tokens: int, layer: int
) -> list[Method]:
    """Return the bare pass up to `layer`, `prompt_last`, the official projection, and generation with and without."""
    vector = any_vector(model)
    units = unit_directions(model, [vector], layer)

    def bare_to(rows: Sequence[Row]) -> None:
        with stopped_after(model, layer):
            bare(model, rows, batch_tokens=batch_tokens)

    def prompt_last(rows: Sequence[Row]) -> None:
        answer_means(model, rows, [range(len(answer)) for _, answer in rows], units, batch_tokens)

    def theirs(rows: Sequence[Row]) -> None:
        official_projection(model, rows, vector, layer)

    def plain(rows: Sequence[Row]) -> None:
        for batch, _ in Budget(model, "bench", 8 * batch_tokens).batches([p for p, _ in rows], new_tokens):
            prompts = [rows[i][0] for i in batch]
            generate_tokens(model, tokenizer, prompts, max_new_tokens=new_tokens, temperature=0, reading=True)

    def reading(rows: Sequence[Row]) -> None:
        stops = stop_tokens(model, tokenizer)
        for batch, _ in Budget(model, "bench", 8 * batch_tokens).batches([p for p, _ in rows], new_tokens):
            with monitor(model, vector, layer=layer, stops=stops) as trace:
                prompts = [rows[i][0] for i in batch]
                generate_tokens(model, tokenizer, prompts, max_new_tokens=new_tokens, temperature=0, reading=True)
            assert trace.mean

    return [
        Method("bare forward to the layer", "no reading, no padding", even(rows), bare_to),
        Method("prompt_last", "both means of each sample; nothing above the layer", unshared(rows), prompt_last),
        Method("official projection", "batch 1, all hidden states, all logits", unshared(rows), theirs),
        Method("generate", f"plain greedy generation, {new_tokens} tokens at most", rows, plain),
        Method("generate baseline", "the same, projections read meanwhile", rows, reading),
    ]


@contextlib.contextmanager
def stopped_after(model: Model, layer: int) -> Iterator[None]:
    """Run no block above `layer` inside the `with`, by a list of fewer blocks."""
    decoder, blocks = model.get_decoder(), decoder_layers(model)
    name = next(name for name, module in decoder.named_children() if module is blocks)
    setattr(decoder, name, blocks[: layer + 1])
    try:
        yield
    finally:
        setattr(decoder, name, blocks)


def report_flagging(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Print the table of flagging, and return it with each round's seconds."""
    lines = [
        {
            "method": method.name,
            "tokens/s": method.tokens / seconds if (seconds := median(method.seconds)) else None,
            "x bare": ratio(method, methods[0]) if i < 3 else None,
            "x official": ratio(method, methods[2]) if i < 3 else None,
            "time x generate": ratio(method, methods[3], speed=False) if i >= 3 else None,
            "": method.does,
        }
        for i, method in enumerate(methods)
    ]
    show(lines)
    return [line | {"seconds": m.seconds} for line, m in zip(lines, methods)]


def time_controls(model: Model, tokenizer: Any, rows: Sequence[Row], layer: int, rounds: int) -> dict[str, Any]:
    """Time whole runs with 100 random directions and with none, one after the other in every round.

    What they cost once, whatever the number of samples, is timed by itself: their covariance, from 16 answers. On the
    CPU it is this process's time that counts, which others on the machine do not stretch.
    """
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    vector, seconds = any_vector(model), {0: list[float](), 100: list[float](), "once": list[float]()}
    data = [{"question": f"Question {i}?", "answer": tokenizer.decode(row[1])} for i, row in enumerate(rows)]
    todo: list[int | str] = [0, 100, "once"]

    def run(what: int | str) -> float:
        start = clock()
        if isinstance(what, str):
            neutral_moments(model, tokenizer, layer=layer).random_vectors(vector, count=100)
        else:
            with tempfile.TemporaryDirectory() as folder:
                options: dict[str, Any] = {"baseline": "prompt_last", "out": f"{folder}/f.parquet", "controls": what}
                flag(model, tokenizer, data, vector, layer=layer, **options)
        return clock() - start

    run("once")  # first calls are slow
    for number in range(rounds):
        for what in todo if number % 2 == 0 else reversed(todo):
            seconds[what].append(run(what))
    triples = list(zip(seconds[0], seconds[100], seconds["once"]))
    whole, each = median([b / a for a, b, _ in triples]), median([(b - c) / a for a, b, c in triples])
    print(f"flag without random directions: {median(seconds[0]):.2f} s; with 100 of them {whole:.3f} times that,")
    print(f"of which {median(seconds['once']):.2f} s once for their covariance: {each:.3f} times without it")
    return {"seconds": {str(what): times for what, times in seconds.items()}, "ratio": whole, "ratio_each": each}


def time_workers(model: Model, tokenizer: Any, rows: Sequence[Row], layer: int) -> dict[str, float]:
    """Time Ray actors from the first finished part to the last, so that loading Ray and the model is left out."""
    import ray

    os.environ["OMP_NUM_THREADS"] = "1"
    vector = any_vector(model)
    data = [{"question": f"Question {i}?", "answer": tokenizer.decode(row[1])} for i, row in enumerate(rows)]
    original = flag_ray.map_in_actors

    def speed(count: int) -> float:
        times: list[float] = []

        def timed(*given: Any, workers: int, **options: Any) -> Iterator[str]:
            for done in original(*given, workers=count, **options):
                times.append(time.perf_counter())
                yield done

        ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False)
        flag_ray.map_in_actors = timed
        try:
            with tempfile.TemporaryDirectory() as folder:
                options = {"layer": layer, "baseline": "none", "chunk": 4, "workers": 2}
                flag(model, tokenizer, data, vector, out=f"{folder}/f.parquet", **options)
        finally:
            flag_ray.map_in_actors = original
            ray.shutdown()
        return (len(times) - count) / (times[-1] - times[count - 1])

    speeds = {str(count): speed(count) for count in (1, 2)}
    return {**speeds, "ratio": speeds["2"] / speeds["1"]}
