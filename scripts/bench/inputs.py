"""What the benchmarks read: a model, or random weights of a known shape, and rows of unequal lengths."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import load_trait
from persona_vectors.extraction.rollouts import plan
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.loading import load_model
from persona_vectors.model.passes import Row
from persona_vectors.vectors.vector import PersonaVector

# The shape of a model, for random weights: speed and memory do not depend on what the weights are.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "deep-thin": {  # a decoding step is Python and dispatch, as an eager one on a GPU is
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 28,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
ModelName = Annotated[str, typer.Option("--model", help="smollm2-135m, a Hub id, a folder or a .gguf file")]
Shape = Annotated[str | None, typer.Option(help=f"random weights of this shape instead: {', '.join(SHAPES)}")]
TraitName = Annotated[str, typer.Option(help="a shipped trait, or a JSON file")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu [default: the best there is]")]
Rounds = Annotated[int, typer.Option(help="rounds to take medians over", min=1)]
Out = Annotated[Path | None, typer.Option(help="write all numbers to this JSON file")]


def load(name: str, shape: str | None, device: str | None) -> tuple[Model, Any]:
    """Return a model and its tokenizer, or a random one of a known shape and None."""
    if shape is None:
        return load_model(name, device=device)
    if shape not in SHAPES:
        raise InputError(f"no shape {shape!r}: give one of {', '.join(SHAPES)}")
    if shape == "qwen2.5-7b" and not torch.cuda.is_available():
        raise InputError(
            f"--shape {shape} needs a CUDA GPU, and this machine has none: give --shape deep-thin or tiny, or --model"
        )
    return random_model(shape, device or ("cuda" if torch.cuda.is_available() else "cpu")), None


def random_model(shape: str, device: str) -> Model:
    """Build a model of a known shape with random bfloat16 weights, the same each time, made on the device."""
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def endless() -> PreTrainedTokenizerBase:
    """Return a tokenizer for a random model: it knows no words, and no token ends an answer."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


def any_vector(model: Model) -> PersonaVector:
    """Return a random vector of the model's shape: what it costs does not depend on where it points."""
    directions = torch.randn(model_shape(model), generator=torch.Generator().manual_seed(0))
    return PersonaVector(trait="random", model="bench", directions=directions)


def make_prompts(tokenizer: Any, count: int, vocabulary: int) -> list[list[int]]:
    """Return a trait's first prompts, as extraction makes them, or random ones of such lengths without a tokenizer."""
    if tokenizer is None:
        rng = random.Random(0)
        return [random_tokens(rng, rng.randint(50, 90), vocabulary) for _ in range(count)]
    tasks = plan(tokenizer, load_trait("optimistic"), first=None, samples=1)
    if count > len(tasks):
        raise InputError(f"--prompts is {count}, and the trait has {len(tasks)}: give at most that")
    return [list(task["prompt_ids"]) for task in tasks[:count]]


def make_rows(prompts: Sequence[list[int]], samples: int, answer_tokens: int, vocabulary: int) -> list[Row]:
    """Return rows of unequal lengths: random answers, log-normal in length, at most 4 times the mean."""
    rng, sigma = random.Random(1), 0.5
    rows: list[Row] = []
    for prompt in prompts:
        for _ in range(samples):
            length = round(rng.lognormvariate(math.log(answer_tokens) - sigma**2 / 2, sigma))
            rows.append((prompt, random_tokens(rng, min(max(length, 1), 4 * answer_tokens), vocabulary)))
    return rows


def random_tokens(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    return [rng.randrange(vocabulary) for _ in range(count)]


def unshared(rows: Sequence[Row]) -> list[Row]:
    """Return the same rows with a prompt of its own each: only the first token differs."""
    return [([index, *prompt[1:]], answer) for index, (prompt, answer) in enumerate(rows)]


def even(rows: Sequence[Row]) -> list[Row]:
    """Return as many rows, all of the mean length, so that batches of them need no padding."""
    whole = [token for prompt, answer in rows for token in (*prompt, *answer)]
    length = round(len(whole) / len(rows))
    return [(whole[:length], []) for _ in rows]
