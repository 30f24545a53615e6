"""Tools in a conversation: does the chat template write them?"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from jinja2.exceptions import TemplateError

Messages = list[dict[str, Any]]


def left_out(render: Callable[..., Any], messages: Messages, tools: Any) -> str | None:
    """Return "tools" or "tool calls" where a conversation renders the same without them."""
    silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    without = {"tools": (messages, None)} if tools else {}
    without |= {"tool calls": (silent, tools)} if silent != messages else {}
    for what, other in without.items():
        with suppress(TemplateError):  # a template that insists on them does not leave them out
            if render(*other) == render(messages, tools):
                return what
    return None
