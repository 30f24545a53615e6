"""The command that talks: chat."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
    layers,
    load_vectors,
    loads_models,
)
from persona_vectors.data.errors import InputError

HIGH, LOW = "on dark_orange3", "on dodger_blue3"
HELP = """\
/steer NAME COEF   add COEF times a vector from the next answer on; 0 takes it out
/off               steer no more
/layer N           read and steer at another decoder block
/system TEXT       answer under another system prompt; without a text, under none
/retry             answer the last message again, with other draws
/compare TEXT      answer plainly and steered, side by side; the conversation goes on with the steered answer
/reset             forget the conversation
/save FILE         write the last answer's token heatmap as an HTML page
/quit              leave, as the end of input does; Ctrl-C ends an answer"""


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
    console = Console(highlight=False, soft_wrap=True)
    talk = Chat(loaded, tokenizer, loaded_vectors, layer, max_new_tokens, temperature, seed=seed)
    terminal = _Terminal(console, talk, known)
    terminal.set_layer(str(layer))
    terminal.set_system(system or "")
    console.print(f"Vectors: {', '.join(loaded_vectors)}. Commands:\n{HELP}", markup=False)
    terminal.legend()
    while True:
        try:
            line = console.input(Text(f"{terminal.steering()}> ", "bold")).strip()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if line == "/quit":
                return
            if line:
                terminal.take(line)
        except InputError as error:
            console.print(f"error: {error}", style="red", markup=False)
        except KeyboardInterrupt:  # before the first token of an answer: nothing has changed
            console.print("(ended)", style="dim")


@dataclass
class _Terminal:
    """A conversation in a terminal: what its lines do, and what of it is shown."""

    console: Any
    talk: Any
    known: list[Any] | None
    place: Callable[[float], float] | None = None
    readings: Any = None
    seen: list[float] = field(default_factory=list)

    def take(self, line: str) -> None:
        """Carry out a line; raises InputError where it cannot."""
        from persona_vectors.model.blocks import model_name
        from persona_vectors.monitoring.heatmaps import heatmap

        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self.answer(line)
        elif command == "/steer":
            _set_coef(self.talk.coefs, list(self.talk.vectors), rest.split())
            self.say(f"steering: {self.steering() or 'none'}")
        elif command == "/off":
            self.talk.coefs.clear()
            self.say("steering: none")
        elif command == "/layer":
            self.set_layer(rest)
            self.legend()
        elif command == "/system":
            self.set_system(rest)
            self.say("system prompt: " + (rest or "none"))
        elif command == "/retry" and len(self.talk.messages) > 1:
            asked = self.talk.messages[-2]["content"]
            del self.talk.messages[-2:]
            self.talk.seed += 1
            self.answer(asked)
        elif command == "/compare" and rest and self.talk.coefs:
            self.compare(rest)
        elif command == "/reset":
            self.talk.messages = [m for m in self.talk.messages if m["role"] == "system"]
            self.say("the conversation is empty")
        elif command == "/save" and rest and self.readings is not None:
            shown: dict[str, Any] = {"calibration": self.known, "title": model_name(self.talk.model)}
            heatmap(self.talk.tokenizer, self.readings, **shown).save(rest)
            self.say(f"token heatmap -> {rest}")
        else:
            self.console.print(HELP, markup=False)

    def answer(self, text: str) -> None:
        self.readings = self.talk.answer(text, self.show)
        self.console.print()
        for name in self.talk.vectors:
            before, mean = (float(found[name][0]) for found in (self.readings.prompt_last, self.readings.mean))
            coef = self.talk.coefs.get(name)
            steered = "" if coef is None else f"; steered by {coef:+g}, read before the edit"
            self.say(f"  {name}: {before:+.3f} before the answer, {mean:+.3f} over it{steered}")

    def compare(self, text: str) -> None:
        """Show the plain answer beside the steered one, with which the conversation goes on."""
        from rich.table import Table

        plain = replace(self.talk, coefs={}, messages=list(self.talk.messages))
        plain.answer(text, lambda *_: None)
        self.readings = self.talk.answer(text, lambda *_: None)
        table = Table("plain", self.steering(), expand=True)
        table.add_row(*(_plain(each.messages[-1]["content"]) for each in (plain, self.talk)))
        self.console.print(table)

    def show(self, text: str, values: list[float]) -> None:
        """Print a token, coloured where its projection is high or low.

        That is among the highest or lowest quarter of the range seen so far, or of neutral answers' percentiles.
        """
        from persona_vectors.monitoring.heatmaps import robust_span

        style = ""
        if values:
            value = values[0] if self.place is None else self.place(values[0])
            self.seen.append(value)
            low, high = robust_span(self.seen[-500:]) if self.place is None else (0.0, 100.0)
            style = HIGH if value > (low + 3 * high) / 4 else LOW if value < (3 * low + high) / 4 else ""
        self.console.print(_plain(text, style), end="")

    def set_layer(self, text: str) -> None:
        from persona_vectors.model.blocks import model_shape, one_layer

        given = layers([text], option="/layer")
        layer = one_layer(given, model_shape(self.talk.model)[0])
        self.place = _placed(self.known, list(self.talk.vectors), layer) if self.known else None
        self.talk.layer = layer
        self.seen.clear()

    def set_system(self, text: str) -> None:
        kept = [message for message in self.talk.messages if message["role"] != "system"]
        self.talk.messages = [{"role": "system", "content": text}, *kept] if text else kept

    def steering(self) -> str:
        return ", ".join(f"{name} {coef:+g}" for name, coef in self.talk.coefs.items())

    def legend(self) -> None:
        name, scale = next(iter(self.talk.vectors)), "neutral answers" if self.known else "the tokens so far"
        words = [f"Layer {self.talk.layer}. ", " high ", " and ", " low ", f" projections on {name}, among {scale}."]
        styles = ["", HIGH, "", LOW, ""]
        for word, style in zip(words, styles):
            self.console.print(_plain(word, style), end="")
        self.console.print()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)


def _plain(text: str, style: str = "") -> Any:
    from rich.text import Text

    return Text(text, style)


def _placed(calibrations: list[Any], names: list[str], layer: int) -> Callable[[float], float]:
    """Return what gives the first vector's percentile; raises InputError where a vector was not calibrated."""
    import torch

    from persona_vectors.monitoring.percentiles import calibration_of

    own = [calibration_of(name, calibrations) for name in names]
    for calibration in own:
        calibration.percentile(torch.zeros(1), layer=layer)
    return lambda value: float(own[0].percentile(torch.tensor(value), layer=layer))


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
