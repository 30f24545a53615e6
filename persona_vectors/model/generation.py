"""Generating answers: one batch, or many prompts batch by batch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, overload

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Model
from persona_vectors.model.cache import room_in_cache
from persona_vectors.model.devices import base, input_device
from persona_vectors.model.leaving import ended_rows_leave
from persona_vectors.model.memory import answers_budget
from persona_vectors.model.prefill import shared_prompts, told_by_block
from persona_vectors.model.prompts import (
    chat_prompt,
    chat_text,
    check_length,
    decode,
    encode,
    left_pad,
)
from persona_vectors.model.sampling import Draws, Pulse, row_seed
from persona_vectors.model.wrappers import keeps_cache, unwrap

Conversation = Sequence[Mapping[str, Any]]
"""Chat messages, each with a role and a content."""


class Generated(NamedTuple):
    """One batch of answers."""

    rows: list[int]
    """Which prompts they answer, as indices."""
    answers: list[tuple[list[int], bool]]
    """Each one's token ids without the end token, and whether it ended by itself."""
    read: Any
    """What the context manager around the batch gave; None where there was none."""


def stop_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer, from the model's generation config and its tokenizer."""
    config = getattr(unwrap(model), "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    found = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    return sorted(found)


def generate_tokens(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    reading: bool = False,
    use_cache: bool = True,
) -> list[tuple[list[int], bool]]:
    """Generate one answer to each prompt in one batch: its token ids without the end token, and whether it ended.

    Samples from the whole distribution (no top_p, top_k, penalties or beams) whatever the model's own generation
    config says; temperature 0 is greedy. A row's tokens depend on its prompt and its seed alone, float rounding aside,
    and neither on the rest of the batch nor on other threads: `seed` is a number for each, or one for all, from which
    row i's is made with `row_seed`. The global random state is not used.

    With `reading` one token more is sampled than is kept, since the model never reads the last one: hooks then see
    every token of the answers, an answer that `max_new_tokens` cut included.
    """
    model = unwrap(model)
    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    length = max_new_tokens + reading
    check_length(model, max(map(len, prompts)) + length - 1)
    ids, mask = left_pad(prompts, pad, input_device(model))
    seeds = [row_seed(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else seed
    draws = [Draws(seeds, temperature)] if temperature > 0 else []
    own: Any = base(model).generation_config
    config = _Neutral(
        max_new_tokens=length,
        do_sample=False,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=use_cache and keeps_cache(model),
    )
    settings = {"generation_config": config, "logits_processor": LogitsProcessorList([*draws, Pulse(length)])}
    told, room = told_by_block(model, ids.numel()), room_in_cache(model, ids.shape[1] + length - 1)
    with told, shared_prompts(model, prompts), room, ended_rows_leave(model, stops), torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, **settings)
    answers = output[:, 0 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(answer) if token in stops), None) for answer in answers]
    return [(answer[:end][:max_new_tokens], end is not None) for answer, end in zip(answers, ends)]


class _Neutral(GenerationConfig):
    """Settings that the model's own generation config adds nothing to."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **settings: Any) -> Any:
        if defaults_only and allow_custom_entries:  # how `generate` fills in what the model's config says
            return {}
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **settings)


def generate_batches(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_tokens: int | None = None,
    skip: Collection[int] = (),
    reading: bool = False,
    during: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
) -> Iterator[Generated]:
    """Answer prompts, given as token ids, batch by batch; see `generate_tokens` for the sampling and for `reading`.

    They are answered in the order of `longest_first`. An answer depends on its prompt, its place among the prompts and
    the seed, and not on the batches; `seed` may hold one for each prompt instead. `skip` holds indices that need no
    answer. Where memory runs out a batch is answered in halves, and the others are as small.
    `during(rows)` is entered around the generation of each batch, to steer those rows or to read them.
    """
    todo = [i for i in range(len(prompts)) if i not in skip]
    budget = answers_budget(model, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    for batch, attempt in budget.batches([prompts[i] for i in todo], max_new_tokens):
        rows = [todo[i] for i in batch]
        with attempt, during(rows) if during else nullcontext() as read:
            answers = generate_tokens(
                model,
                tokenizer,
                [prompts[i] for i in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=[row_seed(seed, i) if isinstance(seed, int) else seed[i] for i in rows],
                reading=reading,
            )
        if not attempt.failed:
            yield Generated(rows, answers, read)


@overload
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: str | Conversation,
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> str: ...
@overload
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str] | Sequence[Conversation],
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> list[str]: ...
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: str | Conversation | Sequence[str] | Sequence[Conversation],
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> str | list[str]:
    """Answer a question, or several in batches; returns a string for one, else a list in the same order.

    A question is a text, or the messages of a conversation that ends with the user: `[{"role": "user", ...}]`.

    The answers are those of the model as it stands, with every edit that is active. `temperature=0` is greedy.
    `batch_tokens` is how many tokens a batch has at most, prompts and answers together; unless given, as many as the
    free memory holds, and no more than are of use.
    """
    one = isinstance(questions, str) or _is_conversation(questions)
    asked: list[Any] = [questions] if one else list(questions)
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens} and temperature {temperature}: give 1 or more, 0 or more")
    prompts = [encode(tokenizer, _prompt(tokenizer, question, system)) for question in asked]
    answers = [""] * len(asked)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with bar(desc="answers", unit="answers", total=len(asked)) as shown:
        for batch in generate_batches(model, tokenizer, prompts, batch_tokens=batch_tokens, **options):
            for i, (tokens, _) in zip(batch.rows, batch.answers):
                answers[i] = decode(tokenizer, tokens)
            shown.update(len(batch.rows))
    return answers[0] if one else answers


def _is_conversation(given: Any) -> bool:
    return bool(given) and isinstance(given, Sequence) and all(isinstance(message, Mapping) for message in given)


def _prompt(tokenizer: PreTrainedTokenizerBase, question: Any, system: str | None) -> str:
    if isinstance(question, str):
        return chat_prompt(tokenizer, question, system=system)
    if not _is_conversation(question):
        raise InputError(f"a question is {type(question).__name__}: give a text, or messages with a role and a content")
    opening = [] if system is None else [{"role": "system", "content": system}]
    return chat_text(tokenizer, [*opening, *question], add_generation_prompt=True)
