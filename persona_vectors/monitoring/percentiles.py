"""Where projections lie among those of neutral answers: a calibration's file, and percentiles by it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path

FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """Percentiles of a vector's projections over the answer tokens of neutral prompts: what caps and alarms need."""

    trait: str
    model: str
    layers: tuple[int, ...]
    percentiles: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]
    """[layer][percentile], projections on v/|v|."""
    prompts: int
    """How many questions were answered."""
    tokens: int
    """How many answer tokens they were taken over."""
    max_new_tokens: int
    temperature: float
    seed: int

    def at(self, percentile: float) -> dict[int, float]:
        """Return the projection at a percentile for each layer, as `cap` and `floor` take it."""
        if percentile not in self.percentiles:
            known = ", ".join(f"{p:g}" for p in self.percentiles)
            raise InputError(f"percentile {percentile:g} was not calibrated: this file has {known}; calibrate again")
        column = self.percentiles.index(percentile)
        return {layer: row[column] for layer, row in zip(self.layers, self.values)}

    def percentile(self, values: Float[Tensor, "*any"], *, layer: int) -> Float[Tensor, "*any"]:
        """Return the percentile of projections at a layer, interpolated between those that were calibrated.

        What lies beyond them has the lowest or the highest of them, by default 1 and 99. nan stays nan.
        """
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise InputError(f"{self.trait!r} was not calibrated at layer {layer}: this one has {known}; calibrate it")
        row = self.values[self.layers.index(layer)]
        return torch.as_tensor(np.interp(values.double().numpy(), row, self.percentiles), dtype=torch.float32)

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all: by custom beside the vector, as optimistic.calibration.json."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"format_version": FORMAT, **asdict(self)}, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a file that `save` wrote; raises InputError where it is missing, broken or of another version."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no calibration file {path}: make one with calibrate")
        try:
            found = json.loads(path.read_text("utf-8"))
            version = found.pop("format_version", None)
            if version != FORMAT:
                raise InputError(
                    f"{path} has format version {version}, and this release reads {FORMAT}: calibrate again"
                )
            listed = {name: tuple(found[name]) for name in ("layers", "percentiles")}
            values = tuple(tuple(map(float, row)) for row in found["values"])
            loaded = cls(**{**{f.name: found[f.name] for f in fields(cls)}, **listed, "values": values})
            if [len(row) for row in values] != [len(loaded.percentiles)] * len(loaded.layers):
                raise InputError(f"{path} has not one value for each layer and percentile: calibrate again")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is no calibration file ({error!r}): calibrate again") from None
        return loaded


def calibration_of(trait: str, calibrations: Calibration | Sequence[Calibration]) -> Calibration:
    """Return the calibration of a vector's trait; raises InputError where there is none."""
    given = [calibrations] if isinstance(calibrations, Calibration) else list(calibrations)
    for calibration in given:
        if calibration.trait == trait:
            return calibration
    known = ", ".join(calibration.trait for calibration in given)
    raise InputError(f"no calibration of {trait!r}: there is {known or 'none'}; calibrate it too")
