"""The command that talks: chat."""

import math
from collections.abc import Callable
from typing import Any

from persona_vectors.cli.monitoring import Calibrations, Layer, load_calibrations
from persona_vectors.cli.options import (
    Load,
    MaxNewTokens,
    ModelArg,
    Seed,
    System,
    Temperature,
    VectorArgs,
    app,
    load_vectors,
    loads_models,
)
from persona_vectors.data.errors import InputError

HELP = """\
/steer NAME COEF   add COEF times a vector from the next answer on; 0 takes it out
/off               steer no more
/reset             forget the conversation
/save FILE         write the last answer's token heatmap as an HTML page
/quit              leave, as the end of input does"""


@app.command()
@loads_models
def chat(
    model: ModelArg,
    vectors: VectorArgs,
    *,
    layer: Layer = None,
    system: System = None,
    calibration: Calibrations = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    load: Load,
) -> None:
    """Chat in the terminal while every token is coloured by its projection on the first vector; /steer as you go.

    Example: persona-vectors chat smollm2-135m smollm2-135m/optimistic
    """
    from rich.console import Console
    from rich.text import Text

    from persona_vectors.model.blocks import one_layer
    from persona_vectors.monitoring.conversation import Chat
    from persona_vectors.vectors.directions import layer_for

    loaded_vectors, known = {vector.trait: vector for vector in load_vectors(vectors)}, load_calibrations(calibration)
    watched = list(loaded_vectors.values())
    layer = one_layer(layer_for(watched, layer, purpose="monitor"), len(watched[0].directions))
    loaded, tokenizer = load(model)
    first = [{"role": "system", "content": system}] if system else []
    talk = Chat(loaded, tokenizer, loaded_vectors, layer, max_new_tokens, temperature, messages=list(first), seed=seed)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Vectors: {', '.join(loaded_vectors)}. Commands:\n{HELP}", markup=False)
    place = _placed(known, list(loaded_vectors), layer) if known else None
    show, readings = _shower(console, place), None
    while True:
        try:
            line = console.input(Text("> ", "bold")).strip()
        except EOFError:
            return
        try:
            if line == "/quit":
                return
            if line.startswith("/"):
                _command(console, talk, first, readings, line.split(), known)
            elif line:
                readings = talk.answer(line, show)
                _summarise(console, talk, readings)
        except InputError as error:
            console.print(f"error: {error}", style="red", markup=False)


def _placed(calibrations: list[Any], names: list[str], layer: int) -> Callable[[float], float]:
    """Return what gives the first vector's percentile; raises InputError where a vector was not calibrated."""
    import torch

    from persona_vectors.monitoring.percentiles import calibration_of

    own = [calibration_of(name, calibrations) for name in names]
    for calibration in own:
        calibration.percentile(torch.zeros(1), layer=layer)
    return lambda value: float(own[0].percentile(torch.tensor(value), layer=layer))


def _shower(console: Any, place: Callable[[float], float] | None) -> Callable[[str, list[float]], None]:
    """Return what prints a token, coloured where its projection is high or low.

    That is among the highest or lowest quarter of the range seen so far, or of neutral answers' percentiles.
    """
    from rich.text import Text

    from persona_vectors.monitoring.heatmaps import robust_span

    seen: list[float] = []

    def show(text: str, values: list[float]) -> None:
        style = ""
        if values:
            value = values[0] if place is None else place(values[0])
            seen.append(value)
            low, high = robust_span(seen[-500:]) if place is None else (0.0, 100.0)
            style = "on dark_orange3" if value > (low + 3 * high) / 4 else ""
            style = "on dodger_blue3" if value < (3 * low + high) / 4 else style
        console.print(Text(text, style), end="")

    return show


def _command(console: Any, talk: Any, first: list[dict[str, str]], readings: Any, words: list[str], known: Any) -> None:
    """Carry out a line that begins with /; raises InputError where it cannot."""
    from persona_vectors.monitoring.heatmaps import heatmap

    command, *rest = words
    if command == "/steer":
        _set_coef(talk.coefs, list(talk.vectors), rest)
    elif command == "/off":
        talk.coefs.clear()
    elif command == "/reset":
        talk.messages = list(first)
    elif command == "/save" and len(rest) == 1 and readings is not None:
        heatmap(talk.tokenizer, readings, calibration=known).save(rest[0])
    else:
        console.print(HELP, markup=False)


def _summarise(console: Any, talk: Any, readings: Any) -> None:
    console.print()
    for name in talk.vectors:
        before, mean = (float(found[name][0]) for found in (readings.prompt_last, readings.mean))
        coef = talk.coefs.get(name)
        steered = "" if coef is None else f"; steered by {coef:+g}, read after the edit"
        summary = f"  {name}: {before:+.3f} before the answer, {mean:+.3f} over it{steered}"
        console.print(summary, style="dim", markup=False)


def _set_coef(coefs: dict[str, float], names: list[str], words: list[str]) -> None:
    """Carry out `/steer NAME COEF`; raises InputError where it cannot."""
    try:
        name, value = " ".join(words[:-1]), float(words[-1])
    except (ValueError, IndexError):
        raise InputError(f"/steer {' '.join(words)}: give a vector's name and a coefficient") from None
    if name not in names or not math.isfinite(value):
        raise InputError(f"/steer {' '.join(words)}: give one of {', '.join(names)}, and a finite coefficient")
    coefs.pop(name, None)
    if value:
        coefs[name] = value
