"""One language: every public signature uses the same names, in the same order and form; the commands use them too."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, SupportsIndex, get_type_hints

import pytest
from typer.main import get_command

import persona_vectors as pv
from persona_vectors.cli.main import app
from persona_vectors.model.blocks import Layer
from persona_vectors.model.generation import Conversation

CALLABLES = {name: getattr(pv, name) for name in pv.__all__ if callable(getattr(pv, name))}
ASKED = [
    name
    for name, f in CALLABLES.items()
    if not is_dataclass(f) and not issubclass(type(f), type(pv.Trait)) and f is not pv.InputError
]
FUNCTIONS = {name: f for name, f in CALLABLES.items() if not inspect.isclass(f)}
# What may be given by place, in this order: the model, what it is asked with, and the nouns that a verb is about.
NOUNS = (
    "trainer",
    "model",
    "tokenizer",
    "trait",
    "data",
    "conversations",
    "rollouts",
    "vector",
    "vectors",
    "statements",
)
# Names that once stood for the same things.
GONE = {"layers", "prompts", "progress", "base", "coefficient", "n_samples", "output", "folder", "dataset"}


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", ASKED)
def test_no_signature_has_another_name_for_the_same_thing(name):
    found = set(parameters(CALLABLES[name]))
    assert not found & GONE
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters(CALLABLES[name]).values()) or name == "fold_system_role"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_the_tokenizer_and_the_nouns_come_first_and_all_else_by_name(name):
    by_place = [p.name for p in parameters(FUNCTIONS[name]).values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if by_place[:1] in (["model"], ["trainer"]):
        known = [NOUNS.index(n) for n in by_place if n in NOUNS]
        assert known == sorted(known), by_place
    if "model" in by_place and "tokenizer" in by_place:
        assert by_place[:2] == ["model", "tokenizer"]
        assert len(by_place) <= 4, by_place


QUESTIONS = str | Conversation | Sequence[str] | Sequence[Conversation]


@pytest.mark.parametrize("name", ASKED)
def test_each_name_has_one_form(name):
    function = CALLABLES[name]
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for parameter in parameters(function).values():
        hint, default = hints.get(parameter.name), parameter.default
        if parameter.name == "layer":
            assert hint in (Layer, Layer | None, SupportsIndex, SupportsIndex | None) or inspect.isclass(function), hint
        if parameter.name == "questions":
            assert hint in (QUESTIONS, Sequence[str], Sequence[str] | None) or inspect.isclass(function), hint
        if parameter.name == "first":
            assert hint == int | None and default is None
        if parameter.name == "seed" and not inspect.isclass(function):
            assert hint is int and parameter.kind is parameter.KEYWORD_ONLY
        if parameter.name == "samples" and not inspect.isclass(function):
            assert hint is int
        if parameter.name == "positions":
            assert default == "all"
        if parameter.name == "out":
            assert parameter.kind is parameter.KEYWORD_ONLY
        if parameter.name == "judge" and not inspect.isclass(function) and "judge" not in name:
            assert parameter.kind is parameter.KEYWORD_ONLY and default is parameter.empty


RESULTS = [f for f in CALLABLES.values() if inspect.isclass(f) and hasattr(f, "rows")]


def test_results_are_tables_the_same_way():
    assert {f.__name__ for f in RESULTS} >= {"Evaluation", "Flags", "Shift", "Sweep"}
    for result in RESULTS:
        assert all(callable(getattr(result, name)) for name in ("rows", "to_pandas", "load"))
        assert hasattr(result, "save") or result.__name__ == "Flags"  # these are a file already


# A command's own options: how it loads the model, prints, and saves (`--out`) what the verb returns.
OWN = {"help", "as_json", "device", "dtype", "device_map", "fold_system", "html", "plot", "check_judge", "from_", "out"}
OWN |= {"attn_implementation", "quantization", "tp_plan", "chat_template"}
OWN |= {"store"}  # keep the result in the vector's file
VERBS = {
    "extract": ["extract", "extract_from"],
    "steer": ["steer", "generate"],
    "monitor": ["monitor", "generate", "heatmap"],
    "sweep": ["sweep"],
    "contrast": ["contrast_effect", "load_statements"],
    "calibrate": ["calibrate"],
    "flag": ["flag", "check_judge", "write_report"],
    "split": ["split_dataset"],
    "shift": ["finetuning_shift"],
    "import": ["import_vector"],
    "export": ["export_vector"],
    "evaluate": ["evaluate", "steer"],
    "diagnose": ["diagnose"],
}


@pytest.mark.parametrize("command", VERBS)
def test_a_command_s_options_are_the_python_arguments(command):
    known = {name for verb in VERBS[command] for name in parameters(FUNCTIONS[verb])}
    singular = {"question": "questions", "vectors": "vector", "file": "path", "trait": "rubric", "cap": "limit"}
    found = {p.name for p in get_command(app).commands[command].params} - OWN
    strangers = {n for n in found if n not in known and singular.get(n, "") not in known | {"path", "limit"}}
    assert not strangers


def test_every_public_name_is_imported_from_its_room():
    for name in pv.__all__:
        module = importlib.import_module(getattr(getattr(pv, name), "__module__", "persona_vectors"))
        assert module.__name__.startswith("persona_vectors")
