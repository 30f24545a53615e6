"""What a GPU that is lent for minutes can tell: whether hooks are right there, and what they and rollouts cost."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from transformers.utils import logging

from bench import gpu_speed as speed
from bench.gpu_checks import check_continuous, check_hooks, check_static
from bench.inputs import Device, Out, Shape, load
from bench.measuring import environment, save
from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model

Section = Callable[[speed.Lines], None]
SECONDS = {
    "checks": 40,
    "hooks": 60,
    "static": 100,
    "rollouts": 100,
    "extraction": 40,
    "training": 45,
    "flagging": 30,
    "continuous": 60,
}
"""What each section may take of 6 minutes; few take it all, and the last ones have what is left."""


class OutOfTime(BaseException):
    """A section's time is over. No `except Exception` on the way holds it up."""


def gpu(
    shape: Shape = "qwen2.5-7b",
    device: Device = None,
    widths: Annotated[str, typer.Option(help="rows of a batch of rollouts, one after the other")] = "8,32,64,128,256",
    new_tokens: Annotated[int, typer.Option(help="tokens of a rollout", min=2)] = 128,
    pairs: Annotated[int, typer.Option(help="pairs of decoding steps for each hook", min=2)] = 64,
    answers: Annotated[int, typer.Option(help="finished answers to read", min=10)] = 80,
    steps: Annotated[int, typer.Option(help="training steps of each kind", min=1)] = 15,
    rounds: Annotated[int, typer.Option(help="rounds of reading", min=1)] = 2,
    only: Annotated[str, typer.Option(help=f"sections to run, of {', '.join(SECONDS)}")] = ",".join(SECONDS),
    minutes: Annotated[float, typer.Option(help="time for all of it, the model's making included")] = 5.5,
    out: Out = None,
) -> None:
    """Check the hooks on this device and measure it, with random weights: nothing is downloaded or installed.

    A section that fails, or whose time is over, says so in a line, and the next one begins.
    """
    chosen = only.split(",")
    if unknown := set(chosen) - set(SECONDS):
        raise InputError(f"--only names {', '.join(sorted(unknown))}: give some of {', '.join(SECONDS)}")
    logging.disable_progress_bar()
    begin = time.monotonic()
    model, _ = load("", shape, device)
    found = environment(model, str(shape))
    print(f"made in {time.monotonic() - begin:.1f} s", flush=True)
    numbers = [int(width) for width in widths.split(",")]
    sections = make_sections(model, numbers, new_tokens, pairs, answers, steps, rounds)
    for name in chosen:
        left = 60 * minutes - (time.monotonic() - begin)
        found[name] = run_section(name, sections[name], min(SECONDS[name] * minutes / 6, left))
        save(found, out)
    print(f"{time.monotonic() - begin:.0f} s in all", flush=True)


def make_sections(
    model: Model, widths: list[int], new_tokens: int, pairs: int, answers: int, steps: int, rounds: int
) -> dict[str, Section]:
    """Return what is run under each name."""
    eight, few = speed.some_prompts(model, 8), min(new_tokens, 16)

    def static(lines: speed.Lines) -> None:
        check_static(model, eight, few, lines)
        speed.static_rollouts(model, widths[len(widths) // 2 :][:1], new_tokens, lines)

    def continuous(lines: speed.Lines) -> None:
        check_continuous(model, eight, few, lines)
        speed.continuous_rollouts(model, widths[-1], new_tokens, lines)

    return {
        "checks": lambda lines: check_hooks(model, eight, few, lines),
        "hooks": lambda lines: speed.hooks(model, pairs, lines),
        "static": static,
        "rollouts": lambda lines: speed.rollouts(model, widths, new_tokens, lines),
        "extraction": lambda lines: speed.extraction(model, answers, rounds, lines),
        "training": lambda lines: speed.training(model, steps, lines),
        "flagging": lambda lines: speed.flagging(model, answers, rounds, lines),
        "continuous": continuous,
    }


def run_section(name: str, section: Section, seconds: float) -> speed.Lines:
    """Run a section for so many seconds at most; return what it found by then, an error included."""
    lines: speed.Lines = []
    print(f"\n== {name}", flush=True)
    begin = time.monotonic()
    try:
        with at_most(seconds):
            section(lines)
    except (Exception, OutOfTime) as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        print(f"failed: {reason}", flush=True)
        lines.append({"failed": reason})
    speed.free()
    print(f"({time.monotonic() - begin:.1f} s)", flush=True)
    return lines


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread when the time is over."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"cut off after {seconds:.0f} s")

    if seconds <= 0:
        raise OutOfTime("no time left")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
