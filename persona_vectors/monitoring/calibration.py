"""Calibration: percentiles of a vector's projections over neutral prompts, for caps, floors and alarms."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Layer, Model, chosen_layers, model_name
from persona_vectors.model.generation import generate_batches, stop_tokens
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.monitoring.percentiles import Calibration
from persona_vectors.monitoring.trace import monitor
from persona_vectors.vectors.directions import layer_for
from persona_vectors.vectors.shipped import VectorLike, as_vector

PERCENTILES = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)


def calibrate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: VectorLike,
    questions: Sequence[str],
    *,
    layer: Layer | None = None,
    percentiles: Sequence[float] = PERCENTILES,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> Calibration:
    """Answer neutral questions, and return percentiles of the answer tokens' projections at each layer.

    They are read while the answers are generated, on v/|v|, in the residual stream's units. Without a layer it is the
    one that the vector's file recommends to monitor at.

    Raises InputError where there is no question, a percentile is not between 0 and 100, or no answer has a token.
    """
    if not questions or not percentiles or not all(0 <= p <= 100 for p in percentiles):
        raise InputError("calibrate needs one question or more, and percentiles from 0 to 100")
    vector = as_vector(vector)
    layers = chosen_layers(layer_for([vector], layer, purpose="monitor"), len(vector.directions))
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
            during=lambda _: monitor(model, vector, layer=layers, stops=stops),
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
        layers=tuple(layers),
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
