"""What the commands share: the app, the options that several have, and loading a model for them."""

from typing import Annotated, Any

import typer

from persona_vectors.data.errors import InputError

JUDGES = "contrast[:PAIRS], sentiment, openai:MODEL, local:MODEL or none"
app = typer.Typer(
    help="Extract persona vectors from language models, and steer with them (arXiv 2507.21509).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="smollm2-135m, a Hub id, a folder or a .gguf file")]
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu [default: the best there is]")]
DType = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 ... [default: bfloat16 on a GPU]")]
DeviceMap = Annotated[str | None, typer.Option(help="let accelerate place the weights, say: auto")]
Fold = Annotated[bool, typer.Option("--fold-system", help="put the system prompt into the user's turn")]
Seed = Annotated[int, typer.Option(help="random seed: the same run gives the same answers")]
MaxNewTokens = Annotated[int, typer.Option(help="most tokens of an answer")]
BatchTokens = Annotated[int | None, typer.Option(help="tokens a batch: lower it when memory runs out")]


def load(name: str, device: str | None, dtype: str | None, device_map: str | None, fold: bool = False) -> Any:
    import torch
    from transformers.utils import logging

    from persona_vectors.model.loading import load_model
    from persona_vectors.model.prompts import fold_system_role

    logging.disable_progress_bar()

    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise InputError(f"no dtype {dtype!r}: give float32, bfloat16 or float16")
    model, tokenizer = load_model(name, device=device, dtype=kind, device_map=device_map)
    return model, fold_system_role(tokenizer) if fold else tokenizer
