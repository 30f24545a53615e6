"""The command line: the Python functions under their own names."""

from persona_vectors import cli_evaluate, cli_flag, cli_steer, cli_traits, cli_vectors, cli_watch

# Importing a module adds its commands, in this order.
COMMANDS = (cli_vectors, cli_traits, cli_steer, cli_watch, cli_evaluate, cli_flag)
