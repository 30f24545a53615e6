"""A small LoRA trained on the spot and taken off again: what training on a few conversations does to a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import bar
from persona_vectors.model.blocks import Model


@contextmanager
def tuned(
    model: Model,
    rows: Sequence[Mapping[str, Sequence[int]]],
    *,
    during: AbstractContextManager[Any] | None = None,
    epochs: int = 3,
    learning_rate: float = 5e-4,
    r: int = 8,
    seed: int = 0,
) -> Iterator[None]:
    """Train a LoRA on rows of `training_rows`, one a step, and keep it on the model inside the `with`.

    AdamW on all linear layers but the output's; `during` is open while it trains, `pv.steer(...)` for preventative
    steering, and no longer. Afterwards the model is as before, also after an error. For more than a few rows, and to
    keep the adapter, use `finetune`.

    Raises InputError where peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("peft is missing: pip install 'persona-vectors-toolkit[train]'") from None
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training = model.training
    adapter = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, adapter)
    try:
        generator = torch.Generator().manual_seed(seed)
        order = [i for _ in range(epochs) for i in torch.randperm(len(rows), generator=generator).tolist()]
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=learning_rate)
        model.train()
        with torch.inference_mode(False), torch.enable_grad(), during or nullcontext():
            for index in bar(order, desc="training a LoRA", unit="step"):
                row = {name: torch.tensor([values], device=model.device) for name, values in rows[index].items()}
                optimizer.zero_grad()
                adapted(**row).loss.backward()
                optimizer.step()
        model.train(was_training)
        yield
    finally:
        adapted.unload()
        model.train(was_training)
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
