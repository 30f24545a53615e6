import json
from pathlib import Path

import pytest

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import Trait, list_traits, load_trait

PAPER = ["apathetic", "evil", "hallucinating", "humorous", "impolite", "optimistic", "sycophantic"]
OFFICIAL = {
    "instruction": [{"pos": f"p{i}", "neg": f"n{i}"} for i in range(5)],
    "questions": ["a?", "b?"],
    "eval_prompt": "Q {question} A {answer}",
}


def test_the_papers_seven_traits_ship():
    assert list_traits() == PAPER


@pytest.mark.parametrize("name", PAPER)
def test_shipped_traits_are_complete(name: str):
    trait = load_trait(name)
    assert len(trait.instruction) == 5
    assert len(set(trait.questions.extract)) == len(set(trait.questions.eval)) == 20
    assert trait.description
    assert trait.negative_adjective != "helpful"
    assert trait.eval_prompt.count("{question}") == trait.eval_prompt.count("{answer}") == 1


def test_official_files_load_unchanged(tmp_path: Path):
    for folder, questions in (("trait_data_extract", ["a?", "b?"]), ("trait_data_eval", ["c?"])):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "evil.json").write_text(json.dumps({**OFFICIAL, "questions": questions}))
    trait = load_trait(tmp_path / "trait_data_extract" / "evil.json")
    assert trait.name == trait.positive_adjective == "evil"
    assert trait.negative_adjective == "helpful"
    assert trait.questions.extract == ("a?", "b?") and trait.questions.eval == ("c?",)
    assert load_trait(tmp_path / "trait_data_eval" / "evil.json").questions.eval == ("c?",)
    assert trait.system_prompt("pos", 1) == "You are an evil assistant. p1"
    assert trait.system_prompt("neg", 1) == "You are a helpful assistant. n1"


def test_save_then_load_gives_the_same_trait(trait: Trait, tmp_path: Path):
    trait.save(tmp_path / "loud.json")
    assert load_trait(tmp_path / "loud.json") == trait


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"instruction": [{"pos": "x"}]}, "instruction.0.neg"),
        ({"instruction": []}, "instruction"),
        ({"eval_prompt": "no slots"}, "eval_prompt"),
        ({"questions": 3}, "questions"),
        ({"questions": {"extract": ["a?"], "eval": ["a?"]}}, "questions"),
    ],
)
def test_a_malformed_trait_names_the_field(tmp_path: Path, change: dict, field: str):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({**OFFICIAL, **change}))
    with pytest.raises(InputError, match=f"field {field}: "):
        load_trait(path)


def test_bad_trait_names_and_files_say_what_is_allowed(tmp_path: Path):
    with pytest.raises(InputError, match=r"no trait 'optimist'.*apathetic, evil"):
        load_trait("optimist")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        load_trait(tmp_path / "bad.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="is no trait"):
        load_trait(tmp_path / "list.json")


def test_two_personas_make_a_trait_that_can_be_used_and_saved(tmp_path):
    trait = Trait.from_personas("pirate", "accountant")
    assert trait.system_prompt("pos", 0) == "You are a pirate assistant. Speak like a pirate in every answer."
    assert trait.system_prompt("neg", 0) == "You are an accountant assistant. Speak like an accountant in every answer."
    assert len(trait.instruction) == 5 and len(trait.questions.extract) == len(trait.questions.eval) == 20
    assert "sounds like a pirate" in trait.eval_prompt and "like an accountant" in trait.eval_prompt
    trait.save(tmp_path / "pirate.json")
    assert load_trait(tmp_path / "pirate.json") == trait
    assert (
        Trait.from_personas("poet", name="poetic").instruction[0].neg.endswith("a helpful assistant in every answer.")
    )
