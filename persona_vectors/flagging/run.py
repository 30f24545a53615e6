"""Flagging: judge training data before training, by projection difference on persona vectors (paper, section 6)."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.samples import Source, import_pyarrow, read_samples
from persona_vectors.flagging.merge import merge
from persona_vectors.flagging.parts import (
    Flags,
    check_same,
    is_flags,
    load_flags,
    part,
    read_header,
    read_json,
    read_table,
    write_json,
    write_table,
)
from persona_vectors.flagging.plan import check_digest, make_plan, source_name
from persona_vectors.flagging.store import Baselines
from persona_vectors.model.blocks import Layer, Model
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.hooks import edits_are_active
from persona_vectors.model.identity import fingerprint, identity
from persona_vectors.model.loading import cache_dir
from persona_vectors.model.prompts import batch_tokens_for, length_batches
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.monitoring.trace import monitor
from persona_vectors.vectors.directions import unit_directions, vector_keys, vector_list
from persona_vectors.vectors.vector import PersonaVector

BASELINES = ("generate", "prompt_last", "none")


def flag(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    samples: Source,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    layer: Layer,
    out: str | Path,
    baseline: str | Path = "generate",
    columns: tuple[str, str] | None = None,
    split: str = "train",
    on_error: str = "stop",
    max_length: int | None = None,
    max_new_tokens: int = 256,
    reference: Source | None = None,
    threshold: float | str | None = None,
    cache: str | Path | None = None,
    batch_tokens: int | None = None,
    chunk: int = 256,
    workers: int = 1,
) -> Flags:
    """Score every training sample by its projection difference on each vector, and write them to a Parquet file.

    A sample's score is the mean projection on v/|v| of its answer's tokens, minus its baseline's:

    - "generate": that of the model's own greedy answer to the same prompt, read while it is generated, and kept in
      the file `cache` by prompt, so that duplicates and later runs pay nothing.
    - a path: that of the answer that this file, in any form of `read_samples`, gives to the same prompt.
    - "prompt_last": the projection of the prompt's last token, from the same pass (the paper's shortcut).
    - "none": nothing is subtracted.

    `samples` may be anything that `read_samples` takes, with its `columns` and `split`. A record that is no sample
    ends the run (`on_error="stop"`) or is counted and left out ("skip"). Samples longer than `max_length` (the model's
    context unless given) are cut, marked `truncated` and counted; an empty answer has a row without values.

    Each row has, for each vector, `{trait}_projection`, `_baseline`, `_difference` and `_percentile`: among the
    differences of `reference` (neutral samples, or an earlier flags file of theirs), else of the dataset itself.
    `flagged` is set where a difference is at or above `threshold`: a number, or "p95" for that percentile, which is
    the default where there is a `reference`. With several layers, traits are named `trait@layer`.

    The run writes to the folder `out`.parts, and a killed one goes on there, `chunk` samples at a time. A finished
    `out` is returned at once. `workers` > 1 runs as many Ray actors that hold a model each, on this machine or on the
    cluster that RAY_ADDRESS names, where `out` has to be on a shared disk; the numbers are the same.

    Raises InputError for data, vectors or a layer that do not fit, and for an `out` that was made with other settings.
    """
    import_pyarrow()
    chosen = vector_list(vectors)
    units = unit_directions(model, chosen, layer)
    limit = max_length or getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    generates = str(baseline) == "generate"
    _check(model, str(baseline), on_error, threshold, limit, max_new_tokens if generates else 0, chunk, workers)
    out, folder = Path(out), Path(f"{out}.parts")
    settings = {
        **identity(model, tokenizer),
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "vectors": {vector.trait: _hash(vector.directions[list(units)].tolist()) for vector in chosen},
        "layers": list(units),
        "baseline": source_name(baseline),
        "max_new_tokens": max_new_tokens if generates else None,
        "data": source_name(samples),
        "columns": None if columns is None else list(columns),
        "split": split,
        "on_error": on_error,
        "max_length": limit,
        "batch_tokens": batch_tokens or batch_tokens_for(model),
        "chunk": chunk,
    }
    judged = {
        "reference": None if reference is None else source_name(reference),
        "threshold": "p95" if threshold is None and reference is not None else threshold,
    }
    read = partial(read_samples, columns=columns, split=split)
    if out.exists():
        header = read_header(out)
        check_same(out, header["settings"], {**settings, **judged})
        check_digest(read(samples), header["digest"], out)
        return load_flags(out)
    if folder.exists():
        check_same(folder, read_json(folder / "settings.json"), settings)
    if reference is not None and not is_flags(reference):
        again = partial(flag, model, tokenizer, reference, vectors, layer=layer, baseline=baseline, columns=columns)
        again = partial(again, split=split, on_error=on_error, max_length=max_length, max_new_tokens=max_new_tokens)
        again = partial(again, cache=cache, batch_tokens=batch_tokens, chunk=chunk, workers=workers)
        reference = again(out=Path(f"{out}.reference.parquet")).path
    if reference is not None:
        theirs = read_header(Path(str(reference)))["settings"]
        same = ("weights", "vectors", "layers", "baseline", "max_new_tokens")
        check_same(Path(str(reference)), {n: theirs[n] for n in same}, {n: settings[n] for n in same})
    if not folder.exists():
        folder.mkdir(parents=True)
        write_json(folder / "settings.json", settings)
    reading = _hash([settings["vectors"], settings["layers"]])
    kept = Path(cache) if cache else cache_dir() / "baselines.sqlite"
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
        plan = make_plan(
            tokenizer,
            read(samples),
            folder,
            stop=on_error == "stop",
            limit=limit,
            new_tokens=max_new_tokens + 1 if generates else 0,
            answers=None if str(baseline) in BASELINES else read(baseline),
            cache=kept,
            namespace=_hash([settings[name] for name in ("weights", "dtype", "config_hash", "max_new_tokens")]),
            reading=reading,
            chunk=chunk,
        )
    except InputError:
        if not (folder / "plan.json").exists():  # nothing has been computed yet
            shutil.rmtree(folder)
        raise
    budget = settings["batch_tokens"]
    options: dict[str, Any] = {"layer": list(units), "max_new_tokens": max_new_tokens, "batch_tokens": budget}
    answer = partial(answer_prompts, folder, tokenizer, chosen, **options)
    _run(model, answer, folder, "answers", plan["groups"], workers)
    _keep_answers(folder, plan["groups"], reading, kept if generates else None)
    _run(model, partial(project_rows, folder, units, budget), folder, "values", plan["chunks"], workers)
    named = vector_keys([vector.trait for vector in chosen], list(units))
    keys = list(named)
    ranked = None if reference is None else Path(str(reference))
    return merge(folder, out, keys=keys, reading=reading, plan=plan, settings={**settings, **judged}, reference=ranked)


def _check(
    model: Model,
    baseline: str,
    on_error: str,
    threshold: float | str | None,
    limit: int | None,
    new_tokens: int,
    chunk: int,
    workers: int,
) -> None:
    if model.config.is_encoder_decoder:
        raise InputError("this is an encoder-decoder model: samples are flagged with decoder-only language models")
    if edits_are_active():
        raise InputError("flag reads the plain model: call it outside of steer, ablate, cap, floor and monitor")
    if baseline not in BASELINES and not Path(baseline).exists():
        raise InputError(f"baseline is {baseline!r}: give one of {', '.join(BASELINES)}, or a file of answers")
    if on_error not in ("stop", "skip"):
        raise InputError(f"on_error is {on_error!r}: give 'stop' or 'skip'")
    if isinstance(threshold, str):
        number = threshold[1:]
        if threshold[:1] != "p" or not number.replace(".", "", 1).isdigit() or float(number) > 100:
            raise InputError(f"threshold is {threshold!r}: give a number, or a percentile such as 'p95'")
    if limit is not None and new_tokens >= limit // 2:
        raise InputError(
            f"max_new_tokens is {new_tokens}, and the context has {limit} tokens: give less than {limit // 2}"
        )
    if min(chunk, workers) < 1:
        raise InputError(f"chunk is {chunk} and workers is {workers}: give 1 or more")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def answer_prompts(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[PersonaVector],
    model: Model,
    number: int,
    *,
    layer: Sequence[int],
    max_new_tokens: int,
    batch_tokens: int,
) -> None:
    """Answer one part of the prompts, and write the answers with their mean projections; known ones are only read."""
    todo = read_table(part(folder, "prompts", number))
    prompts, answers = todo["prompt_ids"], todo["answer_ids"]
    open_ones = [i for i, answer in enumerate(answers) if answer is None]
    known = [i for i, answer in enumerate(answers) if answer is not None]
    units = unit_directions(model, vectors, layer)
    values = torch.full((len(prompts), len(vectors) * len(units)), torch.nan)
    if known:
        rows = [(prompts[i], answers[i]) for i in known]
        values[known] = answer_means(model, rows, units, batch_tokens)[0]
    for batch in length_batches([prompts[i] for i in open_ones], max_new_tokens, 8 * batch_tokens):
        chosen = [open_ones[i] for i in batch]
        asked = [prompts[i] for i in chosen]
        with monitor(model, vectors, layer=layer, stops=stop_tokens(model, tokenizer)) as trace:
            # the last token sampled is never read, so one more is
            made = generate_tokens(model, tokenizer, asked, max_new_tokens=max_new_tokens + 1, temperature=0.0)
        values[chosen] = torch.stack(list(trace.mean.values()), dim=1)
        for i, (ids, _) in zip(chosen, made):
            answers[i] = ids[:max_new_tokens]
    columns = {"key": todo["key"], "answer_ids": answers, "values": values.tolist()}
    write_table(part(folder, "answers", number), columns)


def project_rows(
    folder: Path, units: dict[int, Float[Tensor, "vector hidden"]], batch_tokens: int, model: Model, number: int
) -> None:
    """Read one part of the samples, and write their mean projections, and those of the prompts' last tokens."""
    rows = read_table(part(folder, "rows", number))
    read = answer_means(model, list(zip(rows["prompt_ids"], rows["answer_ids"])), units, batch_tokens)
    write_table(part(folder, "values", number), dict(zip(("projection", "prompt_last"), (v.tolist() for v in read))))


def answer_means(
    model: Model, rows: Sequence[Any], units: dict[int, Tensor], batch_tokens: int
) -> tuple[Float[Tensor, "row key"], Float[Tensor, "row key"]]:
    """Return the mean over each answer's tokens, nan for an empty one, and the values at each prompt's last token."""
    tokens = token_projections(model, rows, units, batch_tokens=batch_tokens)
    ends = [len(prompt) for prompt, _ in rows]
    means = [values[end:].mean(dim=0) for values, end in zip(tokens, ends)]
    return torch.stack(means), torch.stack([values[end - 1] for values, end in zip(tokens, ends)])


def _run(model: Model, work: Callable[[Model, int], None], folder: Path, kind: str, count: int, workers: int) -> None:
    """Do the parts that are not there yet, here or in Ray actors."""
    todo = [number for number in range(count) if not part(folder, kind, number).exists()]
    with tqdm(total=count, initial=count - len(todo), desc=f"{kind} of samples", unit="part") as bar:
        if workers > 1 and todo:
            from persona_vectors.flagging.actors import run_in_actors

            run_in_actors(model, work, todo, lambda number: part(folder, kind, number), workers, bar.update)
        else:
            for number in todo:
                work(model, number)
                bar.update()


def _keep_answers(folder: Path, groups: int, reading: str, cache: Path | None) -> None:
    """Put the answers where the merge finds them, and into the cache."""
    for path in [folder / "baselines.sqlite", *([] if cache is None else [cache])]:
        with closing(Baselines(path)) as store:
            for number in range(groups):
                found = read_table(part(folder, "answers", number))
                store.add(reading, found["key"], found["answer_ids"], found["values"])
