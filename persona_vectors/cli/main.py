"""The command line: the Python functions under their own names."""

import inspect
import re
import sys
import warnings
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
    studies,
    training,
    vectors,
)
from persona_vectors.cli.options import app
from persona_vectors.data.errors import InputError

PANELS = {
    "Traits and vectors": (extraction, vectors),
    "Steer and watch": (steering, monitoring, chat, serving),
    "Measure": (evaluation, contrast, studies),
    "Training data and training": (flagging, training),
}
ROOMS = {module.__name__: panel for panel, modules in PANELS.items() for module in modules}


RESUMES = dict.fromkeys(
    ("extract", "evaluate", "contrast", "sweep", "flag", "shift"), "the same command goes on where it stopped"
)
RESUMES["study"] = "the same command goes on where it stopped, if it has --out"
RESUMES["demo"] = "the same command goes on with the answers that it has drawn"
RESUMES["finetune"] = "the same command with --resume goes on from the last checkpoint, if there is one"


def _wrap(paragraph: str) -> str:
    """Return a paragraph as one line; an example of a command as lines that can be pasted."""
    text = " ".join(paragraph.split())
    if not text.startswith("Example: persona-vectors"):
        return text
    lines = [""]
    for part in re.split(r" (?=--?[a-z])", text.removeprefix("Example: ")):
        if len(lines[-1]) + len(part) > 74:
            lines.append("   ")
        lines[-1] += f" {part}"
    return "Example:\n\n" + " \\\n".join(lines).strip()


# Importing a module adds its commands; --help lists them in the order of the rooms.
app.registered_commands.sort(key=lambda command: list(ROOMS).index(str(getattr(command.callback, "__module__", ""))))
for _command in app.registered_commands:
    _command.rich_help_panel = ROOMS[str(getattr(_command.callback, "__module__", ""))]
    _command.help = "\n\n".join(map(_wrap, inspect.cleandoc(_command.callback.__doc__ or "").split("\n\n")))


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


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


def main() -> None:
    """Run the command line: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
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
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        again = RESUMES.get(command, "nothing was kept, and the same command starts anew")
        typer.echo(f"interrupted: {again}", err=True)
    sys.exit(code or 0)
