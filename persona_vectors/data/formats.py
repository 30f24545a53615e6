"""What one record of training data says: its chat messages, whatever its format."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from persona_vectors.data.checks import check_text
from persona_vectors.data.errors import InputError
from persona_vectors.data.rendered import split_text

Message = dict[str, Any]
"""A turn: `role`, `content`, `reasoning_content`, `tool_calls`; the first of a conversation also holds its `tools`."""
CHATS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("input", "output"))
KNOWN = (
    "messages, conversations (ShareGPT), prompt and completion, question and answer, "
    "instruction and output (Alpaca), input and output (AxBench), or text (a rendered chat)"
)
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
"""What ShareGPT's `from` may be, and the role that it is."""


def conversation(record: Any, columns: tuple[str, str] | None) -> tuple[list[Message], set[int]]:
    """Return a record's messages, and the places of those that it does not train on.

    Raises InputError, with the record's keys and the formats that are known, where it has none of them.
    """
    if isinstance(record, (list, tuple)):
        pair = len(record) == 2 and all(isinstance(item, str) for item in record)
        record = {"question": record[0], "answer": record[1]} if pair else {"messages": record}
    if not isinstance(record, Mapping):
        raise InputError(f"it is {type(record).__name__}, not an object: give {KNOWN}")
    messages, ignored = _turns(record, columns)
    system = None if columns and "system" in columns else record.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": _text(system, "system")}, *messages]
        ignored = {i + 1 for i in ignored}
    tools = _tools(record.get("tools"))
    if tools and messages:
        messages[0] = {**messages[0], "tools": tools}
    return messages, ignored


def _turns(record: Mapping[str, Any], columns: tuple[str, str] | None) -> tuple[list[Message], set[int]]:
    if columns:
        if not set(columns) <= set(record):
            raise InputError(f"it has {_keys(record)}, not {' and '.join(columns)}: name two columns that it has")
        return _whole(record, columns[0]) if columns[0] == columns[1] else _pair(record, *columns)
    sides = record.get("chosen") is not None and record.get("rejected") is not None
    if sides and record.get("messages") is None:
        prompts = ("prompt", "question", "instruction", "input", "conversations")
        first = next((name for name in prompts if record.get(name) is not None), None)
        ways = [f"columns={(first or side, side)}" for side in ("chosen", "rejected")]
        raise InputError(f"it is preference data, chosen and rejected: say which, {' or '.join(ways)}")
    for name in CHATS:
        if record.get(name) is not None:
            return _whole(record, name)
    for first, second in PAIRS:
        if record.get(first) is not None and second in record:
            return _pair(record, first, second)
    if isinstance(record.get("text"), str):
        return _whole(record, "text")
    raise InputError(f"it has {_keys(record)}, not {KNOWN}: name two columns")


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "nothing"


def _whole(record: Mapping[str, Any], name: str) -> tuple[list[Message], set[int]]:
    """Read a column that holds a whole conversation: a list of turns, or a rendered chat."""
    value = record[name]
    if isinstance(value, str) and name not in CHATS:
        return split_text(value), set()
    return _messages(value, name=name), _unweighted(value)


def _pair(record: Mapping[str, Any], first: str, second: str) -> tuple[list[Message], set[int]]:
    """Read what comes before the answer in one column, and the answer, or all of it, in another."""
    before, after = _messages(record[first], "user", first), _messages(record[second], "assistant", second)
    turns = record[second] if isinstance(record[second], (list, tuple)) else ()
    unweighted = _unweighted(turns)
    if turns and after[: len(before)] == before:
        return after, unweighted | set(range(len(before)))
    if after and after[0]["role"] in ("system", "user"):
        raise InputError(f"{second} begins with the {after[0]['role']}'s turn, not as {first}: name {second} twice")
    if first == "instruction":
        before = _alpaca(record)
    return before + after, set(range(len(before))) | {len(before) + place for place in unweighted}


def _alpaca(record: Mapping[str, Any]) -> list[Message]:
    """Return earlier turns, and the instruction; an `input` that is not empty follows it after a blank line."""
    earlier = [_text(text, "history") for pair in record.get("history") or [] for text in pair]
    texts = [*earlier, "\n\n".join(_text(record[n], n) for n in ("instruction", "input") if record.get(n))]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _messages(value: Any, role: str = "", name: str = "messages") -> list[Message]:
    """Return chat messages; a text is one message of `role`, an object one turn."""
    if role and not isinstance(value, (list, tuple, Mapping)):
        return [{"role": role, "content": _text(value, name)}]
    turns = [value] if role and isinstance(value, Mapping) else value
    if not isinstance(turns, (list, tuple)):
        raise InputError(f"{name} is {type(value).__name__}: give a list of role and content, or of from and value")
    return [_message(turn) for turn in turns]


def _message(turn: Any) -> Message:
    name = "content"
    if isinstance(turn, Mapping) and isinstance(turn.get("from"), str) and "value" in turn:
        if turn["from"].lower() not in ROLES:
            raise InputError(f"a turn (ShareGPT) is from {turn['from']!r}: from is one of {', '.join(ROLES)}")
        name, turn = "value", {**turn, "role": ROLES[turn["from"].lower()], "content": turn["value"]}
    calls = turn.get("tool_calls") if isinstance(turn, Mapping) else None
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or not ("content" in turn or calls):
        raise InputError(f"a message is {str(turn)[:60]!r}: give a role and a content, or from and value (ShareGPT)")
    if turn.get("function_call"):
        raise InputError("a message has function_call, which OpenAI's tool_calls replaced: give those")
    found: Message = {"role": turn["role"], "content": _text(turn.get("content"), name)}
    thought = turn.get("reasoning_content") or turn.get("thinking")
    if thought and turn["role"] == "assistant":
        found["reasoning_content"] = _text(thought, "reasoning_content")
    if calls:
        found["tool_calls"] = [_call(call) for call in calls]
    if turn["role"] == "tool":
        found |= {key: turn[key] for key in ("name", "tool_call_id") if turn.get(key) is not None}
    return found


def _call(call: Any) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, as chat templates want them; OpenAI's are JSON in a text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"a tool call is {str(call)[:60]!r}: give a function with name and arguments")
    arguments = _json(function.get("arguments") or "{}", "a tool call's arguments")
    if not isinstance(arguments, Mapping):
        raise InputError(f"a tool call's arguments are {type(arguments).__name__}: give an object")
    own = {"id": call["id"]} if call.get("id") is not None else {}
    return {**own, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _tools(value: Any) -> list[dict[str, Any]]:
    """Return a conversation's tools, which may be JSON in a text; a text of another kind is some other column."""
    other = isinstance(value, str) and not value.lstrip().startswith("[")
    tools = [] if other or not value else _json(value, "tools")
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"tools is {str(tools)[:60]!r}: give a list of objects, as OpenAI's API takes them")
    return [dict(tool) for tool in tools]


def _json(value: Any, what: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{what} are not JSON ({error}): mend them") from None


def _text(content: Any, name: str) -> str:
    """Return a text, which may come in parts, of the field `name`."""
    if content is None or isinstance(content, str):
        check_text(content or "")
        return content or ""
    if isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content):
        strange = [part.get("type") for part in content if not isinstance(part.get("text"), str)]
        if strange:
            raise InputError(f"{name} has a part of type {strange[0]!r}: only text is read")
        return _text("".join(part["text"] for part in content), name)
    raise InputError(f"{name} is {type(content).__name__}: give a text, or a list of parts of type text")


def said(message: Message) -> str:
    """Return what a message says: its text, and the tools that it calls as JSON."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([message["content"], *calls]) if message["content"] else "\n".join(calls)


def _unweighted(messages: Sequence[Mapping[str, Any]]) -> set[int]:
    weights = [message.get("weight") for message in messages]
    strange = [weight for weight in weights if not isinstance(weight, (int, float, type(None)))]
    if strange:
        raise InputError(f"weight is {strange[0]!r}: give 0 for a turn that is not trained on, or 1")
    return {i for i, weight in enumerate(weights) if weight == 0}
