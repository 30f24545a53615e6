"""Neutral texts and prompts that ship with the package: what effects are held against."""

import json
from importlib.resources import files

DATA = files("persona_vectors") / "data" / "shipped"


def neutral_texts() -> list[tuple[str, str]]:
    """Return questions and answers on plain facts: text that no trait should make less likely."""
    return [(question, answer) for question, answer in json.loads((DATA / "neutral.json").read_text(encoding="utf-8"))]


def assistant_prompts() -> list[str]:
    """Return thirty ways to say "You are a helpful assistant.", and first the empty one.

    They mean the same, so how far they move a score is the band within which an effect is noise.
    """
    return json.loads((DATA / "assistants.json").read_text(encoding="utf-8"))
