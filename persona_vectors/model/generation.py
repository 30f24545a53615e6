"""Generating answers in batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from persona_vectors.model.blocks import Model
from persona_vectors.model.prompts import batch_tokens_for, chat_prompt, decode, encode, left_pad, length_batches
from persona_vectors.model.wrappers import keeps_cache, unwrap


def stop_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer, from the model's generation config and its tokenizer."""
    config = getattr(model, "generation_config", None)
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
    use_cache: bool = True,
) -> list[tuple[list[int], bool]]:
    """Generate one answer to each prompt in one batch: its token ids without the end token, and whether it ended.

    Samples from the whole distribution (top_p 1, no top_k, no penalties) whatever the model's own generation config
    says; temperature 0 is greedy. The global random state is left as it was.
    """
    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    device = model.get_input_embeddings().weight.device
    ids, mask = left_pad(prompts, pad, device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
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
    return [(answer[:end], end is not None) for answer, end in zip(answers, ends)]


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
    progress: Callable[[int], object] | None = None,
) -> Any:
    """Answer a question, or several in batches; returns a string for a string, else a list in the same order.

    `progress` is called with the number of answers made after each batch.
    """
    model = unwrap(model)
    asked = [questions] if isinstance(questions, str) else list(questions)
    prompts = [encode(tokenizer, chat_prompt(tokenizer, question, system=system)) for question in asked]
    answers: list[str] = [""] * len(asked)
    budget = batch_tokens or 8 * batch_tokens_for(model)
    for number, batch in enumerate(length_batches(prompts, max_new_tokens, budget)):
        rows = generate_tokens(
            model,
            tokenizer,
            [prompts[i] for i in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + number,
        )
        for i, (answer, _) in zip(batch, rows):
            answers[i] = decode(tokenizer, answer)
        if progress:
            progress(len(batch))
    return answers[0] if isinstance(questions, str) else answers
