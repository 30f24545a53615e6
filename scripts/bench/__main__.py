"""Benchmarks: what reading and editing activations costs, beside a bare pass, the paper's way and other libraries.

Usage: python scripts/bench extraction | generation | flagging | training [--model NAME | --shape SHAPE] [--out FILE]
"""

import contextlib
import copy
import ctypes
import gc
import io
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, BatchEncoding
from transformers.utils import logging

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.traits import load_trait
from persona_vectors.extraction.rollouts import plan
from persona_vectors.flagging import actors as flag_ray
from persona_vectors.flagging.run import answer_means, flag
from persona_vectors.model.blocks import Model, decoder_layers, model_name, model_shape
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.loading import EMBEDDED, load_model
from persona_vectors.model.passes import Row
from persona_vectors.model.pooling import POOLINGS, pool, pool_while_generating
from persona_vectors.model.prompts import batch_tokens_for, left_pad, length_batches
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.vector import PersonaVector

# The shape of a model, for random weights: speed and memory do not depend on what the weights are.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
}
INSTALL = "not installed: python -m pip install scikit-learn && python -m pip install --no-deps"
app = typer.Typer(help="Benchmarks of persona_vectors.", no_args_is_help=True, add_completion=False)


@dataclass
class Method:
    """One way to do the work, and what it took in each round."""

    name: str
    does: str
    rows: Sequence[Row]
    run: Callable[[Sequence[Row]], object] | None = None
    """None where it cannot run here: `does` says why."""
    theirs: bool = False
    """True for other people's code, whose errors are results."""
    seconds: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    """Peak memory above what was in use before; empty where the system does not tell."""

    @property
    def tokens(self) -> int:
        """The real tokens of its rows, prompts and answers, also those that it shares."""
        return sum(len(prompt) + len(answer) for prompt, answer in self.rows)


# Measuring -----------------------------------------------------------------------------------------------------------


def run_rounds(methods: Sequence[Method], rounds: int, device: torch.device) -> None:
    """Run every method once a round, forwards and backwards in turn, so that a drift of the machine hits all alike."""
    able = [method for method in methods if method.run is not None]
    for method in able:  # first calls are slow
        _run(method, method.rows[:2])
    with tqdm(total=rounds * len(able), unit="run", leave=False) as bar:
        for number in range(rounds):
            for method in able if number % 2 == 0 else reversed(able):
                bar.set_postfix_str(method.name)
                if method.run is not None:
                    before = _reset_peak(device)
                    start = time.perf_counter()
                    _run(method, method.rows)
                    _synchronize(device)
                    method.seconds.append(time.perf_counter() - start)
                    if before is not None:
                        method.megabytes.append((_peak(device) - before) / 1e6)
                bar.update()


def _run(method: Method, rows: Sequence[Row]) -> None:
    assert method.run is not None
    try:
        method.run(rows)
    except Exception as error:
        if not method.theirs:
            raise
        method.run, method.does = None, f"failed: {type(error).__name__}: {error}"
        method.seconds, method.megabytes = [], []


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Start a new peak; returns the bytes in use now, or None where the system does not tell."""
    gc.collect()
    _synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier methods freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak, VmHWM, starts anew
        return _status("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return None


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def ratio(of: Method, to: Method, *, speed: bool = True) -> float | None:
    """Return how many times as fast as `to` (or as slow) `of` is: the median over rounds, each round by itself."""
    if not (of.seconds and to.seconds):
        return None
    scale = of.tokens / to.tokens if speed else 1.0
    pairs = zip(of.seconds, to.seconds)
    return statistics.median(scale * b / a if speed else a / b for a, b in pairs)


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def show(lines: Sequence[dict[str, Any]]) -> None:
    """Print a table with aligned columns; the last one, a remark, may be long."""
    cells = [list(lines[0])] + [[_cell(value) for value in line.values()] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(lines[0]) - 1)]
    for name, *numbers, remark in cells:
        print("  ".join([name.ljust(widths[0]), *(c.rjust(w) for c, w in zip(numbers, widths[1:])), remark]).rstrip())
    print()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
    return "-" if value is None else str(value)


def environment(model: Model, name: str) -> dict[str, Any]:
    """Return, and print, what the numbers depend on."""
    parameter = next(model.parameters())
    cuda = parameter.device.type == "cuda"
    found = {
        "model": name,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(parameter.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


# What is read --------------------------------------------------------------------------------------------------------


def load(name: str, shape: str | None, device: str | None) -> tuple[Model, Any]:
    """Return a model and its tokenizer, or a random one of a known shape and None."""
    if shape is None:
        return load_model(name, device=device)
    if shape not in SHAPES:
        raise InputError(f"no shape {shape!r}: give one of {', '.join(SHAPES)}")
    if not torch.cuda.is_available():
        raise InputError(f"--shape {shape} needs a CUDA GPU, and this machine has none: leave it out, or give --model")
    return random_model(shape, device or "cuda"), None


def random_model(shape: str, device: str) -> Model:
    """Build a model of a known shape with random bfloat16 weights."""
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def make_prompts(tokenizer: Any, count: int, vocabulary: int) -> list[list[int]]:
    """Return a trait's first prompts, as extraction makes them, or random ones of such lengths without a tokenizer."""
    if tokenizer is None:
        rng = random.Random(0)
        return [random_tokens(rng, rng.randint(50, 90), vocabulary) for _ in range(count)]
    tasks = plan(tokenizer, load_trait("optimistic"), questions=None, samples=1)
    if count > len(tasks):
        raise InputError(f"--prompts is {count}, and the trait has {len(tasks)}: give at most that")
    return [list(task["prompt_ids"]) for task in tasks[:count]]


def make_rows(prompts: Sequence[list[int]], samples: int, answer_tokens: int, vocabulary: int) -> list[Row]:
    """Return rows of unequal lengths: random answers, log-normal in length, at most 4 times the mean."""
    rng, sigma = random.Random(1), 0.5
    rows: list[Row] = []
    for prompt in prompts:
        for _ in range(samples):
            length = round(rng.lognormvariate(math.log(answer_tokens) - sigma**2 / 2, sigma))
            rows.append((prompt, random_tokens(rng, min(max(length, 1), 4 * answer_tokens), vocabulary)))
    return rows


def random_tokens(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(count)]


def unshared(rows: Sequence[Row]) -> list[Row]:
    """Return the same rows with a prompt of its own each: only the first token differs."""
    return [([index, *prompt[1:]], answer) for index, (prompt, answer) in enumerate(rows)]


def even(rows: Sequence[Row]) -> list[Row]:
    """Return as many rows, all of the mean length, so that batches of them need no padding."""
    whole = [token for prompt, answer in rows for token in (*prompt, *answer)]
    length = round(len(whole) / len(rows))
    return [(whole[:length], []) for _ in rows]


# Ways to read it -----------------------------------------------------------------------------------------------------


def bare(model: Model, rows: Sequence[Row], *, batch_tokens: int) -> None:
    """Run the decoder, without head, on rows of one length in full batches: the least that reading can cost."""
    ids = torch.tensor([[*prompt, *answer] for prompt, answer in rows], device=model.device)
    with torch.inference_mode():
        for batch in ids.split(max(1, batch_tokens // ids.shape[1])):
            model.get_decoder()(input_ids=batch, use_cache=False)


def official(model: Model, rows: Sequence[Row]) -> dict[str, list[list[Tensor]]]:
    """Run the paper's procedure: batch 1, all hidden states, all logits, and the autograd graph.

    Returns, for each pooling and each entry of `hidden_states`, a list of one [1, hidden] CPU tensor a row.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers + 1
    pooled: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(layers)] for name in POOLINGS}
    for prompt, answer in rows:
        ids, n = torch.tensor([[*prompt, *answer]], device=model.device), len(prompt)
        outputs = model(input_ids=ids, output_hidden_states=True)
        for layer in range(layers):  # no names for the states, which would keep this row's graph during the next
            pooled["response_mean"][layer].append(outputs.hidden_states[layer][:, n:].mean(dim=1).detach().cpu())
            pooled["prompt_mean"][layer].append(outputs.hidden_states[layer][:, :n].mean(dim=1).detach().cpu())
            pooled["prompt_last"][layer].append(outputs.hidden_states[layer][:, n - 1].detach().cpu())
        del outputs
    return pooled


class Pretokenized:
    """Stands in for the tokenizer of libraries that want texts: the text "7" is row 7, padded on the right."""

    pad_token_id = 0

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = [torch.tensor([*prompt, *answer]) for prompt, answer in rows]
        self.texts = [str(index) for index in range(len(rows))]

    def __call__(self, texts: Sequence[str], **_: Any) -> BatchEncoding:
        rows = [self.rows[int(text)] for text in texts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return BatchEncoding({"input_ids": pad_sequence(rows, batch_first=True), "attention_mask": mask})


def alias_numpy() -> None:
    """Set the name that NumPy 2 dropped and repeng 0.4.0 has in its annotations."""
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore


def repeng(model: Model, rows: Sequence[Row]) -> Method:
    """Return repeng's reading of hidden states, with its own batch size and its own choice of layers."""
    name, does = "repeng 0.4.0", "the last token's state only; batches of 32, all hidden states, all logits"
    alias_numpy()
    try:
        from repeng.extract import batched_get_hiddens
    except ImportError:
        return Method(name, f"{INSTALL} repeng==0.4.0", rows)
    layers = list(range(-1, -model.config.get_text_config(decoder=True).num_hidden_layers, -1))

    def run(rows: Sequence[Row]) -> None:
        tokenizer = Pretokenized(rows)
        with torch.inference_mode(), contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            batched_get_hiddens(model, tokenizer, tokenizer.texts, layers, 32)

    return Method(name, does, rows, run, theirs=True)


def steering_vectors(model: Model, rows: Sequence[Row]) -> Method:
    """Return steering-vectors' training: rows in turn stand for positive and negative texts."""
    name, does = (
        "steering-vectors 0.12.2",
        "the last token's state only; batches of 1, a copy of every state, all logits",
    )
    try:
        from steering_vectors import train_steering_vector
    except ImportError:
        return Method(name, f"{INSTALL} steering-vectors==0.12.2", rows)

    def run(rows: Sequence[Row]) -> None:
        tokenizer: Any = Pretokenized(rows)
        train_steering_vector(model, tokenizer, list(zip(tokenizer.texts[::2], tokenizer.texts[1::2])))

    return Method(name, does, rows[: len(rows) // 2 * 2], run, theirs=True)


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
    tokenizer = tokenizer or Endless()

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

    @contextlib.contextmanager
    def by_repeng(model: Model) -> Iterator[None]:
        alias_numpy()
        from repeng import ControlModel, ControlVector

        wrapped = ControlModel(model, [layer])
        try:
            wrapped.set_control(ControlVector("any", {layer: shift.numpy()}))
            yield
        finally:
            wrapped.unwrap()

    def by_steering_vectors(model: Model) -> Any:
        from steering_vectors import SteeringVector

        return SteeringVector({layer: shift.to(model.device)}, "decoder_block").apply(model)

    return [
        Edited("nothing", "two plain runs: what the measurement can tell", lambda m: contextlib.nullcontext()),
        Edited("monitor, 1 layer", "8 vectors", lambda m: monitor(m, vectors, layer=layer)),
        Edited("monitor, all layers", f"8 vectors, {count} layers", lambda m: monitor(m, vectors, layer="all")),
        Edited("steer", "1 layer", lambda m: steer(m, vectors[0], layer=layer, coef=0.01)),
        Edited("repeng 0.4.0", "1 layer", by_repeng, theirs=True),
        Edited("steering-vectors 0.12.2", "1 layer", by_steering_vectors, theirs=True),
    ]


def twin_of(model: Model) -> Model:
    """Return a second model on the same weights, so that hooks on it leave the first alone."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def greedy_steps(model: Model, prompts: Sequence[list[int]], new_tokens: int, around: Any) -> Iterator[float]:
    """Generate greedily with a cache, as `generate` does but for its checks, and yield each forward pass's seconds."""
    ids, mask = left_pad(prompts, 0, model.device)
    cache = None
    with around:
        for _ in range(new_tokens):
            start = time.perf_counter()
            with torch.inference_mode():
                places = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                options = {"attention_mask": mask, "position_ids": places, "use_cache": True, "logits_to_keep": 1}
                output = model(input_ids=ids, cache=cache, **options)
                ids, cache = output.logits[:, -1:].argmax(dim=-1), output.cache
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            _synchronize(model.device)
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
        ratios = np.array(method.edited) / np.array(method.plain)
        drawn = np.random.default_rng(0).choice(ratios, (1000, len(ratios))) if len(ratios) else np.ones((1, 0))
        interval = np.percentile(np.median(drawn, axis=1), [2.5, 97.5]) if len(ratios) else [math.nan] * 2
        lines.append(
            {
                "method": method.name,
                "plain ms": 1000 * statistics.median(method.plain) if method.plain else None,
                "overhead %": 100 * (float(np.median(ratios)) - 1) if len(ratios) else None,
                "from": 100 * (float(interval[0]) - 1) if len(ratios) else None,
                "to": 100 * (float(interval[1]) - 1) if len(ratios) else None,
                "": method.does,
            }
        )
    show(lines)
    return [line | {"plain": m.plain, "edited": m.edited} for line, m in zip(lines, methods)]


class Endless:
    """Stands in for the tokenizer of a random model: no token ends an answer."""

    pad_token_id = eos_token_id = None


# Commands ------------------------------------------------------------------------------------------------------------

ModelName = Annotated[str, typer.Option("--model", help="smollm2-135m, a Hub id, a folder or a .gguf file")]
Shape = Annotated[str | None, typer.Option(help=f"random weights of this shape instead: {', '.join(SHAPES)}")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu [default: the best there is]")]
Rounds = Annotated[int, typer.Option(help="rounds to take medians over", min=1)]
Out = Annotated[Path | None, typer.Option(help="write all numbers to this JSON file")]


@app.callback()
def _main() -> None:
    """Benchmarks of persona_vectors."""


@app.command()
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
    chosen = length_batches(asked, answer_tokens, 8 * budget)[0]
    generating = reading_methods(model, tokenizer, [asked[i] for i in chosen], answer_tokens)
    run_rounds(generating, rounds, model.device)
    found["generation"] = report_generation(generating, generating[:2])
    save(found, out)


@app.command()
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


def save(found: dict[str, Any], out: Path | None) -> None:
    if out:
        with atomic_path(out) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


def flagging_methods(
    model: Model, tokenizer: Any, rows: Sequence[Row], new_tokens: int, batch_tokens: int, layer: int
) -> list[Method]:
    """Return the bare pass up to `layer`, `prompt_last`, the official projection, and generation with and without."""
    shape = model.config.get_text_config(decoder=True)
    directions = torch.randn(shape.num_hidden_layers, shape.hidden_size, generator=torch.Generator().manual_seed(0))
    vector = PersonaVector("random", "bench", directions)
    units = unit_directions(model, [vector], layer)

    def bare_to(rows: Sequence[Row]) -> None:
        with stopped_after(model, layer):
            bare(model, rows, batch_tokens=batch_tokens)

    def prompt_last(rows: Sequence[Row]) -> None:
        answer_means(model, rows, units, batch_tokens)

    def theirs(rows: Sequence[Row]) -> None:
        for prompt, answer in rows:  # eval/cal_projection.py: batch 1, all hidden states, all logits
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[layer + 1]
            mean, last = hidden[:, len(prompt) :].mean(dim=1).detach().cpu(), hidden[:, len(prompt) - 1].detach().cpu()
            vector.project(mean, layer=layer), vector.project(last, layer=layer)
            del hidden

    def plain(rows: Sequence[Row]) -> None:
        for batch in length_batches([p for p, _ in rows], new_tokens, 8 * batch_tokens):
            prompts = [rows[i][0] for i in batch]
            generate_tokens(model, tokenizer, prompts, max_new_tokens=new_tokens + 1, temperature=0)

    def reading(rows: Sequence[Row]) -> None:
        stops = stop_tokens(model, tokenizer)
        for batch in length_batches([p for p, _ in rows], new_tokens, 8 * batch_tokens):
            with monitor(model, vector, layer=layer, stops=stops) as trace:
                prompts = [rows[i][0] for i in batch]
                generate_tokens(model, tokenizer, prompts, max_new_tokens=new_tokens + 1, temperature=0)
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


@app.command()
def flagging(
    model_name: ModelName = EMBEDDED,
    device: Device = None,
    samples: Annotated[int, typer.Option(help="training samples, each with a prompt of its own", min=1)] = 64,
    answer_tokens: Annotated[int, typer.Option(help="mean length of an answer", min=1)] = 100,
    new_tokens: Annotated[int, typer.Option(help="length of a generated baseline", min=1)] = 64,
    layer: Annotated[int | None, typer.Option(help="[default: the middle one]")] = None,
    workers: Annotated[bool, typer.Option(help="also time two Ray actors against one, a thread each")] = False,
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
    methods = flagging_methods(model, tokenizer, rows, new_tokens, batch_tokens_for(model), middle)
    run_rounds(methods, rounds, model.device)
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
    found["flagging"] = [line | {"seconds": m.seconds} for line, m in zip(lines, methods)]
    if workers:
        found["workers"] = time_workers(model, tokenizer, rows, middle)
        print(f"two workers: {found['workers']['ratio']:.2f}x one, a thread each (the start of the actors left out)")
    save(found, out)


@app.command()
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


def time_workers(model: Model, tokenizer: Any, rows: Sequence[Row], layer: int) -> dict[str, float]:
    """Time Ray actors from the first finished part to the last, so that loading Ray and the model is left out."""
    import ray

    os.environ["OMP_NUM_THREADS"] = "1"
    shape = model.config.get_text_config(decoder=True)
    vector = PersonaVector("random", "bench", torch.randn(shape.num_hidden_layers, shape.hidden_size))
    data = [{"question": f"Question {i}?", "answer": tokenizer.decode(row[1])} for i, row in enumerate(rows)]
    original = flag_ray.run_in_actors

    def speed(count: int) -> float:
        times: list[float] = []

        def timed(model: Any, work: Any, todo: Any, path: Any, _: int, progress: Any) -> None:
            original(model, work, todo, path, count, lambda n: (times.append(time.perf_counter()), progress(n)))

        ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False)
        flag_ray.run_in_actors = timed
        try:
            with tempfile.TemporaryDirectory() as folder:
                options = {"layer": layer, "baseline": "none", "chunk": 4, "workers": 2}
                flag(model, tokenizer, data, vector, out=f"{folder}/f.parquet", **options)
        finally:
            flag_ray.run_in_actors = original
            ray.shutdown()
        return (len(times) - count) / (times[-1] - times[count - 1])

    speeds = {str(count): speed(count) for count in (1, 2)}
    return {**speeds, "ratio": speeds["2"] / speeds["1"]}


def middle_vector(model: Model) -> PersonaVector:
    """Return a random vector of the model's shape: what it costs does not depend on where it points."""
    directions = torch.randn(model_shape(model), generator=torch.Generator().manual_seed(0))
    return PersonaVector(trait="random", model="bench", directions=directions)


def training_steps(model: Model, batch: int, tokens: int, steps: int) -> dict[str, list[float]]:
    """Return the seconds of each step, plain and steered; the order alternates, and the first pair is left out."""
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear", use_rslora=True)).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-5)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.tensor([random_tokens(random.Random(i), tokens, vocabulary) for i in range(batch)], device=model.device)
    vector, layer = middle_vector(tuned), model_shape(tuned)[0] // 2
    seconds: dict[str, list[float]] = {"plain": [], "steered": []}
    for number in range(steps + 1):
        for name in ("plain", "steered") if number % 2 else ("steered", "plain"):
            edit = steer(tuned, vector, layer=layer, coef=1.0) if name == "steered" else contextlib.nullcontext()
            with edit:  # entering it, which a run does once, is not timed
                _synchronize(ids.device)
                start = time.perf_counter()
                tuned(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                _synchronize(ids.device)
                seconds[name].append(time.perf_counter() - start)
    tuned.unload()
    return {name: values[1:] for name, values in seconds.items()}


def probe_seconds(model: Model, tokens: int, prompts: int = 8) -> list[float]:
    """Return the seconds that reading 8 probe prompts of 24 tokens takes, three times."""
    vocabulary, layer = model.config.get_text_config(decoder=True).vocab_size, model_shape(model)[0] // 2
    rows: list[Row] = [(random_tokens(random.Random(i), 24, vocabulary), []) for i in range(prompts)]
    units, seconds = unit_directions(model, [middle_vector(model)], layer), []
    for _ in range(4):
        _synchronize(model.device)
        start = time.perf_counter()
        token_projections(model, rows, units)
        _synchronize(model.device)
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


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
