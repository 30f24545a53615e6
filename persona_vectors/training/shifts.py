"""The finetuning shift: how far training has moved a model along persona vectors (paper, section 4)."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.model.blocks import Layer, Model
from persona_vectors.model.generation import generate
from persona_vectors.model.loading import load_model
from persona_vectors.monitoring.projection import project
from persona_vectors.vectors.directions import Key, vector_list
from persona_vectors.vectors.vector import PersonaVector

POOLINGS = ("prompt_last", "response_mean")


@dataclass(frozen=True, eq=False)
class Shift:
    """Projections on v/|v| before and after training, a row for each prompt."""

    keys: tuple[Key, ...]
    """The vectors' traits; (trait, layer) where several layers were read."""
    prompts: tuple[str, ...]
    base: Float[Tensor, "prompt pooling key"]
    """At the last prompt token, and averaged over the model's own answer (nan where none was generated)."""
    tuned: Float[Tensor, "prompt pooling key"]

    def interval(self, key: Key, pooling: str = "prompt_last") -> Interval:
        """Return the mean over prompts of tuned minus base, with its 95 % interval."""
        place = (slice(None), POOLINGS.index(pooling), self.keys.index(key))
        return mean_interval([[value] for value in (self.tuned - self.base)[place].tolist()])

    def __repr__(self) -> str:
        first = ", ".join(f"{key}: {self.interval(key)}" for key in self.keys[:4])
        return f"Shift({first}{', ...' * (len(self.keys) > 4)}; {len(self.prompts)} prompts)"

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each vector, layer and pooling: the means, their difference and its interval."""
        found = []
        for index, key in enumerate(self.keys):
            trait, _, named_layer = key.rpartition("@") if "@" in key else (key, "", "")
            layer = int(named_layer) if named_layer else None
            for number, pooling in enumerate(POOLINGS):
                means = [float(side[:, number, index].nanmean()) for side in (self.base, self.tuned)]
                if means[0] == means[0]:
                    named = {"trait": trait, "layer": layer, "pooling": pooling, "base": means[0], "tuned": means[1]}
                    found.append(named | dict(zip(("shift", "low", "high"), self.interval(key, pooling))))
        return found

    def save(self, path: str | Path) -> None:
        """Write the rows and the prompts as JSON."""
        with atomic_path(path) as temporary:
            found = {"rows": self.rows(), "prompts": self.prompts}
            temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def finetuning_shift(
    base: Model,
    tuned: Model | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    layer: Layer = "all",
    prompts: Sequence[str],
    max_new_tokens: int = 48,
    batch_tokens: int | None = None,
) -> Shift:
    """Return how far training moved a model along each vector: the same prompts, before and after.

    `tuned` is a model, or the folder or id of one; for an adapter's folder the base model is used twice, first without
    and then with it, and is as before afterwards. Both models answer each prompt greedily with `max_new_tokens` tokens
    for `response_mean`; 0 leaves that out, as the paper does.

    Raises InputError for vectors or a layer that do not fit both models, and where there are no prompts.
    """
    chosen = vector_list(vectors)
    if not prompts:
        raise InputError("no prompts: give one question or more")

    def read(model: Model) -> Any:
        answers = [""] * len(prompts)
        if max_new_tokens:
            options: Any = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "batch_tokens": batch_tokens}
            answers = generate(model, tokenizer, prompts, **options)
        asked = list(zip(prompts, answers))
        return project(model, tokenizer, asked, chosen, layer=layer, poolings=POOLINGS, batch_tokens=batch_tokens)

    before = read(base)
    if not isinstance(tuned, (str, Path)):
        after = read(tuned)
    elif (Path(tuned) / "adapter_config.json").is_file():
        with _adapted(base, Path(tuned)) as model:
            after = read(model)
    else:
        after = read(load_model(tuned, device=str(base.device), dtype=base.dtype)[0])
    return Shift(before.keys, tuple(prompts), before.values, after.values)


@contextmanager
def _adapted(base: Model, folder: Path) -> Iterator[Model]:
    """Lend the base model an adapter."""
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(
            f"{folder} holds an adapter: pip install 'persona-vectors-toolkit[train]' to load it"
        ) from None
    if hasattr(base, "peft_config"):
        raise InputError("base has an adapter already: give the model without it")
    trainable = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    try:
        yield model
    finally:
        model.unload()
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            base.__dict__.pop(attribute, None)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in trainable)
