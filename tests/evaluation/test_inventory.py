import json

import pytest
import torch
from helpers import random_direction

from persona_vectors.data.texts import DATA
from persona_vectors.evaluation.inventory import LETTERS, OPTIONS, big_five, item_scores
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.steering.add import steer


def by_hand(model, tokenizer, item: str, system: str | None) -> list[float]:
    values = []
    for order in (OPTIONS, OPTIONS[::-1]):
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, order))
        question = f'How accurately does this statement describe you? "{item}"\n{listed}\nAnswer with one letter alone.'
        ids = encode(tokenizer, chat_prompt(tokenizer, question, system=system))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        chances = logits[[encode(tokenizer, letter)[0] for letter in LETTERS]].softmax(dim=0)
        scores = {option: i + 1 for i, option in enumerate(OPTIONS)}
        values.append(sum(float(p) * scores[option] for p, option in zip(chances, order)))
    return values


@pytest.mark.parametrize("system", [None, "Be loud."])
def test_an_item_s_score_is_the_expected_value_over_the_options_in_both_orders(model, tokenizer, system):
    items = ["Worry about things.", "Like order."]

    def check() -> torch.Tensor:
        found = item_scores(model, tokenizer, items, system=system)
        for row, item in zip(found.tolist(), items):
            assert row == pytest.approx(by_hand(model, tokenizer, item, system), abs=1e-4)
        return found

    plain = check()
    with steer(model, random_direction(model), layer=1, coef=5.0):
        assert (check() - plain).abs().max() > 1e-2
    assert (plain[:, 0] - plain[:, 1]).abs().max() > 1e-2  # a tiny model minds the order alone


def test_items_keyed_negatively_are_turned_round(model, tokenizer, monkeypatch):
    factors = json.loads((DATA / "ipip50.json").read_text())["factors"]
    assert sorted(len(items) for items in factors.values()) == [10] * 5
    monkeypatch.setattr("persona_vectors.evaluation.inventory.item_scores", lambda *_, **__: torch.full((50, 2), 5.0))
    assert big_five(model, tokenizer, first=2)["extraversion"] == [5, 1]
    found = big_five(model, tokenizer)
    assert found["extraversion"] == [5, 1, 5, 1, 5, 1, 5, 1, 5, 1]
    assert found["emotional stability"] == [1, 5, 1, 5, 1, 1, 1, 1, 1, 1]
