"""A Big Five inventory for language models: public-domain IPIP items, read from the options' probabilities."""

import json
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import DATA
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import chat_prompt, encode_answer

OPTIONS = (
    "very inaccurate",
    "moderately inaccurate",
    "neither accurate nor inaccurate",
    "moderately accurate",
    "very accurate",
)
LETTERS = "ABCDE"


def big_five(
    model: Model, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, first: int | None = None
) -> dict[str, list[float]]:
    """Return each factor's item scores, 1 to 5, of the 50-item IPIP markers (Goldberg, 1992), or its `first` items'.

    Each item is asked alone, with its options as letters, in both orders: the score is the expected value over the five
    letters' probabilities, averaged over the orders, and turned round for items keyed negatively. It is the model as it
    stands that is asked, steered inside `with pv.steer(...)`. Self-report of small models carries little: compare it
    with a random vector's effect.
    """
    items = [item for number, item in enumerate(ipip_items()) if number % 10 < (first or 10)]
    scores = item_scores(model, tokenizer, [item for item, _, _ in items], system=system)
    found: dict[str, list[float]] = {factor: [] for _, factor, _ in items}
    for (_, factor, key), orders in zip(items, scores.tolist()):
        agreement = sum(orders) / 2
        found[factor].append(agreement if key > 0 else 6 - agreement)
    return found


def ipip_items() -> list[tuple[str, str, int]]:
    """Return the 50 items, each with its factor and its key, 1 or -1; ten of each factor in a row."""
    factors = json.loads((DATA / "ipip50.json").read_text(encoding="utf-8"))["factors"]
    return [(each["item"], factor, each["key"]) for factor, entries in factors.items() for each in entries]


def item_scores(
    model: Model, tokenizer: PreTrainedTokenizerBase, items: Sequence[str], *, system: str | None = None
) -> Float[Tensor, "item order"]:
    """Return the expected agreement, 1 to 5, with statements such as "Worry about things.", in both option orders."""
    rows = []
    for item in items:
        for order in (OPTIONS, OPTIONS[::-1]):
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, order))
            question = (
                f'How accurately does this statement describe you? "{item}"\n{listed}\nAnswer with one letter alone.'
            )
            prompt = chat_prompt(tokenizer, question, system=system)
            rows += [encode_answer(tokenizer, prompt, letter) for letter in LETTERS]
    if any(len(answer) != 1 for _, answer in rows):
        raise InputError(
            "this tokenizer joins the option's letter with the prompt: the inventory cannot be read from it"
        )
    chances = answer_logprobs(model, rows).view(len(items), 2, len(LETTERS)).softmax(dim=-1)
    values = torch.tensor([[1.0, 2, 3, 4, 5], [5, 4, 3, 2, 1]], dtype=torch.float32)
    return (chances * values).sum(dim=-1)
