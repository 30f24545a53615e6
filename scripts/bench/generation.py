"""What monitors and edits add to generation, a step with each in turn with a plain step."""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm
from transformers import DynamicCache
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Rounds, Shape, load, make_prompts
from bench.measuring import environment, median, median_interval, save, show, synchronize
from bench.peers import by_repeng, by_steering_vectors
from persona_vectors.model.blocks import Model, model_name, model_shape
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.model.pooling import pool_while_generating
from persona_vectors.model.prompts import left_pad
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import cap
from persona_vectors.vectors.vector import PersonaVector


@dataclass
class Edited:
    """What generation is measured with, and the seconds of each of its steps beside plain generation's."""

    name: str
    does: str
    around: Callable[[Model], Any]
    """Returns the context manager that edits or reads this model."""
    theirs: bool = False
    plain: list[float] = field(default_factory=list)
    edited: list[float] = field(default_factory=list)


def generation(
    model_name: ModelName = EMBEDDED,
    shape: Shape = None,
    device: Device = None,
    batch: Annotated[int, typer.Option(help="rows of the batch", min=1)] = 8,
    new_tokens: Annotated[int, typer.Option(help="tokens generated in each row", min=1)] = 128,
    rounds: Rounds = 4,
    peers: Annotated[bool, typer.Option(help="measure other libraries' steering too")] = True,
    out: Out = None,
) -> None:
    """Measure what monitoring and steering add to generation: ours, repeng's and steering-vectors'.

    A step with each is taken in turn with a step of plain generation, on a twin model of the same weights.
    """
    logging.disable_progress_bar()
    model, tokenizer = load(model_name, shape, device)
    found = environment(model, shape or model_name) | {"batch": batch, "new_tokens": new_tokens, "rounds": rounds}
    prompts = make_prompts(tokenizer, batch, model.config.get_text_config(decoder=True).vocab_size)
    print(f"greedy, {batch} rows x {new_tokens} tokens; medians of {rounds * new_tokens} pairs of steps\n")
    models = model, twin_of(model)
    methods = [method for method in edited_generations(model) if peers or not method.theirs]
    for method in tqdm(methods, unit="method", leave=False):
        time_steps(models, prompts, new_tokens, rounds, method)
    found["generation"] = report_steps(methods)
    save(found, out)


def edited_generations(model: Model) -> list[Edited]:
    """Return monitors and edits of ours, and other libraries' edits."""
    count, hidden = model_shape(model)
    layer, name = count // 2, model_name(model)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(8)]
    vectors = [
        PersonaVector(f"random {seed}", name, torch.randn(count, hidden, generator=generator))
        for seed, generator in enumerate(seeds)
    ]
    shift = 0.01 * vectors[0].direction(layer)
    return [
        Edited("nothing", "two plain runs: what the measurement can tell", lambda m: contextlib.nullcontext()),
        Edited("monitor, 1 layer", "8 vectors", lambda m: monitor(m, vectors, layer=layer)),
        Edited("monitor, all layers", f"8 vectors, {count} layers", lambda m: monitor(m, vectors, layer="all")),
        Edited("pooling", f"{count} layers", lambda m: pool_while_generating(m, stops=(0,))),
        Edited("cap", "1 layer", lambda m: cap(m, vectors[0], layer=layer, limit=0.0)),
        Edited("steer", "1 layer", lambda m: steer(m, vectors[0], layer=layer, coef=0.01)),
        Edited("repeng 0.4.0", "1 layer", lambda m: by_repeng(m, layer, shift), theirs=True),
        Edited("steering-vectors 0.12.2", "1 layer", lambda m: by_steering_vectors(m, layer, shift), theirs=True),
    ]


def twin_of(model: Model) -> Model:
    """Return a second model on the same weights, so that hooks on it leave the first alone."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def greedy_steps(model: Model, prompts: Sequence[list[int]], new_tokens: int, around: Any) -> Iterator[float]:
    """Generate greedily with a cache, as `generate` does but for its checks, and yield each forward pass's seconds."""
    ids, mask = left_pad(prompts, 0, model.device)
    cache = DynamicCache(config=model.config)
    with around:
        for _ in range(new_tokens):
            start = time.perf_counter()
            with torch.inference_mode():
                places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                options = {"attention_mask": mask, "position_ids": places, "use_cache": True, "logits_to_keep": 1}
                output = model(input_ids=ids, cache=cache, **options)
                ids, cache = output.logits[:, -1:].argmax(dim=-1), output.cache
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            synchronize(model.device)
            yield time.perf_counter() - start


def time_steps(
    models: tuple[Model, Model], prompts: Sequence[list[int]], new_tokens: int, rounds: int, edited: Edited
) -> None:
    """Run two generations side by side, a step of the one and a step of the other, each first in every second step."""
    for number in range(rounds):
        try:
            kinds = [contextlib.nullcontext(), edited.around(models[number % 2])]
            pair = [greedy_steps(models[(number + 1 - i) % 2], prompts, new_tokens, k) for i, k in enumerate(kinds)]
            for step in range(new_tokens):
                for i in (0, 1) if step % 2 else (1, 0):
                    (edited.edited if i else edited.plain).append(next(pair[i]))
            for run in pair:
                run.close()
        except Exception as error:
            if not edited.theirs:
                raise
            edited.does, edited.plain, edited.edited = f"failed: {type(error).__name__}: {error}", [], []
            return


def report_steps(methods: Sequence[Edited]) -> list[dict[str, Any]]:
    """Print how much longer a step takes with each edit than the plain one beside it; medians, with 95 % intervals."""
    lines = []
    for method in methods:
        ratios = [edited / plain for plain, edited in zip(method.plain, method.edited)]
        low, high = median_interval(ratios) or (None, None)
        lines.append(
            {
                "method": method.name,
                "plain ms": 1000 * statistics.median(method.plain) if method.plain else None,
                "overhead %": _percent(median(ratios)),
                "from": _percent(low),
                "to": _percent(high),
                "": method.does,
            }
        )
    show(lines)
    return [line | {"plain": m.plain, "edited": m.edited} for line, m in zip(lines, methods)]


def _percent(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * (ratio - 1)
