import json
import math
from dataclasses import replace

import pytest
import torch
import zoo
from helpers import hooks, plain_logprob, random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.data.texts import assistant_prompts, neutral_texts
from persona_vectors.data.traits import list_traits
from persona_vectors.evaluation.contrast import contrast_effect, effect_matrix
from persona_vectors.evaluation.likelihood import (
    State,
    Statements,
    likelihood_contrast,
    likelihood_contrasts,
    load_statements,
    neutral_perplexity,
)
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.steering.add import RowEdit, steer
from persona_vectors.vectors.controls import covariance_vectors, random_vectors

PAIRS = [{"pos": f"Loud it is, {i}!", "neg": f"It is quiet, {i}."} for i in range(12)]
STATEMENTS = Statements(question="And?", pairs=PAIRS)
SHORT = Statements(question="And?", pairs=PAIRS[:3])


def vector_of(model):
    return replace(random_direction(model), residual_norms=torch.ones(3))


def by_hand(model, tokenizer, system=None, statements=SHORT) -> list[float]:
    prompt = encode(tokenizer, chat_prompt(tokenizer, statements.question, system=system))
    values = [[plain_logprob(model, prompt, encode(tokenizer, t)) for t in (p.pos, p.neg)] for p in statements.pairs]
    return [pos - neg for pos, neg in values]


@pytest.mark.parametrize("name", ["llama", "mamba", "bloom"])
def test_the_contrast_is_the_difference_of_two_plain_forwards(name: str, tokenizer):
    model = zoo.build(name)
    found = likelihood_contrast(model, tokenizer, SHORT, system="Be loud.")
    assert found.tolist() == pytest.approx(by_hand(model, tokenizer, "Be loud."), abs=1e-4)


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_inside_a_steer_the_contrast_is_the_steered_model_s(name: str, positions: str, tokenizer):
    """Against one text at a time, with the edit's place given as a mask."""
    model = zoo.build(name)
    vector, found = random_direction(model), []
    with steer(model, vector, layer=1, coef=2.0, positions=positions):
        steered = likelihood_contrast(model, tokenizer, SHORT)
    prompt = encode(tokenizer, chat_prompt(tokenizer, "And?"))
    for pair in SHORT.pairs:
        for text in (pair.pos, pair.neg):
            answer = encode(tokenizer, text)
            place = torch.arange(len(prompt) + len(answer))[None] - len(prompt)
            masks = {"all": place >= -999, "prompt": place < 0, "response": place >= -1}
            with steer(model, vector, layer=1, coef=2.0, positions=masks[positions]):
                found.append(plain_logprob(model, prompt, answer))
    assert steered.tolist() == pytest.approx([a - b for a, b in zip(found[::2], found[1::2])], abs=1e-4)
    assert steered.tolist() != pytest.approx(by_hand(model, tokenizer), abs=2e-3)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_states_share_batches_and_do_not_mix(name: str, tokenizer):
    model = zoo.build(name)
    vector = random_direction(model)
    edits = [RowEdit(vector, 0, 2.0), None, RowEdit(vector, 2, -3.0)]
    states = [State(edit, system) for system in (None, "Be loud.") for edit in edits]
    found = likelihood_contrasts(model, tokenizer, SHORT, states)
    for state, row in zip(states, found):
        edit = state.edit or RowEdit(vector, 0, 0.0)
        with steer(model, vector, layer=edit.layer, coef=edit.coef):
            alone = likelihood_contrast(model, tokenizer, SHORT, system=state.system)
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert hooks(model) == 0


@pytest.mark.parametrize("trait", list_traits())
def test_shipped_statements_are_two_sided_and_of_like_length(trait: str):
    pairs = load_statements(trait).pairs
    texts = [text for pair in pairs for text in (pair.pos, pair.neg)]
    assert len(pairs) >= 20 and len(set(texts)) == len(texts)
    for pair in pairs:
        assert abs(len(pair.pos) - len(pair.neg)) <= 0.25 * max(len(pair.pos), len(pair.neg)), pair
    pos, neg = (sum(len(getattr(pair, side)) for pair in pairs) for side in ("pos", "neg"))
    assert abs(pos - neg) / pos < 0.05


def test_statements_that_choose_do_not_report():
    choosing, reporting = STATEMENTS.split()
    assert not set(choosing.pairs) & set(reporting.pairs) and len(choosing.pairs) + len(reporting.pairs) == 12
    with pytest.raises(InputError, match="3 statement pairs are too few"):
        SHORT.split()


def test_bad_statements_are_named(tmp_path):
    with pytest.raises(InputError, match="no statements 'calm': give a JSON file, or one of apathetic"):
        load_statements("calm")
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"question": "And?", "pairs": [{"pos": "x"}, {"pos": "y", "neg": "z"}]}))
    with pytest.raises(InputError, match=r"field pairs\.0\.neg: Field required"):
        load_statements(path)


def test_perplexity_on_plain_facts_is_the_plain_mean(model, tokenizer):
    values = []
    for question, answer in neutral_texts():
        prompt = encode(tokenizer, chat_prompt(tokenizer, question))
        values.append(plain_logprob(model, prompt, encode(tokenizer, answer)))
    found = neutral_perplexity(model, tokenizer, [None, RowEdit(random_direction(model), 1, 5.0)])
    assert found[0] == pytest.approx(math.exp(-sum(values) / len(values)), rel=1e-4)
    assert found[1] != pytest.approx(found[0], rel=1e-3)


def test_covariance_vectors_have_the_covariance_of_the_activations(model, tokenizer):
    """With many of them: their second moment is that of the centred answer tokens, up to the length of each."""
    vector, layer = random_direction(model), 1
    texts = [("Who?", "abcdefgh"), ("What then?", "jklm nop")]
    states: list[torch.Tensor] = []
    with torch.no_grad():
        for question, answer in texts:
            prompt = encode(tokenizer, chat_prompt(tokenizer, question))
            ids = torch.tensor([prompt + encode(tokenizer, answer)])
            states.append(model(ids, output_hidden_states=True).hidden_states[layer + 1][0, len(prompt) :])
    centred = torch.cat(states) - torch.cat(states).mean(dim=0)
    drawn = covariance_vectors(model, tokenizer, vector, layer=layer, count=3000, texts=texts)
    found = torch.stack([each.direction(layer) for each in drawn])
    torch.testing.assert_close(found.norm(dim=1), vector.direction(layer).norm().expand(3000))
    spectrum = [torch.linalg.svdvals(m).square() for m in (found, centred)]
    assert spectrum[0][15:].sum() < 1e-4 * spectrum[0].sum()  # 16 tokens, centred, span 15 dimensions
    axes = torch.linalg.svd(centred).Vh[:15]
    energy = [(m @ axes.T).square().sum(dim=0) / m.square().sum() for m in (found, centred)]
    assert torch.corrcoef(torch.stack(energy))[0, 1] > 0.95
    assert not drawn[0].direction(0).any()


def test_controls_are_half_isotropic_and_of_the_vector_s_norm(model, tokenizer):
    vector = random_direction(model)
    controls = random_vectors(model, tokenizer, vector, layer=2, count=5)
    assert [each.trait for each in controls] == ["random 0", "random 1", "random 2", "covariance 0", "covariance 1"]
    for each in controls:
        assert each.direction(2).norm() == pytest.approx(float(vector.direction(2).norm()), rel=1e-5)


def planted(model, tokenizer):
    """The direction along which the contrast of the choosing statements rises fastest at block 1."""
    gradient = torch.zeros(32, requires_grad=True)
    total = 0.0
    for pair in STATEMENTS.pairs[:8]:
        for text, sign in ((pair.pos, 1), (pair.neg, -1)):
            prompt = encode(tokenizer, chat_prompt(tokenizer, "And?"))
            answer = encode(tokenizer, text)
            ids = torch.tensor([prompt + answer])
            with edit_blocks(model, {1: lambda hidden, _: hidden + gradient}):
                logits = model(ids).logits[0].log_softmax(dim=-1)
            places = torch.arange(len(answer)) + len(prompt) - 1
            total = total + sign * logits[places, torch.tensor(answer)].mean()
    total.backward()
    directions = torch.randn(3, 32, generator=torch.Generator().manual_seed(3))
    directions[1] = gradient.grad / gradient.grad.norm() * directions[0].norm()
    return replace(random_direction(model), trait="loud", directions=directions, residual_norms=torch.full((3,), 5.0))


def test_a_planted_direction_is_found_and_beats_its_controls(model, tokenizer, trait):
    vector = planted(model, tokenizer)
    options = {"layer": [0, 1, 2], "doses": [0.01, 0.1], "controls": 20, "trait": trait}
    found = contrast_effect(model, tokenizer, vector, STATEMENTS, **options)
    assert (found.layer, found.dose) == (1, 0.1)
    assert found.works and found.beaten == 1 and found.flipped.mean < 0 < found.effect.mean
    assert len(found.random) == 20 and len(found.band) == len(assistant_prompts()) == 31
    _, reporting = STATEMENTS.split()
    with steer(model, vector, layer=1, dose=0.1):
        inside = likelihood_contrast(model, tokenizer, reporting)
    plain = likelihood_contrast(model, tokenizer, reporting)
    assert found.effect.mean == pytest.approx(float((inside - plain).mean()), abs=1e-4)
    use = found.use(source="a test")
    assert (use.layer, use.coef, use.effect, use.null) == (1, found.coef, found.effect, max(found.random))
    assert use.evidence and use.coherent == (0.0, found.coef)
    with steer(model, vector.with_use(use)):
        assert likelihood_contrast(model, tokenizer, reporting).allclose(inside)
    minus = contrast_effect(model, tokenizer, -vector, STATEMENTS, **{**options, "layer": [1]})
    assert not minus.works and minus.beaten < 0.1 and not minus.use().evidence


@pytest.mark.parametrize("positions", ["all", "response"])
def test_the_effect_is_that_of_the_edit_that_is_named(positions, model, tokenizer):
    vector, (_, reporting) = planted(model, tokenizer), STATEMENTS.split()
    options = {"layer": [0, 1], "doses": [0.05, 0.1], "controls": 2, "positions": positions}
    found = contrast_effect(model, tokenizer, vector, STATEMENTS, **options)
    assert found.edit(vector).positions == found.rows()[0]["positions"] == positions
    plain = likelihood_contrast(model, tokenizer, reporting)
    with steer(model, vector, layer=found.layer, coef=found.coef, positions=positions):
        inside = likelihood_contrast(model, tokenizer, reporting)
        assert neutral_perplexity(model, tokenizer) == pytest.approx([found.perplexity[1]], rel=1e-4)
    assert found.effect.mean == pytest.approx(float((inside - plain).mean()), abs=1e-4)


def test_layer_and_dose_are_chosen_without_the_statements_that_report(model, tokenizer):
    """Turning the reporting statements round turns the effect's sign, and must not change what was chosen."""
    vector = planted(model, tokenizer)
    swapped = [{"pos": p["neg"], "neg": p["pos"]} for p in PAIRS[8:]]
    options = {"layer": [0, 1, 2], "doses": [0.01, 0.1], "controls": 2}
    one = contrast_effect(model, tokenizer, vector, STATEMENTS, **options)
    other = contrast_effect(model, tokenizer, vector, Statements(question="And?", pairs=PAIRS[:8] + swapped), **options)
    assert (one.layer, one.dose) == (other.layer, other.dose)
    assert one.effect.mean == pytest.approx(-other.effect.mean, abs=1e-5)


def test_an_edit_that_breaks_the_model_is_not_chosen(model, tokenizer):
    options = {"layer": [1], "doses": [900.0], "controls": 2, "max_perplexity": 0.5}
    with pytest.raises(InputError, match=r"perplexity on plain facts above 0\.5 times .* give smaller doses"):
        contrast_effect(model, tokenizer, vector_of(model), STATEMENTS, **options)
    with pytest.raises(InputError, match="one layer and one positive dose"):
        contrast_effect(model, tokenizer, vector_of(model), STATEMENTS, layer=[1], doses=[-1.0])


def test_the_matrix_holds_every_vector_s_effect_on_every_trait(model, tokenizer):
    edits = [RowEdit(random_direction(model), layer, 2.0) for layer in (0, 2)]
    other = Statements(question="So?", pairs=[{"pos": p["neg"], "neg": p["pos"]} for p in PAIRS])
    found = effect_matrix(model, tokenizer, edits, {"a": STATEMENTS, "b": other})
    assert found.shape == (2, 2)
    _, reporting = STATEMENTS.split()
    states = [State(), State(edits[1])]
    plain, steered = likelihood_contrasts(model, tokenizer, reporting, states).mean(dim=1).tolist()
    assert float(found[1, 0]) == pytest.approx(steered - plain, abs=1e-5)
