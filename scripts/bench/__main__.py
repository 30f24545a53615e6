"""Benchmarks: what reading and editing activations costs, beside a bare pass, the paper's way and other libraries.

Usage: python scripts/bench extraction | generation | flagging | training [--model NAME | --shape SHAPE] [--out FILE]
       python scripts/bench savings [--model NAME] [--questions N] [--out FILE]
       python scripts/bench end-to-end [--model NAME] [--since COMMIT] [--out FILE]
       python scripts/bench judging [--model NAME] [--seconds S] [--out FILE]
       python scripts/bench gpu [--shape SHAPE] [--out FILE]
       python scripts/bench serve isolation | throughput | step | soak [--model NAME] [--vector FILE] [--out FILE]
"""

import sys
from pathlib import Path

import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # `python scripts/bench` looks for modules in the folder only

from bench.end_to_end import end_to_end
from bench.extraction import extraction
from bench.flagging import flagging
from bench.generation import generation
from bench.gpu import gpu
from bench.judging import judging
from bench.savings import savings
from bench.serving import serve
from bench.training import training
from persona_vectors.data.errors import InputError

app = typer.Typer(help="Benchmarks of persona_vectors.", no_args_is_help=True, add_completion=False)
for command in (extraction, generation, flagging, training, savings, end_to_end, judging, gpu):
    app.command()(command)
app.add_typer(serve, name="serve")

if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
