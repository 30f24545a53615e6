"""Generating answers: one batch, or many prompts batch by batch."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, overload

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import batch_tokens_for, chat_prompt, decode, encode, left_pad, length_batches
from persona_vectors.model.wrappers import keeps_cache, unwrap

CACHED = 8
"""How many times as many tokens a batch of answers has as a forward pass: only their keys and values are kept."""


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
    seed: int = 0,
    reading: bool = False,
    use_cache: bool = True,
) -> list[tuple[list[int], bool]]:
    """Generate one answer to each prompt in one batch: its token ids without the end token, and whether it ended.

    Samples from the whole distribution (top_p 1, no top_k, no penalties) whatever the model's own generation config
    says; temperature 0 is greedy. The global random state is left as it was.

    With `reading` one token more is sampled than is kept, since the model never reads the last one: hooks then see
    every token of the answers, an answer that `max_new_tokens` cut included.
    """
    model = unwrap(model)
    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    device = model.get_input_embeddings().weight.device
    ids, mask = left_pad(prompts, pad, device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens + reading,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else 50,  # any other than 50, the default, is warned of in greedy search
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=use_cache and keeps_cache(model),
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    answers = output[:, 0 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(answer) if token in stops), None) for answer in answers]
    return [(answer[:end][:max_new_tokens], end is not None) for answer, end in zip(answers, ends)]


def generation_budget(model: Model, batch_tokens: int | None = None) -> int:
    """Return how many tokens a batch of prompts and answers has at most: `batch_tokens` where it is given."""
    return batch_tokens or CACHED * batch_tokens_for(model)


def generation_batches(
    model: Model, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, batch_tokens: int | None = None
) -> list[list[int]]:
    """Return the batches, as indices of prompts, in the order in which `generate_batches` answers them."""
    return length_batches(prompts, max_new_tokens, generation_budget(model, batch_tokens))


def batch_seed(seed: int, number: int) -> int:
    """Return the seed of batch `number` of a run: those of two runs with seeds side by side have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:6], "big")


def generate_batches(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    skip: Collection[int] = (),
    reading: bool = False,
    during: Callable[[list[int]], AbstractContextManager[Any]] | None = None,
) -> Iterator[Generated]:
    """Answer prompts, given as token ids, batch by batch; see `generate_tokens` for the sampling and for `reading`.

    `skip` holds indices that need no answer: whatever is skipped, the other batches and their seeds stay the same.
    `during(rows)` is entered around the generation of each batch, to steer those rows or to read them.
    """
    batches = generation_batches(model, prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens)
    for number, batch in enumerate(batches):
        rows = [i for i in batch if i not in skip]
        if not rows:
            continue
        with during(rows) if during else nullcontext() as read:
            answers = generate_tokens(
                model,
                tokenizer,
                [prompts[i] for i in rows],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=batch_seed(seed, number),
                reading=reading,
            )
        yield Generated(rows, answers, read)


@overload
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: str,
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
    questions: Sequence[str],
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
    questions: str | Sequence[str],
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> str | list[str]:
    """Answer a question, or several in batches; returns a string for a string, else a list in the same order.

    The answers are those of the model as it stands, with every edit that is active. `temperature=0` is greedy.
    `batch_tokens` is how many tokens a batch has at most, prompts and answers together.
    """
    asked = [questions] if isinstance(questions, str) else list(questions)
    prompts = [encode(tokenizer, chat_prompt(tokenizer, question, system=system)) for question in asked]
    answers = [""] * len(asked)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with bar(desc="answers", unit="answers", total=len(asked)) as shown:
        for batch in generate_batches(model, tokenizer, prompts, batch_tokens=batch_tokens, **options):
            for i, (tokens, _) in zip(batch.rows, batch.answers):
                answers[i] = decode(tokenizer, tokens)
            shown.update(len(batch.rows))
    return answers[0] if isinstance(questions, str) else answers
