"""The verbs that measure, told to edit a thinking model's answer or reasoning alone."""

import pytest
from helpers import make_tokenizer, random_direction

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import neutral_texts
from persona_vectors.evaluation.likelihood import Statements

OPENS = (  # the prompt opens the thought, as some templates do
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def test_a_sweep_steers_the_part_that_it_is_told(model, trait):
    """A thought that the prompt opens and no answer ends: all is reasoning, and nothing the answer."""
    vector = random_direction(model)
    options = {"layer": [1], "coefs": [4.0], "controls": 0, "max_new_tokens": 4, "temperature": 0.0, "gate": 0.0}
    found = {}
    for name in ("answer", "reasoning", "response"):
        run = pv.sweep(model, make_tokenizer(OPENS), trait, vector, judge=score, positions=name, **options)
        (found[name],) = [p for p in run.stage("report") if p.name == trait.name and p.strength > 0]
        assert run.positions == run.use().positions == name
    assert found["reasoning"] == found["response"] != found["answer"]
    assert found["answer"].effect.mean == 0 != found["response"].effect.mean


def score(question: str, answer: str, rubric: str) -> float:
    return float(sum(map(ord, answer)) % 100)


def test_a_cost_is_that_of_the_part_and_statements_have_none(model, tokenizer):
    vector, texts = random_direction(model), neutral_texts()[:2]
    options = {"layer": 1, "kl": 0.001, "texts": texts}
    coefs = [pv.coef_at_kl(model, tokenizer, vector, positions=name, **options) for name in ("answer", "response")]
    assert coefs[0] == coefs[1] != pv.coef_at_kl(model, tokenizer, vector, **options)
    statements = Statements(question="How?", pairs=[{"pos": "a", "neg": "b"}] * 12)
    with pytest.raises(InputError, match="positions is 'answer': statements hold no reasoning; give all, prompt or re"):
        pv.contrast_effect(model, tokenizer, vector, statements, layer=1, doses=[0.1], positions="answer")
