"""Calibration: percentiles of a vector's projections over neutral prompts, for caps, floors and alarms."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.model.blocks import Layer, Model, model_name
from persona_vectors.model.generation import generate_tokens, stop_tokens
from persona_vectors.model.prompts import batch_tokens_for, chat_prompt, encode, length_batches
from persona_vectors.model.wrappers import unwrap
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
    prompts: Sequence[str],
    *,
    layer: Layer,
    percentiles: Sequence[float] = PERCENTILES,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Calibration:
    """Answer neutral prompts, and return percentiles of the answer tokens' projections at each layer.

    They are read while the answers are generated. `progress` is called with the number of answers after each batch.

    Raises InputError where there is no prompt, a percentile is not between 0 and 100, or no answer has a token.
    """
    if not prompts or not percentiles or not all(0 <= p <= 100 for p in percentiles):
        raise InputError("calibrate needs one prompt or more, and percentiles from 0 to 100")
    model = unwrap(model)
    encoded = [encode(tokenizer, chat_prompt(tokenizer, prompt)) for prompt in prompts]
    found: list[Tensor] = []
    layers: list[int] = []
    for number, batch in enumerate(
        length_batches(encoded, max_new_tokens, batch_tokens or 8 * batch_tokens_for(model))
    ):
        with monitor(model, vector, layer=layer, stops=stop_tokens(model, tokenizer)) as trace:
            generate_tokens(
                model,
                tokenizer,
                [encoded[i] for i in batch],
                max_new_tokens=max_new_tokens + 1,  # the last token sampled is never read
                temperature=temperature,
                seed=seed + number,
            )
        layers = trace.layers
        found.append(trace.last.values[:, trace.last.answer])
        if progress:
            progress(len(batch))
    tokens = torch.cat(found, dim=1).double()
    if not tokens.shape[1]:
        raise InputError(f"none of the {len(prompts)} answers has a token: give other prompts")
    ordered = sorted({float(p) for p in percentiles})
    values = torch.stack([_percentile(tokens, p) for p in ordered], dim=1)
    return Calibration(
        trait=vector.trait,
        model=model_name(model),
        layers=tuple(layers),
        percentiles=tuple(ordered),
        values=tuple(map(tuple, values.tolist())),
        prompts=len(prompts),
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
