"""What projections add to a decoding step of the server."""

import time
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from tqdm import tqdm

import persona_vectors as pv
from bench.inputs import ModelName, Out
from bench.measuring import environment, median, median_interval, save, show
from bench.soak import Vectors
from persona_vectors.model.blocks import model_shape
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.serving.batch import Batch, Values
from persona_vectors.serving.rows import Job, Row


def step(
    model_name: ModelName = EMBEDDED,
    vectors: Vectors = None,
    rows: Annotated[int, typer.Option(help="answers that share a step", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="steps to take medians over", min=1)] = 60,
    out: Out = None,
) -> None:
    """Measure what projections of every vector add to a decoding step, with what the engine makes of it.

    Steps of three batches take turns in one process, two of them without projections: their difference is what the
    measurement can tell. Processor time, one thread; requests and replies are left out.
    """
    torch.set_num_threads(1)
    model, tokenizer = pv.load_model(model_name, device="cpu")
    found = environment(model, model_name)
    known = [
        pv.load_vector(name) for name in vectors or [f"smollm2-135m/{x}" for x in ("optimistic", "evil", "humorous")]
    ]
    layer, prompt = model_shape(model)[0] // 2, tokenizer("How was your day?").input_ids
    keys = {vector.trait: (layer, place) for place, vector in enumerate(known)}
    batches = {way: Batch(model, known) for way in ("plain", "plain again", "projections")}
    for way, batch in batches.items():
        for _ in range(rows):
            job = Job(prompt, lambda _event: None, 2 * steps + 20, keys=keys if way == "projections" else {})
            row = Row(job, tokenizer, [])
            _take([row], *batch.join(row))
    times: dict[str, list[float]] = {way: [] for way in batches}
    for number in tqdm(range(-5, steps), unit="step", leave=False):  # the first ones warm up
        for way in list(batches)[:: -1 if number % 2 else 1]:
            batch, begin = batches[way], time.process_time()
            _take(batch.rows, *batch.step([row.tokens[-1] for row in batch.rows]))
            if number >= 0:
                times[way].append(1000 * (time.process_time() - begin))
    lines = []
    for way, each in times.items():
        more = [100 * (a / b - 1) for a, b in zip(each, times["plain"])]
        low, high = median_interval(more) or (None, None)
        lines.append(
            {"way": way, "ms": median(each), "more %": median(more), "from": low, "to": high, "": f"{rows} rows"}
        )
    show(lines)
    save(found | {"rows": rows, "layer": layer, "vectors": len(known), "steps": lines}, out)


def _take(rows: Sequence[Row], logits: torch.Tensor, values: Values) -> None:
    """Do with a pass what the engine does."""
    greedy, read = logits.argmax(dim=1).tolist(), {layer: each.tolist() for layer, each in values.items()}
    for place, row in enumerate(rows):
        row.read(read, place)
        row.choose(logits[place], greedy[place])
