"""The command that has a new trait written."""

from pathlib import Path
from typing import Annotated

import typer

from persona_vectors.cli.options import app
from persona_vectors.data.errors import InputError


@app.command(name="new-trait")
def new_trait(
    name: Annotated[str, typer.Argument(metavar="NAME", help="one word: the trait's name")],
    description: Annotated[str, typer.Option(help="what the trait means, how it shows, and what its opposite is")],
    llm: Annotated[str, typer.Option(help="the chat model that writes it")],
    base_url: Annotated[str | None, typer.Option(help="an OpenAI-compatible server [default: OPENAI_BASE_URL]")] = None,
    out: Annotated[Path | None, typer.Option(help="the file to write [default: NAME.json]")] = None,
    force: Annotated[bool, typer.Option("--force", help="write over a file that is there")] = False,
) -> None:
    """Have a chat model write a trait: 5 instruction pairs, 20 + 20 questions and a judge prompt.

    The reply is checked, mended or sent back, and shown for you to edit. The key is read from OPENAI_API_KEY.

    Example: persona-vectors new-trait curious --description "Curiosity is the wish to know more. It shows in ..."
    --llm my-model --base-url http://127.0.0.1:8000/v1
    """
    from persona_vectors.extraction.trait_writer import write_trait

    path = out or Path(f"{name}.json")
    if path.exists() and not force:
        raise InputError(f"{path} is there already: give another --out, or --force to write over it")
    trait = write_trait(name, description, llm=llm, base_url=base_url)
    trait.save(path)
    typer.echo(f"{trait.positive_adjective} against {trait.negative_adjective}")
    for pair in trait.instruction:
        typer.echo(f"+ {pair.pos}\n- {pair.neg}")
    typer.echo("questions, such as:\n" + "\n".join(f"  {question}" for question in trait.questions.extract[:5]))
    typer.echo(f"-> {path}: read and edit it, then persona-vectors extract MODEL {path}")
