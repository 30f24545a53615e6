"""The finetuning shift: how far training has moved a model along persona vectors (paper, section 4)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.files import writing
from persona_vectors.data.intervals import Interval, mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.tables import Stored, Table
from persona_vectors.evaluation.asks import Ask, check_state, keep_answers
from persona_vectors.model.blocks import Layer, Model
from persona_vectors.model.devices import virtual_tokens
from persona_vectors.model.identity import hash_of, identity
from persona_vectors.model.loading import load_model
from persona_vectors.monitoring.projection import project
from persona_vectors.training.quiet import as_named_today
from persona_vectors.vectors.directions import Key, unit_directions, vector_keys, vector_list
from persona_vectors.vectors.moments import Moments
from persona_vectors.vectors.nulls import Nulls, nulls_of, vectors_alone, with_nulls
from persona_vectors.vectors.vector import PersonaVector

POOLINGS = ("prompt_last", "response_mean")


@dataclass(frozen=True, eq=False)
class Shift(Table):
    """Projections on v/|v| before and after training, a row for each question."""

    traits: tuple[str, ...]
    layers: tuple[int, ...]
    questions: tuple[str, ...]
    base: Annotated[Float[Tensor, "question pooling key"], Stored[0], Stored[1]]
    """At the last prompt token, and averaged over the model's own answer (nan where none was generated).
    A key is a vector at a layer, in the order of `keys`."""
    tuned: Annotated[Float[Tensor, "question pooling key"], Stored[0], Stored[1]]
    nulls: Nulls | None = None
    """Where the vectors' mean shifts, in standard deviations over the questions, lie among those of random directions;
    None unless they were asked for."""

    @property
    def keys(self) -> list[Key]:
        """The vectors' traits; "trait@layer" where several layers were read."""
        return vector_keys(self.traits, self.layers)

    def interval(self, key: Key, pooling: str = "prompt_last") -> Interval:
        """Return the mean over questions of tuned minus base, with its 95 % interval."""
        place = (slice(None), POOLINGS.index(pooling), self.keys.index(key))
        return mean_interval([[value] for value in (self.tuned - self.base)[place].tolist()])

    def __repr__(self) -> str:
        first = ", ".join(f"{key}: {self.interval(key):+.2f}" for key in self.keys[:4])
        beside = f"; beside {self.nulls.random.shape[2]} random directions" if self.nulls else ""
        return f"Shift({first}{', ...' * (len(self.keys) > 4)}; {len(self.questions)} questions{beside})"

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each vector, layer and pooling: the means, their difference and its interval.

        Where random directions were read: the difference in standard deviations too, and the shares that it beats.
        """
        found = []
        places = [(trait, layer) for layer in self.layers for trait in self.traits]
        for index, (key, (trait, layer)) in enumerate(zip(self.keys, places)):
            for number, pooling in enumerate(POOLINGS):
                means = [float(side[:, number, index].nanmean()) for side in (self.base, self.tuned)]
                if means[0] == means[0]:
                    named = {"trait": trait, "layer": layer, "pooling": pooling, "base": means[0], "tuned": means[1]}
                    place = self.nulls.place(trait, layer=layer, pooling=pooling)._asdict() if self.nulls else {}
                    found.append(named | self.interval(key, pooling).columns("shift") | place)
        return found


def finetuning_shift(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    tuned: Model | str | Path,
    questions: Sequence[str],
    layer: Layer = "all",
    max_new_tokens: int = 48,
    controls: int = 0,
    reference: Moments | None = None,
    batch_tokens: int | None = None,
    out: str | Path | None = None,
) -> Shift:
    """Return how far training moved a model along each vector: the same questions, before and after.

    `tuned` is what training made of `model`: a model, or the folder or id of one; for an adapter's folder `model` is
    used twice, first without and then with it, and is as before afterwards. Both answer each question greedily with
    `max_new_tokens` tokens for `response_mean`; 0 leaves that out, as the paper does.

    Training moves a model along most directions. `controls` random ones are read in the same passes, half isotropic,
    half with the covariance of `reference`, by default `neutral_moments` of `model`'s answers on plain facts, and the
    result's `nulls` says how many of them have moved less, in standard deviations over the questions. Answers are kept
    in the JSONL file `out` as they come: a run that was killed goes on there.

    Raises InputError for vectors or a layer that do not fit both models, where there are no questions, and where `out`
    holds answers of other models.
    """
    chosen = vector_list(vectors)
    if not questions:
        raise InputError("no questions: give one or more")
    layers = list(unit_directions(model, chosen, layer))
    null: dict[str, Any] = {"layers": layers, "controls": controls, "reference": reference}
    beside, source = with_nulls(model, tokenizer, chosen, **null)

    def read(model: Model, side: str) -> Tensor:
        answers = [""] * len(questions)
        if max_new_tokens:
            check_state(ledger, model, tokenizer, key=side)
            keys = [hash_of([side, question, max_new_tokens]) for question in questions]
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "judge": None}
            options |= {"batch_tokens": batch_tokens, "rubric": "", "desc": f"answers of the {side} model"}
            found = keep_answers(model, tokenizer, [Ask(q) for q in questions], keys, ledger, **options)
            answers = [entry["answer"] for entry in found]
        asked = list(zip(questions, answers))
        scores = project(model, tokenizer, asked, beside, layer=layers, poolings=POOLINGS, batch_tokens=batch_tokens)
        return scores.values

    with writing(out):
        ledger = Ledger(out, identity(model, tokenizer))
        before = read(model, "base")
        with _tuned(model, tuned) as other:
            after = read(other, "tuned")
    traits = [vector.trait for vector in chosen]
    nulls = nulls_of(after - before, traits=traits, layers=layers, poolings=POOLINGS, reference=source)
    base, moved = (vectors_alone(values, vectors=len(traits), layers=len(layers)) for values in (before, after))
    return Shift(tuple(traits), tuple(layers), tuple(questions), base, moved, nulls)


@contextmanager
def _tuned(base: Model, tuned: Model | str | Path) -> Iterator[Model]:
    """Lend what training made of the base model."""
    if not isinstance(tuned, (str, Path)):
        yield tuned
    elif (Path(tuned) / "adapter_config.json").is_file():
        with _adapted(base, Path(tuned)) as adapted:
            yield adapted
    else:
        yield load_model(tuned, device=str(base.device), dtype=base.dtype)[0]


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
    with as_named_today():
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    try:
        yield model
    finally:
        if not virtual_tokens(model):  # prompt and prefix tuning put nothing into the base
            model.unload()
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            base.__dict__.pop(attribute, None)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name in trainable)
