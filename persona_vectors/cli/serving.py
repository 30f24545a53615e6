"""The command that serves: serve."""

from functools import partial
from typing import Annotated

import typer

from persona_vectors.cli.options import Load, ModelArg, VectorArgs, app, load_vectors, loads_models


@app.command()
@loads_models
def serve(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    layer: Annotated[int | None, typer.Option(help="the layer of edits that name none (default: recommended)")] = None,
    host: Annotated[str, typer.Option(help="the address; one that others can reach needs PERSONA_VECTORS_API_KEY")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    rows: Annotated[int, typer.Option(help="answers that share a forward pass", min=1)] = 16,
    waiting: Annotated[
        int, typer.Option(help="answers that may wait; beyond it requests are refused (429)", min=0)
    ] = 64,
    seconds: Annotated[float, typer.Option(help="how long a request may take", min=0)] = 600.0,
    hosts: Annotated[list[str], typer.Option("--allow-host", help="a further name that requests may ask for")] = [],  # noqa: B006
    load: Load,
) -> None:
    """Serve a model to OpenAI's clients and as a page, with steering and projections for each request.

    Example: persona-vectors serve smollm2-135m smollm2-135m/optimistic --layer 13
    """
    from persona_vectors.serving.run import serve as run

    loaded_vectors = load_vectors(vectors)
    loaded, tokenizer = load(model)
    run(
        loaded,
        tokenizer,
        loaded_vectors,
        layer=layer,
        host=host,
        port=port,
        rows=rows,
        waiting=waiting,
        seconds=seconds,
        hosts=hosts,
        announce=partial(typer.echo, err=True),
    )
