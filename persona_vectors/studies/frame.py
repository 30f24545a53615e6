"""What studies share: what each is given, and the table and the page that it makes."""

import hashlib
import importlib
import inspect
import json
import math
import pkgutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path, writing
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.tables import Table
from persona_vectors.data.texts import DATA
from persona_vectors.model.blocks import Model, model_name, model_shape
from persona_vectors.model.identity import hash_of, identity
from persona_vectors.model.thoughts import edit_positions
from persona_vectors.steering.add import RowEdit
from persona_vectors.vectors.controls import random_vectors
from persona_vectors.vectors.geometry import dictionary
from persona_vectors.vectors.vector import PersonaVector

NAMES = tuple(each.name for each in pkgutil.iter_modules([str(Path(__file__).parent)]) if each.name != "frame")
"""The studies: each is the module of that name, whose docstring is the text of its page and whose `lines` its table."""


@dataclass(frozen=True)
class Line:
    """One number of a study's table, beside what chance gives."""

    what: str
    value: Interval
    null: float = math.nan
    null_of: str = ""


def shipped(name: str) -> Any:
    """Return what a study's file holds: what is asked of models."""
    return json.loads((DATA / "studies" / f"{name}.json").read_text(encoding="utf-8"))


def over(values: Iterable[float]) -> Interval:
    """Return the mean over questions, topics or respondents with its interval."""
    return mean_interval([[value] for value in values])


def upper(null: Any, what: str) -> tuple[float, str]:
    """Return the 97.5th percentile of what chance gives and what it is of: the last fields of a line."""
    return float(np.quantile(null, 0.975)), f"97.5th percentile of {what}"


@dataclass(frozen=True)
class Study(Table):
    """What a study found on one model."""

    name: str
    model: str
    command: str
    minutes: float
    """Of the processor's time, over all the runs that it took."""
    lines: tuple[Line, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a line; an interval is three columns: value, value_low, value_high."""
        return [
            {"what": line.what, **line.value.columns("value"), "null": line.null, "null_of": line.null_of}
            for line in self.lines
        ]

    def page(self) -> str:
        """Return the study's text, command and table as Markdown."""
        title, _, text = str(inspect.getdoc(module_of(self.name))).partition("\n")
        made = f"`{self.command}`: {self.minutes:.1f} minutes of processor time on {self.model}."
        table = ["| | value [95 %] | null | of |", "|---|---|---|---|"]
        for line in self.lines:
            null = "" if math.isnan(line.null) else f"{line.null:.3f}"
            value = f"{line.value.mean:.3f}" if math.isnan(line.value.low) else f"{line.value:.3f}"
            what = line.what.replace("|", r"\|")
            table.append(f"| {what} | {value} | {null} | {line.null_of} |")
        return "\n".join([f"# {title.rstrip('.')}", text, "", made, "", *table, ""])


@dataclass(frozen=True)
class Given:
    """What a study is given."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    vectors: tuple[PersonaVector, ...]
    size: int
    """How much of everything: questions, draws or controls, as the study says. 1 is the least."""
    seed: int
    done: Ledger
    features: Float[Tensor, "feature hidden"] | None = None
    """An autoencoder's decoder rows, where the user gives them."""

    @cached_property
    def edits(self) -> list[RowEdit]:
        """Each vector's edit, as its file recommends it."""
        uses = [vector.recommended("steer") for vector in self.vectors]
        where = [edit_positions(self.tokenizer, use.positions) for use in uses]
        return [RowEdit(v, u.layer, u.coef or 1.0, p) for v, u, p in zip(self.vectors, uses, where)]

    def random_edits(self, edit: RowEdit, count: int) -> list[RowEdit]:
        """Return edits like one with random vectors of its norm, half of them with the covariance of activations."""
        noise = random_vectors(self.model, self.tokenizer, edit.vector, layer=edit.layer, count=count, seed=self.seed)
        return [edit._replace(vector=vector) for vector in noise]

    def once(self, key: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `make` gives for the arguments, plain values, or what it gave when an earlier run was there."""
        if key not in self.done.found:
            begun = time.process_time()
            value = json.loads(json.dumps(make(*arguments)))
            self.done.add([{"key": key, "value": value, "seconds": time.process_time() - begun}])
        return self.done.found[key]["value"]


def module_of(name: str, features: str | Path | None = None) -> Any:
    """Return a study's module; raises InputError, with all names, where there is none, or where it has no features."""
    if name not in NAMES:
        raise InputError(f"no study {name!r}: give one of {', '.join(NAMES)}")
    if features and name != "persona_features":
        raise InputError(f"--features is for persona_features: leave it out for {name}")
    return importlib.import_module(f"persona_vectors.studies.{name}")


def run_study(
    name: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Sequence[PersonaVector],
    *,
    size: int,
    seed: int = 0,
    features: str | Path | None = None,
    out: str | Path | None = None,
    command: str = "",
) -> Study:
    """Run a study; with a folder `out` it goes on where an earlier run stopped, and writes NAME.json and NAME.md there.

    `features` is an autoencoder's file, see `dictionary`. Raises InputError for a name that there is none of, and for
    vectors too few or without a recommended use.
    """
    module = module_of(name, features)
    if len(vectors) < module.VECTORS:
        raise InputError(f"{name} needs {module.VECTORS} vectors, and {len(vectors)} are given: give --vector for each")
    directions = hash_of([vector.directions.tolist() for vector in vectors])
    rows = None if features is None else dictionary(features, model_shape(model)[1])
    known = {} if features is None else {"features": hashlib.sha256(Path(features).read_bytes()).hexdigest()}
    settings = {"study": name, **identity(model, tokenizer), "vectors": directions, "size": size, "seed": seed, **known}
    ledger = None if out is None else Path(out) / f"{name}.jsonl"
    with writing(ledger):
        given = Given(model, tokenizer, tuple(vectors), size, seed, Ledger(ledger, settings), rows)
        lines = tuple(module.lines(given))
        seconds = sum(entry["seconds"] for entry in given.done.found.values())
        study = Study(name, model_name(model), command, seconds / 60, lines)
        if out is not None:
            study.save(Path(out) / f"{name}.json")
            with atomic_path(Path(out) / f"{name}.md") as temporary:
                temporary.write_text(study.page(), encoding="utf-8")
    return study
