"""Rendered chats: a text in which marks say whose turn it is, back to messages."""

import re
from typing import Any

from persona_vectors.data.checks import check_text
from persona_vectors.data.errors import InputError

MARKS = (
    ("<|im_start|>", "\n", "<|im_end|>"),
    ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    ("<start_of_turn>", "\n", "<end_of_turn>"),
)
"""What stands before a role, between it and its text, and after that."""
NAMES = {
    **{name: name for name in ("system", "user", "assistant", "tool")},
    "model": "assistant",
    "ipython": "tool",
    "Human": "user",
    "Assistant": "assistant",
}


def split_text(text: str) -> list[dict[str, Any]]:
    """Return the messages of a rendered chat, whose turns must all be marked: nothing of the text is guessed or lost.

    Known are the three forms of `MARKS`, and turns that begin with "Human:" and "Assistant:" after a blank line.
    Raises InputError for any other text.
    """
    check_text(text)
    for begin, middle, end in MARKS:
        if begin in text:
            return _marked(text, begin, middle, end)
    lead, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    if parts and not lead:
        found = [{"role": NAMES[name], "content": said.strip()} for name, said in zip(parts[::2], parts[1::2])]
        return found if found[-1]["content"] else found[:-1]
    marks = ", ".join(begin for begin, _, _ in MARKS)
    raise InputError(f"a text has no turns that are marked by {marks} or Human: and Assistant: give messages")


def _marked(text: str, begin: str, middle: str, end: str) -> list[dict[str, Any]]:
    lead, *parts = text.split(begin)
    strange = None if re.fullmatch(r"\s*(<[^<>\s]+>)?\s*", lead) else lead
    found = []
    for number, part in enumerate(parts):
        name, _, rest = part.partition(middle)
        content, closed, after = rest.partition(end)
        last = number == len(parts) - 1
        if name not in NAMES:
            strange = begin + part
        elif not closed and not last:
            strange = f"{begin}{name} without {end}"
        elif after.strip() and not (last and re.fullmatch(r"\s*<[^<>\s]+>\s*", after)):
            strange = after
        elif closed or content:  # else the mark at the end that asks for an answer
            found.append({"role": NAMES[name], "content": content})
    if strange is not None:
        raise InputError(f"a text with {begin} is no chat of marked turns, at {strange.strip()[:40]!r}: give messages")
    return found
