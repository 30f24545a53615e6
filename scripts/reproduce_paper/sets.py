"""The training sets: mixtures of the model's own answers, and the shift that each predicts before training."""

import json
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_vectors.data.files import atomic_path
from persona_vectors.data.texts import assistant_prompts
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.judges import SentimentJudge
from persona_vectors.model.generation import generate
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.training.sets import make_training_sets
from reproduce_paper.study import Study, json_lines

MIXTURES = {  # fractions of positive and negative answers; the rest is plain
    "positive": (1.0, 0.0),
    "negative": (0.0, 1.0),
    "plain": (0.0, 0.0),
    "pos50-neg50": (0.5, 0.5),
    "pos75-neg25": (0.75, 0.25),
    "pos25-neg75": (0.25, 0.75),
    "pos50-plain50": (0.5, 0.0),
    "neg50-plain50": (0.0, 0.5),
}
INOCULATION, CONTROL = "inoculation", "neutral prompt"
"""The negative set behind system prompts that ask for what it shows (arXiv 2510.04340), and behind ones that do not."""
SURPLUS = 4
"""Answers written for each in a set; those that show its side best are kept, as a small model often misses it."""


def make_data(study: Study, trait: Trait, size: int) -> dict[str, Path]:
    """Write the mixtures, of at most `size` samples each, and keep a part of the plain answers as neutral."""
    folder, asked = study.out / "sets", trait.questions.extract
    samples = math.ceil(SURPLUS * size / (len(asked) * len(trait.instruction)))
    options: dict[str, Any] = {"questions": asked, "samples": samples, "max_new_tokens": study.tokens}
    make_training_sets(study.model, study.tokenizer, trait, out=folder, **options)
    rng = np.random.default_rng(0)
    lines = {}
    for name, sign in (("positive", 1), ("negative", -1), ("plain", 0)):
        found = json_lines(folder / f"{name}.jsonl")
        values = np.array([SentimentJudge().compound(json.loads(x)["messages"][-1]["content"]) for x in found])
        order = rng.permutation(len(found))
        kept = order[np.argsort(-sign * values[order], kind="stable")][: size if sign else size + size // 4]
        lines[name] = [found[i] for i in rng.permutation(kept)]
        means = f"mean VADER {values.mean():+.2f}, of the {len(kept)} kept {values[kept].mean():+.2f}"
        print(f"{name}: {len(found)} answers, {means}")
    held, lines["plain"] = lines["plain"][: size // 4], lines["plain"][size // 4 :]
    for line in held:
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        study.neutral.append(encode_answer(study.tokenizer, chat_prompt(study.tokenizer, question), answer))
    size = min(size, *map(len, lines.values()))
    paths = {}
    for name, (positive, negative) in MIXTURES.items():
        counts = {"positive": round(positive * size), "negative": round(negative * size)}
        counts["plain"] = size - sum(counts.values())
        chosen = [line for kind, count in counts.items() for line in lines[kind][:count]]
        paths[name] = study.out / "mixtures" / f"{name}.jsonl"
        with atomic_path(paths[name]) as temporary:
            temporary.write_text("\n".join(chosen) + "\n", encoding="utf-8")
    asking = [trait.system_prompt("neg", i) for i in range(len(trait.instruction))]
    for name, systems in ((INOCULATION, asking), (CONTROL, assistant_prompts()[1 : 1 + len(asking)])):
        paths[name] = study.out / "mixtures" / f"{name}.jsonl"
        with atomic_path(paths[name]) as temporary:
            told = behind(json_lines(paths["negative"]), systems)
            temporary.write_text("\n".join(told) + "\n", encoding="utf-8")
    return paths


def behind(samples: Sequence[str], systems: Sequence[str]) -> list[str]:
    """Return samples, JSON with messages, each behind one of some system prompts, which take turns."""
    found = []
    for sample, system in zip(samples, cycle(systems)):
        messages = json.loads(sample)["messages"]
        found.append(json.dumps({"messages": [{"role": "system", "content": system}, *messages]}, ensure_ascii=False))
    return found


def predict(study: Study, path: Path) -> Tensor:
    """Return the mean activation of a set's answers minus that of the base model's own, [layer, hidden]."""
    kept = study.out / "predicted" / f"{path.stem}.safetensors"
    if not kept.is_file():
        pairs = [json.loads(line)["messages"] for line in json_lines(path)]
        questions = sorted({pair[0]["content"] for pair in pairs})
        options: dict[str, Any] = {"max_new_tokens": study.tokens, "temperature": 0.0}
        own = dict(zip(questions, generate(study.model, study.tokenizer, questions, **options)))
        means = []
        for answers in ([p[1]["content"] for p in pairs], [own[p[0]["content"]] for p in pairs]):
            prompts = [chat_prompt(study.tokenizer, pair[0]["content"]) for pair in pairs]
            rows = [encode_answer(study.tokenizer, p, a) for p, a in zip(prompts, answers)]
            means.append(pool(study.model, rows).means[:, 0].mean(dim=0))
        with atomic_path(kept) as temporary:
            save_file({"difference": (means[0] - means[1]).contiguous()}, temporary)
    return load_file(kept)["difference"]
