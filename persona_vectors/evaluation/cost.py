"""What an edit costs on neutral text, so that vectors and methods are compared at equal cost."""

import math
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.data.texts import neutral_texts
from persona_vectors.model.blocks import Model, one_layer
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.model.tokens import answers_at
from persona_vectors.model.wrappers import unwrap
from persona_vectors.steering.add import RowEdit, steer_rows
from persona_vectors.vectors.directions import layer_for
from persona_vectors.vectors.vector import PersonaVector

_ROUNDS, _AT_ONCE = 4, 8


def coef_at_kl(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vector: PersonaVector,
    *,
    layer: SupportsIndex | None = None,
    kl: float = 1.0,
    percentile: float = 95.0,
    positions: str = "all",
    texts: Sequence[tuple[str, str]] | None = None,
) -> float:
    """Return the coefficient at which steering changes neutral text as much as `kl` says: a strength by its cost.

    The cost is the divergence KL(plain | steered) of the next token's distribution, in nats, at the answer tokens of
    `texts`, questions and answers, by default on plain facts: returned is the smallest coefficient, to 1 %, at which
    its `percentile` over the tokens reaches `kl`. So vectors and layers compare at equal cost, whatever their lengths.
    Without a layer it is the recommended one; `positions` are those of `steer`.

    Raises InputError where no coefficient reaches it.
    """
    if not (kl > 0 and 0 < percentile <= 100):
        raise InputError(f"kl is {kl} and percentile {percentile}: give a positive number, and one up to 100")
    place = one_layer(layer_for([vector], layer, purpose="steer"), len(vector.directions))

    def cost(coefs: Sequence[float]) -> list[float]:
        edits = [RowEdit(vector, place, coef, positions) for coef in coefs]
        found = token_kl(model, tokenizer, edits, texts or neutral_texts())
        return found.double().quantile(percentile / 100, dim=1).tolist()

    coefs = [8.0**power for power in range(-4, 5)]
    below, above = (0.0, 0.0), (math.inf, math.inf)
    for _ in range(_ROUNDS):
        for coef, value in zip(coefs, cost(coefs)):
            if not value < kl:  # nan: the model is broken there
                above = coef, value
                break
            below = coef, value
        if not (below[0] and math.isfinite(above[0])):
            raise InputError(
                f"no coefficient of {vector!r} up to {coefs[-1]:g} has a KL of {kl:g} at layer {place}: give another kl"
            )
        ratio = (above[0] / below[0]) ** (1 / (_AT_ONCE + 1))
        coefs = [below[0] * ratio**step for step in range(1, _AT_ONCE + 1)]
    return above[0]


def token_kl(
    model: Model, tokenizer: PreTrainedTokenizerBase, edits: Sequence[RowEdit], texts: Sequence[tuple[str, str]]
) -> Float[Tensor, "edit token"]:
    """Return KL(plain | edited) of the next token's distribution in nats, at every answer token."""
    model = unwrap(model)
    found = []
    with torch.inference_mode(), bar(texts, desc="divergence from plain", unit="text") as shown:
        for question, text in shown:
            prompt, answer = encode_answer(tokenizer, chat_prompt(tokenizer, question), text)
            ids = torch.tensor([prompt + answer] * (1 + len(edits)), device=model.device)
            place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) - len(prompt)
            with answers_at(place), steer_rows(model, [None, *edits]):
                logits = model(input_ids=ids).logits[:, len(prompt) - 1 : -1]
            plain, *edited = logits.float().log_softmax(dim=-1)
            found.append(torch.stack([(plain.exp() * (plain - each)).sum(dim=-1) for each in edited]).cpu())
    return torch.cat(found, dim=1)
