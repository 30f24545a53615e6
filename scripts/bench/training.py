"""What steering adds to a training step, and the callback's probes to training."""

import contextlib
import random
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Shape, any_vector, load, random_tokens
from bench.measuring import environment, save, synchronize
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.model.passes import Row
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.steering.add import steer
from persona_vectors.vectors.directions import unit_directions

Around = dict[str, Callable[[Model], Any]]
"""What steps are taken in: functions that return the context manager that edits or reads this model."""


def training(
    model_name: ModelName = EMBEDDED,
    shape: Shape = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(help="sequences a step", min=1)] = 4,
    tokens: Annotated[int, typer.Option(help="tokens a sequence", min=2)] = 128,
    steps: Annotated[int, typer.Option(help="steps of each kind, taken in turn", min=1)] = 30,
    out: Out = None,
) -> None:
    """Measure a LoRA training step, plain and steered in turn, and the callback's probes every 10 steps."""
    logging.disable_progress_bar()
    model, _ = load(model_name, shape, device)
    found = environment(model, shape or model_name)
    found["training"] = report_training(training_steps(model, batch, tokens, steps), probe_seconds(model, tokens))
    save(found, out)


def training_steps(
    model: Model, batch: int, tokens: int, steps: int, *, around: Around | None = None, checkpointing: bool = False
) -> dict[str, list[float]]:
    """Return the seconds of each step, plain and with each of `around`, by default steered, taken in turn.

    The order alternates, and each kind's first step is left out.
    """
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear", use_rslora=True)).train()
    if checkpointing:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-5)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.tensor([random_tokens(random.Random(i), tokens, vocabulary) for i in range(batch)], device=model.device)
    kinds: Around = {"plain": lambda _: contextlib.nullcontext(), **(around or {"steered": steered})}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(steps + 1):
        for name in kinds if number % 2 else reversed(kinds):
            with kinds[name](tuned):  # entering it, which a run does once, is not timed
                synchronize(ids.device)
                start = time.perf_counter()
                tuned(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                synchronize(ids.device)
                seconds[name].append(time.perf_counter() - start)
    if checkpointing:
        tuned.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    tuned.unload()
    model.eval().requires_grad_(True)
    return {name: values[1:] for name, values in seconds.items()}


def steered(model: Model) -> Any:
    """Return the context manager of preventative steering in the middle block."""
    return steer(model, any_vector(model), layer=model_shape(model)[0] // 2, coef=1.0)


def probe_seconds(model: Model, tokens: int, prompts: int = 8) -> list[float]:
    """Return the seconds that reading 8 probe prompts of 24 tokens takes, three times."""
    vocabulary, layer = model.config.get_text_config(decoder=True).vocab_size, model_shape(model)[0] // 2
    rows: list[Row] = [(random_tokens(random.Random(i), 24, vocabulary), []) for i in range(prompts)]
    units, seconds = unit_directions(model, [any_vector(model)], layer), []
    for _ in range(4):
        synchronize(model.device)
        start = time.perf_counter()
        token_projections(model, rows, units)
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def report_training(steps: dict[str, list[float]], probe: list[float]) -> dict[str, Any]:
    """Print the overheads, and return them with each step's seconds."""
    plain = statistics.median(steps["plain"])
    steered = statistics.median(b / a for a, b in zip(steps["plain"], steps["steered"])) - 1
    callback = statistics.median(probe) / (10 * plain)
    print(f"a plain step {plain:.3f} s; steering {100 * steered:+.1f} % (median of {len(steps['plain'])} pairs)")
    print(f"8 probe prompts {statistics.median(probe):.3f} s: {100 * callback:+.1f} % at every 10 steps")
    return {"steering": steered, "callback every 10 steps": callback, "seconds": steps, "probe_seconds": probe}
