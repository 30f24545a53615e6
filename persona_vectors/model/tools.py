"""Tools in a conversation: has the chat template written them all?"""

from collections.abc import Sequence
from typing import Any


def missing_tool(tools: Sequence[dict[str, Any]] | None, messages: Sequence[dict[str, Any]], text: str) -> str | None:
    """Return the name of a tool, offered or called, that a conversation's rendered text does not hold."""
    called = [call for message in messages for call in message.get("tool_calls") or ()]
    names = [str(tool.get("function", tool).get("name", "")) for tool in [*(tools or ()), *called]]
    return next((name for name in names if name not in text), None)
