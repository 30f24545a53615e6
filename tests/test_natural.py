"""What one naturally types: it works, or is refused in words, and never done wrongly in silence."""

from dataclasses import replace

import nbformat
import pytest
import torch
from helpers import random_direction
from nbclient import NotebookClient

import persona_vectors as pv
from persona_vectors.model.generation import generate
from persona_vectors.monitoring.projection import project
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer

SHORT = {"max_new_tokens": 3, "temperature": 0.0}


def test_a_file_s_path_stands_for_its_vector_and_a_tensor_s_argmax_for_a_layer(model, tokenizer, tmp_path):
    vector = replace(random_direction(model), separation=torch.tensor([0.1, 0.9, 0.3]))
    vector.save(tmp_path / "v.safetensors")
    path = str(tmp_path / "v.safetensors")
    answers = []
    for given in (vector, path, tmp_path / "v.safetensors"):
        with steer(model, given, layer=vector.separation.argmax(), coef=3.0):
            answers.append(generate(model, tokenizer, "Hi", **SHORT))
    assert len(set(answers)) == 1
    talk = [("Hi", "So.")]
    expected = project(model, tokenizer, talk, vector, layer=1).values
    torch.testing.assert_close(project(model, tokenizer, talk, [path], layer=1).values, expected)
    with monitor(model, path, layer=1) as trace:
        generate(model, tokenizer, "Hi", **SHORT)
    assert trace["t"].shape[0] == 1
    for edit, more in ((pv.ablate, {}), (pv.cap, {"limit": -9.0}), (pv.rotate, {"angle": 0})):
        changed = []
        for given in (vector, path):
            with edit(model, given, layer=1, **more):
                changed.append(generate(model, tokenizer, "Hi", **SHORT))
        assert changed[0] == changed[1]
    with pv.steer_where(model, path, layer=1, coef=1.0, when=lambda p: p > 99, watch=path):
        unmoved = generate(model, tokenizer, "Hi", **SHORT)
    assert unmoved == generate(model, tokenizer, "Hi", **SHORT)


def test_a_trait_s_name_stands_for_it_and_one_question_is_not_its_letters(model, tokenizer):
    options = {"judge": pv.SentimentJudge(), "questions": "Hi", "samples": 2, "max_new_tokens": 2}
    found = pv.evaluate(model, tokenizer, "optimistic", **options)
    assert [answer.question for answer in found.answers] == ["Hi", "Hi"]
    drawn = pv.extract(model, tokenizer, "optimistic", judge=None, samples=1, first=1, max_new_tokens=2, min_pairs=1)
    assert drawn.trait == "optimistic"
    assert repr(pv.load_trait("optimistic")) == "Trait('optimistic', 5 instruction pairs, 20 + 20 questions)"


def test_a_vector_is_indexed_measured_and_compared(model, tmp_path):
    vector = replace(random_direction(model), info={"seed": 1})
    assert torch.equal(vector[2], vector.directions[2]) and len(list(vector)) == 3
    torch.testing.assert_close(vector.norm(), vector.directions.norm(dim=1))
    vector.save(tmp_path / "v.safetensors")
    loaded = pv.load_vector(tmp_path / "v.safetensors")
    assert loaded == vector and len({loaded, vector}) == 1
    changed = [
        2 * vector,
        replace(vector, trait="u"),
        replace(vector, info={}),
        replace(vector, separation=vector.norm()),
    ]
    assert all(other != vector for other in changed) and vector != "t"
    with pytest.raises(pv.InputError, match="layer 3 is out of range"):
        vector[3]
    assert pv.__version__.count(".") == 2
    axes = vector.plot(layer=1).axes
    assert [a.get_title() for a in axes] == ["t: how reliable", "t: how large"]
    assert vector.plot()._repr_png_().startswith(b"\x89PNG")  # it shows itself in a notebook
    assert axes[1].lines[0].get_ydata() == pytest.approx(vector.norm().tolist())


def test_what_is_of_another_kind_is_refused_in_words(model, tokenizer):
    """The types are checked while testing, so the functions that say it to users are asked themselves."""
    from persona_vectors.data.traits import as_trait
    from persona_vectors.model.blocks import model_shape
    from persona_vectors.model.prompts import chat_text
    from persona_vectors.monitoring.turns import answered_turns
    from persona_vectors.vectors.directions import finite
    from persona_vectors.vectors.shipped import as_vector

    plain = {f: getattr(f, "__wrapped__", f) for f in (as_trait, model_shape, chat_text, finite, as_vector)}
    cases = [
        (as_vector, (model,), "a vector is LlamaForCausalLM: give a PersonaVector"),
        (as_trait, (random_direction(model),), "trait is PersonaVector: give a Trait"),
        (model_shape, (tokenizer,), "the model comes first"),
        (chat_text, (model, []), "tokenizer is LlamaForCausalLM: the model comes first, and then its tokenizer"),
        (finite, ([1.0, 2.0],), "give one number, or a tensor with one for each row"),
    ]
    for function, arguments, message in cases:
        with pytest.raises(pv.InputError, match=message):
            plain[function](*arguments)
    with pytest.raises(pv.InputError, match="conversation 0 is a text: give a question and its answer"):
        list(answered_turns(tokenizer, 0, "some text", False, None))


@pytest.mark.slow
def test_a_notebook_shows_figures_and_no_walls_of_warnings(tmp_path):
    """In a kernel of its own, without `%matplotlib inline` and, where they are missing, without ipywidgets."""
    lines = [
        "import torch, persona_vectors as pv",
        "vector = pv.PersonaVector('calm', 'tiny', torch.eye(2, 4))",
        "pv.generate, pv.finetune, pv.flag",
        "vector.plot()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("\n".join(lines))])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (only,) = notebook.cells[0].outputs
    assert "image/png" in only["data"]
