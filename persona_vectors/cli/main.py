"""The command line: the Python functions under their own names."""

import sys

import typer

from persona_vectors.cli import evaluation as cli_evaluate
from persona_vectors.cli import flagging as cli_flag
from persona_vectors.cli import monitoring as cli_watch
from persona_vectors.cli import steering as cli_steer
from persona_vectors.cli import training as cli_training
from persona_vectors.cli import traits as cli_traits
from persona_vectors.cli import vectors as cli_vectors
from persona_vectors.cli.options import app
from persona_vectors.data.errors import InputError

# Importing a module adds its commands, in this order.
COMMANDS = (cli_vectors, cli_traits, cli_steer, cli_watch, cli_evaluate, cli_flag, cli_training)


def main() -> None:
    """Run the command line: 0 done, 2 bad input, 130 interrupted, 1 anything else."""
    try:
        code = app(standalone_mode=False)
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
