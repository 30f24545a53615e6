"""The command line: the Python functions under their own names."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from persona_vectors.cli import (
    chat,
    contrast,
    evaluation,
    extraction,
    flagging,
    monitoring,
    serving,
    steering,
    training,
    vectors,
)
from persona_vectors.cli.options import app
from persona_vectors.data.errors import InputError

ROOMS = [
    m.__name__
    for m in (extraction, vectors, steering, monitoring, chat, evaluation, contrast, flagging, training, serving)
]
# Importing a module adds its commands; --help lists them in the order of the rooms.
app.registered_commands.sort(key=lambda command: ROOMS.index(str(getattr(command.callback, "__module__", ""))))


def _show_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"persona-vectors {version('persona-vectors-toolkit')}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and exit")
    ] = False,
) -> None:
    """Extract persona vectors from language models, and steer with them (arXiv 2507.21509)."""


def main() -> None:
    """Run the command line: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    try:
        code = app(standalone_mode=False, prog_name="persona-vectors")
    except (InputError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error: typer prints it, and says how to get help
        if show is None:
            raise
        show()
        code = getattr(error, "exit_code", 1)
    if code == 130:
        typer.echo(
            "interrupted: the same command goes on where it stopped, if it keeps its answers in a file", err=True
        )
    sys.exit(code or 0)
