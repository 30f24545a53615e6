"""Calibration: percentiles of a vector's projections over neutral prompts, for caps, floors and alarms."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_name
from persona_vectors.model.generation import generate_batches, stop_tokens
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.monitoring.trace import monitor
from persona_vectors.vectors.vector import PersonaVector

FORMAT = 1
PERCENTILES = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)


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


def calibrate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    questions: Sequence[str],
    *,
    layer: Layer,
    percentiles: Sequence[float] = PERCENTILES,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Calibration:
    """Answer neutral questions, and return percentiles of the answer tokens' projections at each layer.

    They are read while the answers are generated, on v/|v|, in the residual stream's units.

    Raises InputError where there is no question, a percentile is not between 0 and 100, or no answer has a token.
    """
    if not questions or not percentiles or not all(0 <= p <= 100 for p in percentiles):
        raise InputError("calibrate needs one question or more, and percentiles from 0 to 100")
    stops, found = stop_tokens(model, tokenizer), []
    with bar(desc=f"{vector.trait}: calibration", unit="answers", total=len(questions)) as shown:
        for batch in generate_batches(
            model,
            tokenizer,
            [encode(tokenizer, chat_prompt(tokenizer, question)) for question in questions],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_tokens=batch_tokens,
            reading=True,
            during=lambda _: monitor(model, vector, layer=layer, stops=stops),
        ):
            readings = batch.read.last
            found.append(readings.values[:, readings.answer])
            shown.update(len(batch.rows))
    tokens = torch.cat(found, dim=1).double()
    if not tokens.shape[1]:
        raise InputError(f"none of the {len(questions)} answers has a token: give other questions")
    ordered = sorted({float(p) for p in percentiles})
    values = torch.stack([_percentile(tokens, p) for p in ordered], dim=1)
    return Calibration(
        trait=vector.trait,
        model=model_name(model),
        layers=tuple(chosen_layers(layer, len(vector.directions))),
        percentiles=tuple(ordered),
        values=tuple(map(tuple, values.tolist())),
        prompts=len(questions),
        tokens=tokens.shape[1],
        max_new_tokens=max_new_tokens,
        temperature=float(temperature),
        seed=seed,
    )


def _percentile(values: Float[Tensor, "layer token"], percentile: float) -> Float[Tensor, " layer"]:
    """Return the linearly interpolated percentile; torch.quantile takes no more than 16 million values."""
    ordered, place = values.sort(dim=1).values, percentile / 100 * (values.shape[1] - 1)
    low = math.floor(place)
    return torch.lerp(ordered[:, low], ordered[:, math.ceil(place)], place - low)
