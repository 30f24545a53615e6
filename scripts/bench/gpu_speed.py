"""How fast a device is: rollouts by width, hooks, extraction, training and flagging, as the other commands measure."""

import contextlib
import gc
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Trainer

from bench.flagging import flagging_methods, report_flagging
from bench.generation import edited_generations, report_steps, time_steps, twin_of
from bench.gpu_checks import answer_paged
from bench.inputs import any_vector, endless, make_prompts, make_rows, random_tokens
from bench.measuring import Method, measure, median, median_interval, run_rounds, show
from bench.peers import official
from bench.training import steered, training_steps
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import batch_tokens_for, left_pad
from persona_vectors.training.watch import ProjectionCallback

Lines = list[dict[str, Any]]
"""What a section found, added as it comes."""


def vocabulary_of(model: Model) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def some_prompts(model: Model, count: int) -> list[list[int]]:
    """Return random prompts of about 100 tokens."""
    rng = random.Random(2)
    return [random_tokens(rng, rng.randint(80, 120), vocabulary_of(model)) for _ in range(count)]


def bare_generate(model: Model, prompts: Sequence[list[int]], steps: int, **options: Any) -> None:
    """Sample from the whole distribution with the model's own `generate`."""
    ids, mask = left_pad(prompts, 0, model.device)
    config = GenerationConfig(max_new_tokens=steps, do_sample=True, top_k=0, pad_token_id=0, **options)
    model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


def rollouts(model: Model, widths: Sequence[int], steps: int, lines: Lines) -> None:
    """Measure tokens a second by the width of the batch, until memory is full."""

    def ours(prompts: Sequence[list[int]], steps: int, temperature: float = 1.0) -> None:
        generate_tokens(model, endless(), prompts, max_new_tokens=steps, temperature=temperature)

    ways: dict[str, Callable[[Sequence[list[int]], int], None]] = {
        "ours": ours,
        "ours, greedy": partial(ours, temperature=0.0),
        "transformers": partial(bare_generate, model),
    }
    for width in widths:
        prompts = some_prompts(model, width)
        for name in list(ways):
            try:
                ways[name](prompts, 2)
                add_speed(lines, name, width, *measure(partial(ways[name], prompts, steps), model.device), steps)
            except torch.OutOfMemoryError:
                print(f"{name}, {width} rows: out of memory", flush=True)
                lines.append({"method": name, "rows": width, "out of memory": True})
                del ways[name]
                free()


def static_rollouts(model: Model, widths: Sequence[int], steps: int, lines: Lines) -> None:
    """Measure the compiled static cache: each width is compiled first."""
    for width in widths:
        prompts = some_prompts(model, width)
        for name in ("static, compiling", "static"):
            run = partial(bare_generate, model, prompts, steps, cache_implementation="static")
            add_speed(lines, name, width, *measure(run, model.device), steps)


def continuous_rollouts(model: Model, rows: int, steps: int, lines: Lines) -> None:
    """Measure continuous batching, which captures its CUDA graphs anew in each call."""
    prompts = some_prompts(model, rows)
    config = GenerationConfig(max_new_tokens=steps, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=-1)
    for name, graphs in {"continuous, no CUDA graphs": False, "continuous": None}.items():
        run = partial(answer_paged, model, prompts, config, graphs)
        add_speed(lines, name, rows, *measure(run, model.device), steps)


def add_speed(lines: Lines, name: str, rows: int, seconds: float, megabytes: float | None, steps: int) -> None:
    speed = rows * steps / seconds
    memory = "" if megabytes is None else f", {megabytes:,.0f} MB"
    print(f"{name}, {rows} rows: {speed:,.0f} tokens/s, {seconds:.2f} s{memory}", flush=True)
    lines.append({"method": name, "rows": rows, "tokens/s": speed, "seconds": seconds, "peak MB": megabytes})


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def hooks(model: Model, pairs: int, lines: Lines) -> None:
    """Measure what monitors and edits add to a decoding step of 8 rows, in pairs of steps."""
    models, prompts = (model, twin_of(model)), some_prompts(model, 8)
    methods = [method for method in edited_generations(model) if not method.theirs]
    try:
        for method in methods:
            method.theirs = True  # an error is its result, and the others go on
            time_steps(models, prompts, -(-pairs // 2), 2, method)
    finally:
        lines += report_steps([method for method in methods if method.edited or "failed" in method.does])


def finished_answers(model: Model, answers: int) -> list[Row]:
    prompts = make_prompts(None, -(-answers // 10), vocabulary_of(model))
    return make_rows(prompts, 10, 100, vocabulary_of(model))


def extraction(model: Model, answers: int, rounds: int, lines: Lines) -> None:
    """Measure reading finished answers against the official procedure, and compare the vectors of the two."""
    rows = finished_answers(model, answers)
    methods = [
        Method("ours", "response_mean, all layers", rows, lambda r: pool(model, r), theirs=True),
        Method("official procedure", "all layers; batches of 1", rows, lambda r: official(model, r), theirs=True),
    ]
    run_rounds(methods, rounds, model.device)
    for method in methods:
        seconds = median(method.seconds)
        speed = {"answers/s": len(rows) / seconds if seconds else None}
        lines.append({"method": method.name, **speed, "peak MB": median(method.megabytes), "": method.does})
    show(lines)
    ours = pool(model, rows).means[:, 0, :-1]
    theirs = torch.stack([torch.cat(states) for states in official(model, rows)["response_mean"][1:-1]], dim=1).float()
    one, other = half_difference(ours), half_difference(theirs)
    gap = float(((one - other).norm(dim=1) / other.norm(dim=1)).max())
    cosine = float(torch.cosine_similarity(one, other, dim=1).min())
    print(f"the two vectors: largest difference of a layer {100 * gap:.2f} %, least cosine {cosine:.5f}", flush=True)
    lines.append({"largest difference": gap, "least cosine": cosine})


def half_difference(means: Tensor) -> Tensor:
    """Return the mean of the first half of the rows less that of the others, as a vector is made of two kinds."""
    half = len(means) // 2
    return means[:half].mean(dim=0) - means[half:].mean(dim=0)


@contextlib.contextmanager
def watched(model: Model) -> Iterator[None]:
    """Read a training step's batch as ProjectionCallback does."""
    state: Any = SimpleNamespace(global_step=0)
    trainer = Trainer.__new__(Trainer)  # what logs, and nothing is logged here
    callback = ProjectionCallback(trainer, any_vector(model), layer=model_shape(model)[0] // 2, every=1)
    callback.on_train_begin(None, state, None, model=model, processing_class=None)
    callback.on_step_begin(None, state, None, model=model)
    yield


def training(model: Model, steps: int, lines: Lines) -> None:
    """Measure a LoRA step with gradient checkpointing: plain, steered and watched, in turn."""
    around = {"steered": steered, "watched": watched}
    seconds = training_steps(model, 4, 128, steps, around=around, checkpointing=True)
    for name in around:
        ratios = [other / plain for plain, other in zip(seconds["plain"], seconds[name])]
        low, high = median_interval(ratios) or (None, None)
        plain = median(seconds["plain"])
        lines.append({"method": name, "plain s": plain, "ratio": median(ratios), "from": low, "to": high, "": ""})
    show(lines)


def flagging(model: Model, samples: int, rounds: int, lines: Lines) -> None:
    """Measure reading samples for flagging: to the middle layer, against the bare pass and the official projection."""
    layer = model_shape(model)[0] // 2
    rows = finished_answers(model, samples)
    methods = flagging_methods(model, endless(), rows, 0, batch_tokens_for(model), layer)[:3]
    run_rounds(methods, rounds, model.device)
    lines += report_flagging(methods)
