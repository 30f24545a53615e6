"""From a request to jobs: its vectors and layers found, its prompt put into tokens."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, model_name, model_shape, one_layer
from persona_vectors.model.prompts import chat_text, encode
from persona_vectors.model.sampling import row_seed
from persona_vectors.model.wrappers import unwrap
from persona_vectors.serving.asked import ChatAsked, EditAsked, TextAsked
from persona_vectors.serving.changes import Change
from persona_vectors.serving.rows import End, Job, Token
from persona_vectors.vectors.directions import per_dose, unit_directions
from persona_vectors.vectors.vector import PersonaVector


@dataclass(frozen=True)
class Served:
    """What a server serves: one model, and the vectors that requests may name."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    vectors: dict[str, PersonaVector]
    layer: int
    """The layer of edits and projections that name none."""
    seconds: float = 600.0
    """How long a request may take; it may ask for less."""

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return model_name(self.model)

    @property
    def longest(self) -> int:
        """How many tokens a prompt and its answer may have."""
        config = unwrap(self.model).config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 8192

    def find(self, name: str, layer: int | None) -> tuple[PersonaVector, int]:
        """Return a vector and its layer; raises InputError where one is not served."""
        if name not in self.vectors:
            raise InputError(f"no vector {name[:60]!r} here: give one of {', '.join(self.vectors) or 'none'}")
        vector, index = self.vectors[name], self.layer if layer is None else layer
        one_layer(index, model_shape(self.model)[0])
        return vector, index

    def key(self, key: str) -> tuple[int, int]:
        """Return the layer and the vector's index that "evil", or "evil@13", names."""
        name, at, layer = (key, "", "") if key in self.vectors else key.rpartition("@")
        if at and not layer.isdecimal():
            raise InputError(f"{key[:60]!r} names no projection: give a vector's name, or name@layer")
        vector, index = self.find(name if at else key, int(layer) if at else None)
        unit_directions(self.model, [vector], index)
        return index, list(self.vectors).index(vector.trait)

    def change(self, asked: EditAsked) -> Change:
        """Return an edit; raises InputError where it lacks its number, or has another kind's."""
        vector, layer = self.find(asked.vector, asked.layer)
        vector.check_edits()
        needs = {"steer": ("coef", "dose"), "cap": ("limit",), "floor": ("limit",), "ablate": ()}[asked.kind]
        given = {name: value for name in ("coef", "dose", "limit") if (value := getattr(asked, name)) is not None}
        if len(given) != bool(needs) or not given.keys() <= set(needs):
            raise InputError(
                f"an edit of kind {asked.kind!r} needs {' or '.join(needs) or 'no number'}: give that alone"
            )
        amount = next(iter(given.values()), 0.0) * (per_dose(vector, layer) if "dose" in given else 1.0)
        if asked.kind != "steer":
            unit_directions(self.model, [vector], layer)  # it has to have a direction there
        return Change(asked.kind, vector, layer, amount, asked.positions)


_ECHO = 2048
"""Most tokens of a prompt whose log-probabilities are told: each has a number for every word that the model knows."""


@dataclass(frozen=True)
class Plan:
    """The jobs of a request: `n` for each prompt, in order."""

    jobs: list[Job]
    changes: list[Change]
    seed: int

    def cancel(self) -> None:
        """Free the rows of jobs that have not ended."""
        for job in self.jobs:
            job.cancelled = True


def make_plan(
    served: Served, asked: ChatAsked | TextAsked, put: Callable[[int], Callable[[Token | End], object]]
) -> Plan:
    """Return a request's jobs; raises InputError for what cannot be done. `put(i)` is given what job i tells.

    Without a seed one is drawn, and told, so that the answer can be had again.
    """
    asked.check()
    if asked.model != served.name:
        raise InputError(f"no model {asked.model[:60]!r} here: give {served.name!r}")
    ours = asked.persona_vectors
    changes = [served.change(edit) for edit in ours.edits]
    keys = {key: served.key(key) for key in [*ours.project, *ours.alarm]}
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    prompts = _prompts(served, asked)
    if len(prompts) * asked.n > 64:
        raise InputError(f"{len(prompts)} prompts of {asked.n} answers each are more than 64: send several requests")
    echo = isinstance(asked, TextAsked) and asked.echo
    if echo and max(map(len, prompts), default=0) > _ECHO:
        raise InputError(f"echo takes prompts of at most {_ECHO} tokens: give shorter ones")
    deadline, jobs = time.monotonic() + min(ours.seconds or served.seconds, served.seconds), []
    for number in range(len(prompts) * asked.n):
        prompt = prompts[number // asked.n]
        room = served.longest - len(prompt)
        if not prompt or room < 1:
            raise InputError(f"the prompt has {len(prompt)} tokens: give 1 to {served.longest - 1}")
        jobs.append(
            Job(
                prompt,
                put(number),
                min(asked.longest, room),
                deadline,
                asked.temperature,
                asked.top_p,
                row_seed(seed, number),
                asked.stop,
                asked.top,
                echo,
                changes,
                keys,
                ours.alarm,
            )
        )
    return Plan(jobs, changes, seed)


def _prompts(served: Served, asked: ChatAsked | TextAsked) -> list[list[int]]:
    if isinstance(asked, ChatAsked):
        messages = [message.plain() for message in asked.messages]
        return [encode(served.tokenizer, chat_text(served.tokenizer, messages, add_generation_prompt=True))]
    given: Sequence = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    rows = [given] if given and isinstance(given[0], int) else given
    known = unwrap(served.model).get_input_embeddings().num_embeddings
    tokens = [list(served.tokenizer(row).input_ids) if isinstance(row, str) else list(row) for row in rows]
    if any(not 0 <= token < known for row in tokens for token in row):
        raise InputError(f"the prompt has tokens that the model lacks: give 0 to {known - 1}")
    return tokens
