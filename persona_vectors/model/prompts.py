"""Text to tokens and back: chat templates, prompts and answers, batches."""

import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.checks import check_text
from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_name
from persona_vectors.model.thoughts import first_mark, without_opening
from persona_vectors.model.tools import left_out
from persona_vectors.model.wrappers import unwrap


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str, *, system: str | None = None) -> str:
    """Return the chat template's text for a question, up to where the answer begins.

    Raises InputError where the tokenizer has no template, or its template refuses or drops the system prompt.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    return chat_text(tokenizer, messages, add_generation_prompt=True)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False
) -> str:
    """Return the chat template's text for a conversation, whose first message may hold its `tools`.

    See `chat_prompt` for the errors; a template that leaves out tools, or calls of them, is one too.
    """
    if not hasattr(tokenizer, "chat_template"):
        raise InputError(f"tokenizer is {type(tokenizer).__name__}: the model comes first, and then its tokenizer")
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {name!r} has no chat template: use an instruct model, or set tokenizer.chat_template"
        )
    way_out = "pass fold_system_role(tokenizer), or --fold-system, to put the system prompt into the user's turn"
    tools = messages[0].get("tools")
    plain = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
    plain = [{**m, "thinking": m["reasoning_content"]} if m.get("reasoning_content") else m for m in plain]
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=add_generation_prompt)
    try:
        text = render(plain, tools)
    except TemplateError as error:
        raise InputError(f"the chat template of {name!r} rejects this conversation ({error}): {way_out}") from None
    assert isinstance(text, str)
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise InputError(f"the chat template of {name!r} drops the system prompt: {way_out}")
    missing = left_out(render, plain, tools)
    if missing:
        raise InputError(f"the chat template of {name!r} leaves out the {missing}: use a model that has tools")
    return text


def finished_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], end: int) -> tuple[str, str]:
    """Return the template's text before the answer `messages[end]`, and the answer's, as the template finishes it.

    A template that opens a thought for the model to write puts no open thought before an answer that closes none, and
    what it puts before an answer without a thought is the answer's. An answer whose text holds its thought, marks and
    all, is as it is. An answer that calls tools is what the template makes of it, without what ends every turn.
    """
    if messages[end].get("tool_calls"):
        return _tool_turn(tokenizer, messages, end)
    prompt, answer = chat_text(tokenizer, messages[:end], add_generation_prompt=True), messages[end]["content"]
    thought, first = messages[end].get("reasoning_content"), first_mark(tokenizer, answer)
    if not thought and (first == "closes" or _continues(tokenizer, str(tokenizer.chat_template))):
        return prompt, answer
    if not thought and first == "opens":
        return without_opening(tokenizer, prompt), answer
    upto, said = chat_text(tokenizer, messages[: end + 1]), answer.strip()
    if thought and thought.strip() not in upto:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} leaves out the reasoning_content of an answer: "
            "put it into the content, between the model's own marks"
        )
    if not said or said not in upto:
        return prompt, answer
    same = _same(prompt, upto)
    return prompt[:same], upto[same : upto.rindex(said) + len(said)]


def _tool_turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], end: int) -> tuple[str, str]:
    upto, said = chat_text(tokenizer, messages[: end + 1]), "that is all"
    begin = upto[: _same(chat_text(tokenizer, messages[:end], add_generation_prompt=True), upto)]
    probe = chat_text(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}])
    return begin, upto[len(begin) :].removesuffix(probe.rpartition(said)[2])


def _same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many first items two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


@lru_cache(maxsize=64)
def _continues(tokenizer: PreTrainedTokenizerBase, _template: str) -> bool:
    """Say whether the prompt for an answer is how the template's text of the answer begins."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        return chat_text(tokenizer, probe).startswith(chat_text(tokenizer, probe[:1], add_generation_prompt=True) + "b")
    except InputError:  # a template that wants something else of a conversation
        return False


def fold_system_role(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose template puts a system message at the head of the first user turn."""
    return _with_preamble(
        tokenizer,
        "{%- if messages[0]['role'] == 'system' -%}{%- set messages = [{'role': 'user', 'content': "
        "messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] -%}{%- endif -%}",
    )


def with_template_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose template always has these options, such as `{"enable_thinking": False}`."""
    values = {name: "none" if value is None else json.dumps(value) for name, value in options.items()}
    return _with_preamble(tokenizer, "".join(f"{{%- set {name} = {value} -%}}" for name, value in values.items()))


def _with_preamble(tokenizer: PreTrainedTokenizerBase, preamble: str) -> PreTrainedTokenizerBase:
    """Return a copy whose chat template, or each of its named ones, begins with `preamble`."""
    changed, template = copy.deepcopy(tokenizer), tokenizer.chat_template
    named = isinstance(template, dict)
    changed.chat_template = {k: preamble + v for k, v in template.items()} if named else preamble + str(template)
    return changed


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of templated text, without a second beginning-of-sequence token.

    Text that spells a special token becomes that token, as in any chat; see `break_special_tokens` for data that
    nobody vouches for. Raises InputError for text with half a surrogate pair, which no tokenizer reads.
    """
    check_text(text)
    return tokenizer(text, add_special_tokens=False).input_ids


def break_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text in which nothing becomes a special token: a zero-width space parts the first character of each.

    For questions and samples from people who might write `<|im_end|>` to end a turn.
    """
    special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}, key=len)
    for token in reversed(special):
        text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer's tokens, without special ones."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a templated prompt and of the answer that follows it.

    The two are tokenised together. A token that spans the boundary belongs to the answer.

    Raises InputError, with both strings, where the prompt's tokens are no prefix of the whole's.
    """
    alone, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    same = _same(alone, whole)
    if same < len(alone) - 1:
        raise InputError(
            f"the prompt's tokens are no prefix of prompt and answer's, from token {same} on: "
            f"prompt {prompt!r}, answer {answer!r}"
        )
    return whole[:same], whole[same:]


def fit(row: tuple[Sequence[int], Sequence[int]], limit: int | None, new_tokens: int) -> tuple[list[int], list[int]]:
    """Return a row of at most `limit` tokens: the answer loses its end, a long prompt its beginning.

    The prompt leaves room for `new_tokens`, and for the answer, or for half of the context where it is longer.
    """
    prompt, answer = list(row[0]), list(row[1])
    if limit is None:
        return prompt, answer
    prompt = prompt[-(limit - max(new_tokens, min(len(answer), limit // 2))) :]
    return prompt, answer[: limit - len(prompt)]


def batch_tokens_for(model: Model) -> int:
    """Return how many tokens one forward pass should read: enough to keep the device busy, and little memory."""
    return 1024 if next(unwrap(model).parameters()).device.type == "cpu" else 4096


def check_length(model: Model, tokens: int) -> None:
    """Raise InputError where a row of prompt and answer has more tokens than the model has learned positions."""
    model = unwrap(model)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is None or tokens <= limit:
        return
    tables = [m for m in model.get_decoder().modules() if isinstance(m, nn.Embedding)]
    if any(m is not model.get_input_embeddings() and limit <= m.num_embeddings <= limit + 8 for m in tables):
        raise InputError(
            f"a prompt and its answer have {tokens} tokens, and {model_name(model)} reads at most {limit}: "
            "give shorter texts, or a smaller max_new_tokens"
        )


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both [batch, token], with the padding on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
