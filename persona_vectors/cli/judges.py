"""The judge that a command line names, and what answers."""

from collections.abc import Callable
from typing import Any

import typer
from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import Trait
from persona_vectors.evaluation.check import require_valid_judge
from persona_vectors.evaluation.judge import Judge
from persona_vectors.evaluation.judges import ContrastJudge, LocalJudge, SentimentJudge
from persona_vectors.evaluation.likelihood import load_statements, shipped_statements
from persona_vectors.evaluation.served import Generate
from persona_vectors.model.blocks import Model


def make_judge(
    spec: str,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    trait: Trait,
    load: Callable[[str], tuple[Any, Any]],
) -> Judge | None:
    """Return the judge that a command line names: contrast[:PAIRS], sentiment, openai:MODEL, local:MODEL or none."""
    kind, _, name = spec.partition(":")
    if kind == "none":
        return None
    if kind == "contrast" and (not name or name.isdigit()):
        return ContrastJudge(model, tokenizer, trait, pairs=int(name) if name else None)
    if kind == "sentiment":
        return SentimentJudge()
    if kind == "local" and name:
        return LocalJudge(*load(name))
    if kind == "openai" and name:
        from persona_vectors.evaluation.openai_judge import OpenAIJudge

        return OpenAIJudge(name)
    raise InputError(f"no judge {spec!r}: give contrast[:PAIRS], sentiment, openai:MODEL, local:MODEL or none")


def needed_judge(
    spec: str, model: Any, tokenizer: Any, trait: Any, load: Callable[..., Any], *, check: str | None = None
) -> Judge:
    """Return the judge that a command needs, checked on the statements of the trait `check`."""
    judge = make_judge(spec, model, tokenizer, trait, load)
    if judge is None:
        raise InputError("this command needs a judge; without one, persona-vectors contrast scores a vector")
    if check is not None:
        if check not in shipped_statements():
            raise InputError(f"--check-judge needs statements, and none ship for {check!r}: use pv.require_valid_judge")
        typer.echo(str(require_valid_judge(judge, trait, load_statements(check))), err=True)
    return judge


def make_generate(spec: str | None, load: Callable[[], tuple[Any, Any]] | None = None) -> Generate | None:
    """Return what answers, as a command line names it: openai:MODEL, or workers:N that `load`; None: the model here."""
    kind, _, name = (spec or "").partition(":")
    if spec is None:
        return None
    if kind == "openai" and name:
        from persona_vectors.evaluation.openai_generator import OpenAIGenerator

        return OpenAIGenerator(name)
    if kind == "workers" and name.isdigit() and load is not None:
        from persona_vectors.evaluation.worker_generator import WorkerGenerator

        return WorkerGenerator(load, workers=int(name))
    raise InputError(
        f"--generate is {spec!r}: give openai:MODEL, with the server's address in OPENAI_BASE_URL, or workers:N"
    )
