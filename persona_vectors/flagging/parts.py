"""The files of a flagging run: parts that a killed run continues, baselines kept by prompt, and the merged Parquet."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path, import_pyarrow
from persona_vectors.data.notebook import html_table
from persona_vectors.flagging.results import Best, Summary
from persona_vectors.vectors.uses import Use

FORMAT = 1
HEADER = b"persona_vectors_flags"


@dataclass(frozen=True)
class Flags:
    """What a flagging run found; the rows are in the Parquet file `path`."""

    path: Path
    settings: dict[str, Any]
    counts: dict[str, int]
    """samples, truncated, empty, empty_baselines, and skipped (records that are no samples); with `labels` also
    labelled, and labelled_true."""
    summary: dict[str, Summary]
    best: dict[str, dict[str, Best]] = field(default_factory=dict)
    """With several layers and random directions, each vector's best layer by "effect", its mean difference in standard
    deviations, and by "auroc" where there are labels."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in self.counts.items())
        part = self.settings.get("positions")
        lines = [f"Flags({self.path}: {counts}{f'; of the {part} alone' if part else ''})"]
        for key, found in self.summary.items():
            enough = "no number of samples" if found.enough is None else f"{found.enough:,} samples"
            flagged = "" if found.threshold is None else f", {found.flagged:,} at or above {found.threshold:+.3f}"
            error = 1.96 * found.standard_error
            lines.append(f"  {key}: {found.mean:+.3f} +- {error:.3f} (95 %; {enough} show its sign){flagged}")
            if found.beaten_isotropic is not None:
                lines.append(
                    f"    larger, in standard deviations, than {found.beaten_isotropic:.0%} of isotropic random "
                    f"directions and {found.beaten_covariance:.0%} with the covariance of "
                    f"{self.settings['controls_reference']}"
                )
            lines += [f"    labels: {found.labelled}"] if found.labelled else []
        return "\n".join([*lines, *[f"  {line}" for line in self.best_lines()]])

    def _repr_html_(self) -> str:
        """Show what was found of each vector in a notebook."""
        return html_table(repr(self).splitlines()[0], self.rows())

    def best_lines(self) -> list[str]:
        """Return a line for each vector's best layer, by effect and by AUROC."""
        lines = []
        for trait, scores in self.best.items():
            for name, one in scores.items():
                lines.append(f"{trait}: {name} {one.value:{'+.2f' if name == 'effect' else '.2f'}} {one}")
        return lines

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a vector: its summary over the dataset."""
        return [{"vector": key, **found.columns()} for key, found in self.summary.items()]

    def uses(self, *, source: str = "pv.flag") -> dict[str, Use]:
        """Return what the labels say of each vector's best layer, by trait: see `PersonaVector.with_use`.

        That is a use to flag with; without a baseline it is one to monitor with. Raises InputError without labels.
        """
        layers, baseline, found = self.settings["layers"], self.settings["baseline"], {}
        against = "" if baseline == "none" else f", less the baseline {baseline}"
        if not self.settings["labels"]:
            raise InputError("flags without labels= say nothing of a vector's use: name a column of truth values")
        measure = f"AUROC of the samples labelled {self.settings['labels']!r} in {self.settings['data']}{against}"
        for trait in self.settings["vectors"]:
            best = self.best.get(trait, {}).get("auroc")
            if best is None and len(layers) > 1:
                raise InputError("the best of several layers needs random directions: give controls=, or one layer")
            told = self.summary[trait if best is None else f"{trait}@{best.layer}"].labelled
            assert told is not None
            passes = best is None or min(best.beaten_isotropic, best.beaten_covariance) >= 0.95
            found[trait] = Use(
                "monitor" if baseline == "none" else "flag",
                layers[0] if best is None else best.layer,
                measure=measure,
                effect=told.auroc,
                null=None if told.null is None else 0.5 + max(told.null),
                null_of="the 95th percentile of random directions at that layer",
                evidence=told.evidence and told.auroc.mean > 0.5 and passes,
                model=self.settings["model"],
                source=source,
            )
        return found

    def to_pandas(self) -> Any:
        """Return the samples, a row each, as a pandas DataFrame; see `flag` for the columns."""
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas needs pandas: pip install pandas (or read .path with pyarrow)") from None
        return pandas.read_parquet(self.path)

    @classmethod
    def load(cls, path: str | Path) -> "Flags":
        """Read what a finished flags file says of itself; raises InputError where it is none of ours."""
        header = read_header(Path(path))
        summary = TypeAdapter(dict[str, Summary]).validate_python(header["summary"])
        best = TypeAdapter(dict[str, dict[str, Best]]).validate_python(header.get("best", {}))
        return cls(Path(path), header["settings"], header["counts"], summary, best)


def is_flags(source: Any) -> bool:
    """Say whether a source of samples is instead a flags file."""
    if not isinstance(source, (str, Path)) or Path(source).suffix != ".parquet" or not Path(source).is_file():
        return False
    return HEADER in (import_pyarrow()[1].read_schema(source).metadata or {})


def read_header(path: Path) -> dict[str, Any]:
    pa, parquet = import_pyarrow()
    if not path.is_file():
        raise InputError(f"no flags file {path}: make one with flag")
    try:
        header = json.loads((parquet.read_schema(path).metadata or {})[HEADER])
    except (KeyError, ValueError, pa.ArrowInvalid):
        raise InputError(f"{path} was not written by flag: give another path, or remove it") from None
    if header["format"] != FORMAT:
        raise InputError(f"{path} has format version {header['format']}, and this release reads {FORMAT}: flag again")
    return header


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write a part, whole or not at all; arrays [row, width] as lists of a fixed size."""
    pa, parquet = import_pyarrow()
    columns = {name: fixed(values) if isinstance(values, np.ndarray) else values for name, values in columns.items()}
    with atomic_path(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)


def fixed(values: np.ndarray) -> Any:
    """Return an array [row, width] as Arrow's lists of a fixed size."""
    pa, _ = import_pyarrow()
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), pa.float32()), values.shape[1])


def read_table(path: Path) -> dict[str, Any]:
    """Return a part's columns as lists; lists of a fixed size as arrays [row, width]."""
    pa, parquet = import_pyarrow()
    table, found = parquet.read_table(path).combine_chunks(), {}
    for name, kind in zip(table.schema.names, table.schema.types):
        wide = pa.types.is_fixed_size_list(kind)
        values = table.column(name).combine_chunks()
        found[name] = values.flatten().to_numpy().reshape(-1, kind.list_size) if wide else values.to_pylist()
    return found


def count_rows(path: Path) -> int:
    """Return how many rows a part has, from its footer."""
    return int(import_pyarrow()[1].read_metadata(path).num_rows)


def part(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:07d}.parquet"


def flag_batches(path: Path, columns: Sequence[str]) -> Iterator[dict[str, list]]:
    """Yield a flags file's rows in batches, as lists by column."""
    _, parquet = import_pyarrow()
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=4096, columns=list(columns)):
            yield batch.to_pydict()
