"""Text to tokens and back: chat templates, prompts and answers, batches."""

import copy
from collections.abc import Sequence

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model
from persona_vectors.model.wrappers import unwrap


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str, *, system: str | None = None) -> str:
    """Return the chat template's text for a question, up to where the answer begins.

    Raises InputError where the tokenizer has no template, or its template refuses or drops the system prompt.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    return chat_text(tokenizer, messages, add_generation_prompt=True)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Return the chat template's text for a conversation; see `chat_prompt` for the errors."""
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {name!r} has no chat template: use an instruct model, or set tokenizer.chat_template"
        )
    way_out = "pass fold_system_role(tokenizer), or --fold-system, to put the system prompt into the user's turn"
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise InputError(f"the chat template of {name!r} rejects this conversation ({error}): {way_out}") from None
    assert isinstance(text, str)
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise InputError(f"the chat template of {name!r} drops the system prompt: {way_out}")
    return text


def fold_system_role(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose template puts a system message at the head of the first user turn."""
    folded = copy.deepcopy(tokenizer)
    folded.chat_template = (
        "{%- if messages[0]['role'] == 'system' -%}{%- set messages = [{'role': 'user', 'content': "
        "messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] -%}{%- endif -%}"
    ) + str(tokenizer.chat_template)
    return folded


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of templated text, without a second beginning-of-sequence token."""
    return tokenizer(text, add_special_tokens=False).input_ids


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer's tokens, without special ones."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a templated prompt and of the answer that follows it.

    The two are tokenised together. A token that spans the boundary belongs to the answer.

    Raises InputError, with both strings, where the prompt's tokens are no prefix of the whole's.
    """
    alone, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    same = next((i for i, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole)))
    if same < len(alone) - 1:
        raise InputError(
            f"the prompt's tokens are no prefix of prompt and answer's, from token {same} on: "
            f"prompt {prompt!r}, answer {answer!r}"
        )
    return whole[:same], whole[same:]


def batch_tokens_for(model: Model) -> int:
    """Return how many tokens one forward pass should read: enough to keep the device busy, and little memory."""
    return 1024 if next(unwrap(model).parameters()).device.type == "cpu" else 4096


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both [batch, token], with the padding on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def length_batches(prompts: Sequence[Sequence[int]], extra: int, budget: int) -> list[list[int]]:
    """Return batches of indices, longest first, of at most `budget` tokens each, with `extra` tokens a row."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * (len(prompts[batches[-1][0]]) + extra) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
