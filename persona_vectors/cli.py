"""The command line: the Python functions under their own names."""

import sys

import typer

from persona_vectors import cli_evaluate, cli_steer, cli_traits, cli_vectors, cli_watch
from persona_vectors.cli_options import app
from persona_vectors.files import InputError

# Importing a module adds its commands, in this order.
COMMANDS = (cli_vectors, cli_traits, cli_steer, cli_watch, cli_evaluate)
