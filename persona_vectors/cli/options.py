"""What the commands share: the app, the options that several have, how they load models and print tables."""

import functools
import inspect
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.data.errors import InputError

JUDGES = "contrast[:PAIRS], sentiment, openai:MODEL, local:MODEL or none"
app = typer.Typer(
    help="Extract persona vectors from language models, and steer with them (arXiv 2507.21509).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m, a Hub id, a folder or a .gguf file")]
TraitArg = Annotated[str, typer.Argument(metavar="TRAIT", help="a shipped trait's name, or a JSON file")]
VectorArg = Annotated[str, typer.Argument(metavar="VECTOR", help="a .safetensors file, or the name of a shipped one")]
VectorArgs = Annotated[
    list[str], typer.Argument(metavar="VECTOR...", help="one or more .safetensors files, or names of shipped ones")
]
LayerOption = Annotated[
    list[str], typer.Option(metavar="LAYER", help="decoder blocks from 0: 13, or 13,22, or 10-20, or all; repeatable")
]
OptionalLayer = Annotated[
    list[str] | None,
    typer.Option("--layer", metavar="LAYER", help="as 13, or 13,22, or 10-20, or all (default: the recommended one)"),
]
Store = Annotated[bool, typer.Option("--store", help="keep the finding in the vector's file, as its recommended use")]
Positions = Annotated[
    str, typer.Option(help="where the vector is added: all, prompt or response; a thinking model's answer or reasoning")
]
Questions = Annotated[list[str], typer.Option("--question", help="a question to answer; repeat for more")]
System = Annotated[str | None, typer.Option(help="a system prompt")]
Temperature = Annotated[float, typer.Option(help="0 is greedy", min=0)]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu (default: the best there is)")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 ... (default: bfloat16 on a GPU)")]
DeviceMap = Annotated[str | None, typer.Option(help="let accelerate place the weights, say: auto")]
Attention = Annotated[str | None, typer.Option("--attn-implementation", help="sdpa, eager, flash_attention_2 ...")]
Quantization = Annotated[str | None, typer.Option(help="load in fewer bits: nf4 or int8; needs the extra quantize")]
TPPlan = Annotated[str | None, typer.Option(help="shard over torchrun's processes: auto; the first one writes")]
Template = Annotated[Path | None, typer.Option("--chat-template", help="a file with a Jinja chat template")]
Fold = Annotated[bool, typer.Option("--fold-system", help="put the system prompt into the user's turn")]
Seed = Annotated[int, typer.Option(help="random seed: the same run gives the same answers")]
Samples = Annotated[int, typer.Option(help="answers to each question", min=1)]
First = Annotated[int | None, typer.Option(help="take only the first N extraction questions", min=1)]
MaxNewTokens = Annotated[int, typer.Option(help="most tokens of an answer", min=1)]
Span = Annotated[str, typer.Option("--positions", help="what is read of a thinking model: all, answer or reasoning")]
BatchTokens = Annotated[int | None, typer.Option(help="tokens a batch: lower it when memory runs out")]
GenerateOption = Annotated[
    str | None,
    typer.Option(
        help="openai:MODEL: the server at OPENAI_BASE_URL (vLLM, SGLang, llama.cpp) answers; workers:N: Ray actors do"
    ),
]
Workers = Annotated[int, typer.Option(help="Ray actors that load the model each; RAY_ADDRESS names a cluster", min=1)]
GPUs = Annotated[float | None, typer.Option(help="GPUs of a worker (default: 1 where there is one)", min=0)]
Json = Annotated[bool, typer.Option("--json", help="print the table as JSON, and nothing else")]

Load = functools.partial
"""What loads a model and its tokenizer by name, with the command's options as its keywords."""
_LOADING: dict[str, tuple[Any, Any]] = {
    "device": (Device, None),
    "dtype": (DType, None),
    "device_map": (DeviceMap, None),
    "attn_implementation": (Attention, None),
    "quantization": (Quantization, None),
    "tp_plan": (TPPlan, None),
    "fold_system": (Fold, False),
    "chat_template": (Template, None),
}


def loads_models(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of loading a model; it is passed `load`, which does so by name."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        picked = {name: given.pop(name) for name in _LOADING}
        command(**given, load=functools.partial(load_by_name, **picked))

    own = [p for p in inspect.signature(command).parameters.values() if p.name != "load"]
    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, kind, default=d, annotation=a) for name, (a, d) in _LOADING.items()]
    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
    return run


def load_by_name(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
    tp_plan: str | None = None,
    fold_system: bool = False,
    chat_template: Path | None = None,
) -> tuple[Any, Any]:
    """Return a model and its tokenizer, as the options of a command line say; raises InputError for a bad one."""
    import torch
    from transformers.utils import logging

    from persona_vectors.model.loading import load_model
    from persona_vectors.model.prompts import fold_system_role

    brief = {"delay": 1, "leave": False}  # a model that loads at once shows no bar, and a large one is not silent
    logging.set_tqdm_hook(lambda made, given, options: made(*given, **{**options, **brief}))
    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise InputError(f"no dtype {dtype!r}: give float32, bfloat16 or float16")
    if chat_template is not None and not chat_template.is_file():
        raise InputError(f"no file --chat-template {chat_template}: give one that holds a Jinja template")
    placing: dict[str, Any] = {"device": device, "device_map": device_map, "tp_plan": tp_plan}
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "quantization": quantization}
    model, tokenizer = load_model(name, dtype=kind, **placing, **options)
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text(encoding="utf-8")
    return model, fold_system_role(tokenizer) if fold_system else tokenizer


def elsewhere_by_name(name: str, load: Load, gpus_per_worker: float | None) -> tuple[Any, Any]:
    """Return a model that Ray's actors load, and its tokenizer."""
    from persona_vectors.model.actors import Elsewhere

    model = Elsewhere(functools.partial(load, name), gpus_per_worker=gpus_per_worker)
    return model, model.tokenizer


def layers(given: Sequence[str] | None, *, option: str = "--layer") -> Any:
    """Return the layers of an option: "all", or numbers from 13, 13,22 and 10-20; a single one as a number."""
    parts = [part.strip() for text in given or ["all"] for part in text.split(",")]
    if parts == ["all"]:
        return "all"
    found: list[int] = []
    for part in parts:
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InputError(f"{option} is {' '.join(given or [])!r}: give 13, or 13,22, or 10-20, or all")
        found += range(int(first), int(last if dash else first) + 1)
    return found[0] if len(found) == 1 else found


def numbers(given: Sequence[str] | str | None, *, option: str) -> list[float] | None:
    """Return the numbers of an option, with commas between them or repeated; None where it is not given."""
    texts = [given] if isinstance(given, str) else list(given or [])
    try:
        return [float(part) for text in texts for part in text.split(",")] or None
    except ValueError:
        raise InputError(f"{option} is {' '.join(texts)!r}: give numbers with commas between them") from None


def read_questions(text: str) -> list[str]:
    """Return the questions of a text file, one a line, or a trait's evaluation questions."""
    from persona_vectors.data.traits import load_trait

    path = Path(text)
    if path.is_file() and path.suffix != ".json":
        asked = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        asked = list(load_trait(text).questions.eval)
    if not asked:
        raise InputError(f"--questions {text} holds no question: give a text file, one a line, or a trait")
    return asked


def load_vectors(names: Sequence[str]) -> list[Any]:
    """Return the vectors of files, or shipped ones by name; raises InputError where two are of one trait."""
    from persona_vectors.vectors.shipped import load_vector

    loaded: dict[str, Any] = {}
    for name in names:
        vector = load_vector(name)
        if vector.trait in loaded:
            raise InputError(f"{name} holds another vector called {vector.trait!r}: give one of each trait")
        loaded[vector.trait] = vector
    return list(loaded.values())


def check_storable(names: Sequence[str]) -> None:
    """Raise InputError where --store has no file of the user's to write into."""
    for name in names:
        if not Path(name).is_file():
            raise InputError(f"--store writes into the vector's file, and {name} is none: give a .safetensors file")


def store_use(name: str, vector: Any, use: Any) -> None:
    """Write a use into the file of its vector, and say so."""
    vector.with_use(use).save(name)
    typer.echo(f"{use} -> {name}", err=True)


def command_line() -> str:
    """Return the command that is running, without this machine's folders."""
    words = [Path(text).name if text.startswith("/") else text for text in sys.argv[1:]]
    return shlex.join(["persona-vectors", *words])


def echo_table(rows: Sequence[dict[str, Any]], *, as_json: bool, text: Callable[[], str]) -> None:
    """Print a table: its rows as JSON where asked for, else `text()`."""
    typer.echo(json.dumps(list(rows), indent=1, ensure_ascii=False, default=str) if as_json else text())


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    from persona_vectors.data.files import atomic_path

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)


def run_file(command: str, model: Any, name: str, **settings: Any) -> Path:
    """Return where a command keeps what it has, a file for each model and settings, and say so on standard error."""
    from persona_vectors.evaluation.judge import judge_name
    from persona_vectors.model.blocks import model_name
    from persona_vectors.model.identity import fingerprint, hash_of

    plain = {key: judge_name(value) if callable(value) else value for key, value in settings.items()}
    plain.pop("batch_tokens", None)  # no answer depends on it
    told = hash_of({**plain, "weights": fingerprint(model)})[:8]
    path = Path("runs") / command / Path(model_name(model)).name / f"{name}-{told}.jsonl"
    typer.echo(f"kept as it comes: {path}", err=True)
    return path
