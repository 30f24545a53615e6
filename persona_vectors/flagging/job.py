"""A flagging run: what it was asked for, and the steps that it takes."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.checks import check_settings
from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.data.samples import Source, import_pyarrow, read_samples
from persona_vectors.flagging.merge import merge
from persona_vectors.flagging.parts import Flags, is_flags, part, read_header, read_json, write_json
from persona_vectors.flagging.plan import check_digest, make_plan, source_name
from persona_vectors.flagging.work import answer_prompts, keep_answers, project_rows
from persona_vectors.model.blocks import Layer, Model
from persona_vectors.model.hooks import edits_are_active
from persona_vectors.model.identity import fingerprint, identity
from persona_vectors.model.loading import cache_dir
from persona_vectors.model.prompts import batch_tokens_for
from persona_vectors.vectors.directions import unit_directions, vector_keys
from persona_vectors.vectors.vector import PersonaVector

BASELINES = ("generate", "prompt_last", "none")


@dataclass(frozen=True)
class Job:
    """What `flag` was asked for, and the steps that it takes."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    data: Source
    vectors: list[PersonaVector]
    layer: Layer
    out: Path
    columns: tuple[str, str] | None
    split: str
    turns: str
    on_error: str
    max_length: int | None
    baseline: str
    answers: Source | None
    max_new_tokens: int
    skip_reasoning: bool
    reference: Source | None
    threshold: float | None
    percentile: float | None
    cache: str | Path | None
    batch_tokens: int | None
    chunk: int
    workers: int

    @property
    def folder(self) -> Path:
        return Path(f"{self.out}.parts")

    @property
    def generates(self) -> bool:
        return self.answers is None and self.baseline == "generate"

    @cached_property
    def limit(self) -> int | None:
        """The most tokens of a sample."""
        config = self.model.config.get_text_config(decoder=True)
        return self.max_length or getattr(config, "max_position_embeddings", None)

    @cached_property
    def units(self) -> dict[int, Float[Tensor, "vector hidden"]]:
        return unit_directions(self.model, self.vectors, self.layer)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return {
            **identity(self.model, self.tokenizer),
            "weights": fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "vectors": {vector.trait: _hash(vector.directions[list(self.units)].tolist()) for vector in self.vectors},
            "layers": list(self.units),
            "baseline": self.baseline if self.answers is None else source_name(self.answers),
            "max_new_tokens": self.max_new_tokens if self.generates else None,
            "skip_reasoning": self.skip_reasoning or None,
            "data": source_name(self.data),
            "columns": None if self.columns is None else list(self.columns),
            "split": self.split,
            "turns": self.turns,
            "on_error": self.on_error,
            "max_length": self.limit,
            "batch_tokens": self.batch_tokens or batch_tokens_for(self.model),
            "chunk": self.chunk,
        }

    @property
    def judged(self) -> dict[str, Any]:
        """What the percentiles and flags depend on besides."""
        default = 95.0 if self.reference is not None and self.threshold is None else None
        return {
            "reference": None if self.reference is None else source_name(self.reference),
            "threshold": self.threshold,
            "percentile": default if self.percentile is None else self.percentile,
        }

    def flags(self) -> Flags:
        """Return the finished file's, or make it."""
        import_pyarrow()
        self.check()
        keys = vector_keys([vector.trait for vector in self.vectors], list(self.units))  # refuses what does not fit
        if self.out.exists():
            header = read_header(self.out)
            check_settings(self.out, header["settings"], {**self.settings, **self.judged})
            check_digest(self.read(self.data), header["digest"], self.out)
            return Flags.load(self.out)
        if self.folder.exists():
            check_settings(self.folder, read_json(self.folder / "settings.json"), self.settings)
        reference = self.ranked()
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_json(self.folder / "settings.json", self.settings)
        plan, reading = self.plan(), self.reading
        self.compute(plan, reading)
        whole = {**self.settings, **self.judged}
        return merge(self.folder, self.out, keys=keys, reading=reading, plan=plan, settings=whole, reference=reference)

    @property
    def reading(self) -> str:
        """What a base answer's kept values depend on, besides the answer."""
        thoughts = [True] if self.skip_reasoning else []
        return _hash([self.settings["vectors"], self.settings["layers"], *thoughts])

    def read(self, source: Source) -> Any:
        return read_samples(source, columns=self.columns, split=self.split, turns=self.turns)

    def ranked(self) -> Path | None:
        """Return the flags file that percentiles are taken among, made first where neutral samples were given."""
        if self.reference is None:
            return None
        path = self.reference
        if not is_flags(path):
            own = Path(f"{self.out}.reference.parquet")
            path = replace(self, data=path, out=own, reference=None, threshold=None, percentile=None).flags().path
        path = Path(str(path))
        theirs, same = (
            read_header(path)["settings"],
            ("weights", "vectors", "layers", "baseline", "max_new_tokens", "skip_reasoning"),
        )
        check_settings(path, theirs, {name: self.settings[name] for name in same})
        return path

    @property
    def kept(self) -> Path:
        return Path(self.cache) if self.cache else cache_dir() / "baselines.sqlite"

    def plan(self) -> dict[str, Any]:
        """Read all samples into the folder's parts."""
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            return make_plan(
                self.tokenizer,
                self.read(self.data),
                self.folder,
                stop=self.on_error == "stop",
                limit=self.limit,
                new_tokens=self.max_new_tokens + 1 if self.generates else 0,
                answers=None if self.answers is None else self.read(self.answers),
                cache=self.kept,
                namespace=_hash([self.settings[n] for n in ("weights", "dtype", "config_hash", "max_new_tokens")]),
                reading=self.reading,
                chunk=self.chunk,
            )
        except InputError:
            if not (self.folder / "plan.json").exists():  # nothing has been computed yet
                shutil.rmtree(self.folder)
            raise

    def compute(self, plan: dict[str, Any], reading: str) -> None:
        """Answer the prompts that lack an answer, and project all samples."""
        budget = self.settings["batch_tokens"]
        shared: dict[str, Any] = {"batch_tokens": budget, "skip_reasoning": self.skip_reasoning}
        options: dict[str, Any] = {"layer": list(self.units), "max_new_tokens": self.max_new_tokens, **shared}
        answer = partial(answer_prompts, self.folder, self.tokenizer, self.vectors, **options)
        self.work(answer, "answers", plan["groups"])
        keep_answers(self.folder, plan["groups"], reading, self.kept if self.generates else None)
        self.work(partial(project_rows, self.folder, self.tokenizer, self.units, **shared), "values", plan["chunks"])

    def work(self, do: Callable[[Model, int], None], kind: str, count: int) -> None:
        """Do the parts that are not there yet, here or in Ray actors; the bar counts samples."""
        todo = [number for number in range(count) if not part(self.folder, kind, number).exists()]
        desc = {"answers": "base answers", "values": "projections"}[kind]
        done = (count - len(todo)) * self.chunk
        with bar(total=count * self.chunk, initial=done, desc=desc, unit="sample") as shown:
            if self.workers > 1 and todo:
                from persona_vectors.flagging.actors import run_in_actors

                where = partial(part, self.folder, kind)
                run_in_actors(self.model, do, todo, where, self.workers, lambda n: shown.update(n * self.chunk))
            else:
                for number in todo:
                    do(self.model, number)
                    shown.update(self.chunk)

    def check(self) -> None:
        """Raise InputError for what cannot be."""
        if self.model.config.is_encoder_decoder:
            raise InputError("this is an encoder-decoder model: samples are flagged with decoder-only language models")
        if edits_are_active(self.model):
            raise InputError("flag reads the plain model: call it outside of steer, ablate, cap, floor and monitor")
        _check_words(self.baseline, self.answers, self.on_error)
        if self.threshold is not None and self.percentile is not None:
            raise InputError("threshold and percentile both say what is flagged: give one of them")
        if self.percentile is not None and not 0 <= self.percentile <= 100:
            raise InputError(f"percentile is {self.percentile:g}: give a number from 0 to 100")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}: give 1 or more, or baseline='prompt_last'")
        if self.generates and self.limit is not None and self.max_new_tokens >= self.limit // 2:
            raise InputError(
                f"max_new_tokens is {self.max_new_tokens}, and the context has {self.limit} tokens: "
                f"give less than {self.limit // 2}"
            )
        if min(self.chunk, self.workers) < 1:
            raise InputError(f"chunk is {self.chunk} and workers is {self.workers}: give 1 or more")


def _check_words(baseline: str, answers: Source | None, on_error: str) -> None:
    if baseline not in BASELINES:
        raise InputError(f"baseline is {baseline!r}: give one of {', '.join(BASELINES)}, or answers= of your own")
    if isinstance(answers, str | Path) and not Path(answers).exists():
        raise InputError(f"no file of answers {str(answers)!r}: give one with an answer of the model to each prompt")
    if on_error not in ("stop", "skip"):
        raise InputError(f"on_error is {on_error!r}: give 'stop' or 'skip'")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
