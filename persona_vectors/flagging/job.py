"""A flagging run: what it was asked for, and the steps that it takes."""

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
from persona_vectors.data.files import import_pyarrow
from persona_vectors.data.progress import bar, counted_in
from persona_vectors.data.samples import Source, read_samples
from persona_vectors.evaluation.served import Generate
from persona_vectors.flagging.checks import check
from persona_vectors.flagging.merge import merge
from persona_vectors.flagging.parts import Flags, count_rows, is_flags, part, read_header, read_json, write_json
from persona_vectors.flagging.plan import check_digest, make_plan, source_name
from persona_vectors.flagging.settings import hash_of_json, judged_by, settings_of
from persona_vectors.flagging.work import answer_prompts, keep_answers, project_rows
from persona_vectors.model.actors import Elsewhere, map_in_actors
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_shape
from persona_vectors.model.dense import cache_dir
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.moments import neutral_moments
from persona_vectors.vectors.vector import PersonaVector

PLAIN_FACTS = "answers on plain facts"
MOMENTS_OF = 512
"""How many of the reference samples the random directions have the covariance of, at most."""


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
    score: str
    baseline: str
    answers: Source | None
    max_new_tokens: int
    positions: str
    reference: Source | None
    threshold: float | None
    percentile: float | None
    controls: int
    labels: str | None
    cache: str | Path | None
    batch_tokens: int | None
    chunk: int
    workers: int
    gpus_per_worker: float | None
    generate: Generate | None

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
    def layers(self) -> list[int]:
        return chosen_layers(self.layer, model_shape(self.model)[0])

    @cached_property
    def read_vectors(self) -> list[PersonaVector]:
        """What is read of every sample: the vectors, and the random directions that they are held against."""
        if not self.controls:
            return self.vectors
        source = None if self.controls_reference == PLAIN_FACTS else self.reference
        options: dict[str, Any] = {"layer": self.layers, "columns": self.columns, "split": self.split}
        options |= {"max_length": self.max_length, "batch_tokens": self.batch_tokens, "first": MOMENTS_OF}
        known = self.ask(neutral_moments, self.tokenizer, source, **options)
        nulls = known.random_vectors(self.vectors[0], count=self.controls)
        return self.vectors + [replace(null, trait=f"null {i}") for i, null in enumerate(nulls)]

    def ask(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Return function(model, ...), called where the model is."""
        if isinstance(self.model, Elsewhere):
            return self.model.ask(function, *given, **options)
        return function(self.model, *given, **options)

    @property
    def controls_reference(self) -> str:
        """What the random directions have the covariance of."""
        given = self.reference is not None and not is_flags(self.reference)
        return source_name(self.reference) if given and self.reference is not None else PLAIN_FACTS

    @cached_property
    def units(self) -> dict[int, Float[Tensor, "vector hidden"]]:
        return unit_directions(self.model, self.read_vectors, self.layer)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the numbers depend on."""
        return settings_of(self)

    def flags(self) -> Flags:
        """Return the finished file's, or make it."""
        import_pyarrow()
        check(self)
        unit_directions(self.model, self.vectors, self.layer)  # refuses what does not fit
        if self.out.exists():
            header = read_header(self.out)
            check_settings(self.out, header["settings"], {**self.settings, **judged_by(self)})
            check_digest(self.read(self.data, self.labels), header["digest"], self.out)
            return Flags.load(self.out)
        if self.folder.exists():
            check_settings(self.folder, read_json(self.folder / "settings.json"), self.settings)
        reference = self.ranked()
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_json(self.folder / "settings.json", self.settings)
        plan, reading = self.plan(), self.reading
        self.compute(plan, reading)
        whole = {**self.settings, **judged_by(self)}
        return merge(self.folder, self.out, reading=reading, plan=plan, settings=whole, reference=reference)

    @property
    def reading(self) -> str:
        """What a base answer's kept values depend on, besides the answer."""
        names = ("vectors", "layers", "positions", "controls", "controls_reference")
        return hash_of_json([self.settings[name] for name in names])

    def read(self, source: Source, labels: str | None = None) -> Any:
        return read_samples(source, columns=self.columns, split=self.split, turns=self.turns, labels=labels)

    def ranked(self) -> Path | None:
        """Return the flags file that percentiles are taken among, made first where neutral samples were given."""
        if self.reference is None:
            return None
        path = self.reference
        if not is_flags(path):
            own = Path(f"{self.out}.reference.parquet")
            plain: dict[str, Any] = {"reference": None, "threshold": None, "percentile": None}
            plain |= {"controls": 0, "labels": None}
            path = replace(self, data=path, out=own, **plain).flags().path
        path = Path(str(path))
        same = ("weights", "vectors", "layers", "score", "baseline", "max_new_tokens", "generate", "positions")
        check_settings(path, read_header(path)["settings"], {name: self.settings[name] for name in same})
        return path

    @property
    def kept(self) -> Path:
        return Path(self.cache) if self.cache else cache_dir() / "baselines.sqlite"

    def plan(self) -> dict[str, Any]:
        """Read all samples into the folder's parts."""
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        names = ("weights", "dtype", "config_hash", "max_new_tokens", "generate")[: 4 + (self.generate is not None)]
        try:
            return make_plan(
                self.tokenizer,
                self.read(self.data, self.labels),
                self.folder,
                stop=self.on_error == "stop",
                limit=self.limit,
                new_tokens=self.max_new_tokens + 1 if self.generates else 0,
                answers=None if self.answers is None else self.read(self.answers),
                cache=self.kept,
                namespace=hash_of_json([self.settings[name] for name in names]),
                reading=self.reading,
                chunk=self.chunk,
                labels=self.labels,
            )
        except InputError:
            if not (self.folder / "plan.json").exists():  # nothing has been computed yet
                shutil.rmtree(self.folder)
            raise

    def compute(self, plan: dict[str, Any], reading: str) -> None:
        """Answer the prompts that lack an answer, and project all samples."""
        budget = self.settings["batch_tokens"]
        shared: dict[str, Any] = {"batch_tokens": budget, "positions": self.positions}
        options: dict[str, Any] = {"layer": self.layers, "max_new_tokens": self.max_new_tokens, **shared}
        options["generate"] = self.generate
        answer = partial(answer_prompts, self.folder, self.tokenizer, self.read_vectors, **options)
        project = partial(project_rows, self.folder, self.tokenizer, self.units, score=self.score, **shared)
        self.work({"answers": (answer, plan["groups"]), "values": (project, plan["chunks"])})
        keep_answers(self.folder, plan["groups"], reading, self.kept if self.generates else None)

    def work(self, asked: dict[str, tuple[Callable[[Model, int], None], int]]) -> None:
        """Do the parts that are not there yet, here or in one pool of Ray actors; the bar counts samples one by one."""
        where, given = partial(part, self.folder), {"answers": "prompts", "values": "rows"}
        parts = [(kind, number) for kind, (_, count) in asked.items() for number in range(count)]
        sizes = {f"{kind} {number}": count_rows(where(given[kind], number)) for kind, number in parts}
        missing = [f"{kind} {number}" for kind, number in parts if not where(kind, number).exists()]
        do = partial(_do, {kind: work for kind, (work, _) in asked.items()})
        total, left = sum(sizes.values()), sum(sizes[name] for name in missing)
        desc = "base answers and projections" if asked["answers"][1] else "projections"
        with bar(total=total, initial=total - left, desc=desc, unit="sample") as shown:
            if missing and (isinstance(self.model, Elsewhere) or self.workers > 1):
                pool: dict[str, Any] = {"workers": self.workers, "gpus_per_worker": self.gpus_per_worker}
                for name in map_in_actors(self.model, do, missing, **pool):
                    shown.update(sizes[name])
            else:
                for name in missing:
                    left -= sizes[name]
                    with counted_in(shown):
                        do(self.model, name)
                    shown.update(total - left - shown.n)
        lost = [where(*item) for item in parts if not where(*item).exists()]
        if lost:
            raise InputError(f"part {lost[0]} was not written here: put `out` on a disk that all workers share")


def _do(work: dict[str, Callable[[Model, int], None]], model: Model, asked: str) -> str:
    """Do a part, whole or not at all, in whatever actor."""
    kind, number = asked.split()
    work[kind](model, int(number))
    return asked
