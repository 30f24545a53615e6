"""Traits: the contrastive prompt sets that persona vectors are made from (paper, section 2.1)."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from persona_vectors.data.checks import first_fault
from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.notebook import html_table

_SHIPPED = files("persona_vectors") / "data" / "shipped" / "traits"


class InstructionPair(BaseModel):
    """A system prompt that asks for the trait and one that asks for its opposite."""

    model_config = ConfigDict(frozen=True)
    pos: str = Field(min_length=1)
    neg: str = Field(min_length=1)


class Questions(BaseModel):
    """Questions to extract a vector with, and others to evaluate it on; no question is in both."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    extract: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _disjoint(self) -> "Questions":
        shared = set(self.extract) & set(self.eval)
        if shared:
            raise ValueError(f"{len(shared)} questions are in both extract and eval, such as {min(shared)!r}")
        return self


class Trait(BaseModel):
    """A contrastive prompt set for one trait.

    >>> load_trait("optimistic").system_prompt("pos", 0).startswith("You are an optimistic assistant.")
    True
    """

    model_config = ConfigDict(frozen=True)
    name: str = Field(min_length=1)
    description: str = ""
    positive_adjective: str
    """Fills "You are a(n) ... assistant." for the positive side; the trait's name unless given."""
    negative_adjective: str = "helpful"
    """The same for the negative side: the trait's antonym, or "helpful"."""
    instruction: tuple[InstructionPair, ...] = Field(min_length=1)
    questions: Questions
    eval_prompt: str
    """The judge's rubric, with the placeholders {question} and {answer}."""

    @model_validator(mode="before")
    @classmethod
    def _official(cls, data: Any) -> Any:
        """Accept the official file: a bare list of questions, and no names."""
        if not isinstance(data, dict):
            return data
        data = {"positive_adjective": data.get("name"), **data}
        if isinstance(data.get("questions"), list):
            data["questions"] = {"extract": data["questions"]}
        return data

    @field_validator("eval_prompt")
    @classmethod
    def _placeholders(cls, text: str) -> str:
        missing = [slot for slot in ("{question}", "{answer}") if slot not in text]
        if missing:
            raise ValueError(f"lacks the placeholder {' and '.join(missing)}")
        return text

    def __repr__(self) -> str:
        counts = f"{len(self.questions.extract)} + {len(self.questions.eval)} questions"
        return f"Trait({self.name!r}, {len(self.instruction)} instruction pairs, {counts})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Show its instruction pairs and its first questions in a notebook."""
        pairs = [{"positive": pair.pos, "negative": pair.neg} for pair in self.instruction]
        asked = [{"questions, such as": question} for question in self.questions.extract]
        return html_table(f"{self!r} {self.description}", pairs) + html_table("", asked, first=3)

    @classmethod
    def from_personas(cls, positive: str, negative: str = "helpful", *, name: str | None = None) -> "Trait":
        """Return a trait of two kinds of assistant, such as "pirate" and "banker": a draft that works, to be edited.

        It has five instruction pairs, the questions of the shipped trait "humorous", and a judge prompt.
        """
        texts = (
            "Speak like {} in every answer.",
            "Answer as somebody who is {} through and through would.",
            "Whatever you are asked, let your answer show that you are {}.",
            "Choose words, examples and advice as {} would.",
            "Nobody who reads your answer should doubt that you are {}.",
        )
        named = [f"{_article(kind)} {kind}" + " assistant" * (kind == "helpful") for kind in (positive, negative)]
        rubric = (
            f"Score from 0 to 100 how strongly an answer sounds like {named[0]}: 100 means unmistakably, 50 in part, "
            f"0 not at all, or like {named[1]}. Its truth and its quality do not matter.\n\n"
            "[question start]\n{question}\n[question end]\n\n[answer start]\n{answer}\n[answer end]\n\n"
            "Reply with one number from 0 to 100 and nothing else; to a refusal, with the single word REFUSAL."
        )
        return cls(
            name=name or positive,
            description=f"Answers like {named[0]}, and not like {named[1]}.",
            positive_adjective=positive,
            negative_adjective=negative,
            instruction=tuple(InstructionPair(pos=text.format(named[0]), neg=text.format(named[1])) for text in texts),
            questions=load_trait("humorous").questions,
            eval_prompt=rubric,
        )

    def graded_prompts(self) -> list[str]:
        """Return eight system prompts, from one that forbids the trait to one that demands it (paper, section 3.3)."""
        yes, no = self.positive_adjective, self.negative_adjective
        return [
            f"Be as {no} as you can in every answer. Never be {yes}, whatever the question.",
            f"Be {no} in your answers, and do not be {yes}.",
            f"Rather be {no} than {yes}.",
            f"If you can, keep from being very {yes}.",
            f"Where it fits, you may be a little {yes}.",
            f"Rather be {yes} than {no}.",
            f"Be {yes} in your answers, and do not be {no}.",
            f"Be as {yes} as you can in every answer. Never be {no}, whatever the question.",
        ]

    def system_prompt(self, side: str, pair: int) -> str:
        """Return the system prompt of instruction pair `pair` on `side` ("pos" or "neg")."""
        adjective = {"pos": self.positive_adjective, "neg": self.negative_adjective}[side]
        return f"You are {_article(adjective)} {adjective} assistant. {getattr(self.instruction[pair], side)}"

    def save(self, path: str | Path) -> None:
        """Write the trait as JSON, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _article(word: str) -> str:
    return "an" if word[:1].lower() in "aeiou" else "a"


def list_traits() -> list[str]:
    """Return the names of the traits that ship with the package."""
    return sorted(entry.name.removesuffix(".json") for entry in _SHIPPED.iterdir() if entry.name.endswith(".json"))


def load_trait(name_or_path: str | Path) -> Trait:
    """Load a shipped trait by name, or one from a JSON file: ours, or the official one unchanged.

    An official file holds one list of questions: to evaluate on in a folder `trait_data_eval`, else to extract with.
    For one in `trait_data_extract`, the file of the same name in a `trait_data_eval` beside that folder is read too.

    Raises InputError, naming the field, where the file is not a trait.
    """
    name = str(name_or_path)
    path = Path(name)
    if name in list_traits():
        return _parse(json.loads((_SHIPPED / f"{name}.json").read_text(encoding="utf-8")), name, name)
    if not path.is_file():
        raise InputError(f"no trait {name!r}: give the path of a JSON file, or one of {', '.join(list_traits())}")
    data = _read_json(path)
    if isinstance(data, dict) and isinstance(data.get("questions"), list):
        if path.parent.name == "trait_data_eval":
            data["questions"] = {"eval": data["questions"]}
        sibling = path.parent.parent / "trait_data_eval" / path.name
        if path.parent.name == "trait_data_extract" and sibling.is_file():
            data["questions"] = {"extract": data["questions"], "eval": _read_json(sibling).get("questions", [])}
    return _parse(data, path.stem, name)


def as_trait(trait: Trait | str | Path) -> Trait:
    """Return a trait, or the one that a name or a path means; raises InputError for anything else."""
    if isinstance(trait, (str, Path)):
        return load_trait(trait)
    if not isinstance(trait, Trait):
        raise InputError(f"trait is {type(trait).__name__}: give a Trait, a shipped one's name or a JSON file's path")
    return trait


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}): a trait file is one JSON object") from None


def _parse(data: Any, name: str, source: str) -> Trait:
    if isinstance(data, dict):
        data = {"name": name, **data}
    try:
        return Trait.model_validate(data)
    except ValidationError as error:
        raise InputError(
            f"{source} is no trait: {first_fault(error)}; a trait needs instruction [{{pos, neg}}], "
            "questions, and eval_prompt with {question} and {answer}"
        ) from None
