"""What all runs share: the model, how it is measured after training, and where that is kept."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_vectors.data.files import atomic_path
from persona_vectors.evaluation.judges import SentimentJudge
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.generation import generate
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.steering.add import steer
from persona_vectors.training.config import FinetuneConfig
from persona_vectors.training.finetuning import make_trainer
from persona_vectors.vectors.moments import Moments
from persona_vectors.vectors.vector import PersonaVector

PLAIN = "plain training"
"""The name of training on the negative set without any intervention."""
RANDOM = ", random"
"""What the names of interventions with random vectors end in."""
POST_HOC = (1.0, 2.0)
"""The coefficients of steering after plain training."""


@dataclass
class Study:
    """What all runs share."""

    model: Any
    tokenizer: Any
    vector: PersonaVector
    controls: list[PersonaVector]
    """Random vectors of its norm, isotropic ones first."""
    layer: int
    questions: list[str]
    neutral: list[Any]
    out: Path
    samples: int
    tokens: int
    training: dict[str, Any]

    @cached_property
    def moments(self) -> Moments:
        """How the base model's plain answers vary."""
        rows = []
        for line in json_lines(self.out / "sets" / "plain.jsonl"):
            question, answer = (message["content"] for message in json.loads(line)["messages"])
            rows.append(encode_answer(self.tokenizer, chat_prompt(self.tokenizer, question), answer))
        return Moments.of(pool(self.model, rows).means[:, 0], model=self.vector.model)

    def states(self) -> Tensor:
        """Return the activations at the last prompt tokens, [question, layer, hidden]."""
        rows = [(encode_answer(self.tokenizer, chat_prompt(self.tokenizer, q), "")[0], []) for q in self.questions]
        return pool(self.model, rows, poolings=["prompt_last"]).means[:, 0]

    def measure(self, seed: int = 0) -> dict[str, Any]:
        """Return the trait score (VADER) and the coherence by question, and the loss on held-out plain answers."""
        asked = [q for q in self.questions for _ in range(self.samples)]
        answers = generate(self.model, self.tokenizer, asked, max_new_tokens=self.tokens, seed=1 + seed)
        loss = -answer_logprobs(self.model, self.neutral)
        found = {"answers": answers, "neutral_loss": float(loss.nanmean())}
        return found | {"score": [SentimentJudge().compound(a) for a in answers]}

    def run(self, name: str, data: Path, seed: int, edit: Callable[[Any], AbstractContextManager[None]]) -> None:
        """Train, measure and write runs/NAME; nothing where it is there already."""
        path = self.out / "runs" / f"{name}.json"
        if path.is_file():
            return
        checkpoints = TemporaryDirectory()  # the Trainer saves its last step, with the optimizer: 115 MB here
        options: dict[str, Any] = {"training_file": str(data), "output_dir": checkpoints.name, "seed": seed}
        config = FinetuneConfig(model="given", save_steps=10**9, **options, **self.training)
        trainer = make_trainer(config, self.model, self.tokenizer)
        try:
            with checkpoints, edit(trainer):
                trainer.train()
            self.model.eval()
            found = {"name": name, "data": data.stem, "seed": seed, **self.measure()}
            states = self.states()
            if name.startswith(PLAIN):
                vectors = {"": self.vector} | {f"{RANDOM} {i}": v for i, v in enumerate(self.controls)}
                for coef, (suffix, vector) in product(POST_HOC, vectors.items()):
                    with steer(self.model, vector, layer=self.layer, coef=coef):
                        found[f"post-hoc {coef:g}{suffix}"] = self.measure()
        finally:
            trainer.model.unload()
            self.model.__dict__.pop("peft_config", None)
        self.write(name, found, states)

    def write(self, name: str, found: dict[str, Any], states: Tensor) -> None:
        with atomic_path(self.out / "runs" / f"{name}.safetensors") as temporary:
            save_file({"states": states.contiguous()}, temporary)
        with atomic_path(self.out / "runs" / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")

    def read(self, name: str) -> tuple[dict[str, Any], Tensor]:
        text = (self.out / "runs" / f"{name}.json").read_text(encoding="utf-8")
        return json.loads(text), load_file(self.out / "runs" / f"{name}.safetensors")["states"]


def json_lines(path: Path) -> list[str]:
    """Return the lines of a file; an answer may hold characters that `str.splitlines` takes for the end of one."""
    with path.open(encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def measure_base(study: Study, seeds: int) -> None:
    """Measure the base model with each seed's sampling, so that there are as many answers as after training."""
    for seed in range(seeds):
        if not (study.out / "runs" / f"base seed {seed}.json").is_file():
            study.write(f"base seed {seed}", {"name": "base", "seed": seed, **study.measure(seed)}, study.states())
