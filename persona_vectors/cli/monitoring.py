"""Commands that watch projections while the model answers."""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_vectors.cli.options import Device, DeviceMap, DType, Fold, MaxNewTokens, ModelArg, Seed, app, load
from persona_vectors.data.errors import InputError

Vectors = Annotated[list[Path], typer.Argument(metavar="VECTOR...", help="one or more .safetensors files")]
Layer = Annotated[int, typer.Option(help="the decoder block whose output is read, from 0")]
CHAT_HELP = """\
/steer NAME COEF   add COEF times a vector from the next answer on; 0 takes it out
/off               steer no more
/reset             forget the conversation
/save FILE         write the last answer's token heatmap as an HTML page
/quit              leave, as the end of input does"""


@app.command()
def monitor(
    model: ModelArg,
    vectors: Vectors,
    layer: Layer,
    prompt: Annotated[list[str], typer.Option(help="a question to answer; repeat for more")],
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with every token's projections here")] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 1.0,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Answer prompts, and show the projections on each vector: before the answer, over it, and where it is highest.

    Example: persona-vectors monitor smollm2-135m vectors/smollm2-135m/optimistic.safetensors --layer 19
    --prompt "How will my exam go?" --html trace.html
    """
    from rich.console import Console
    from rich.table import Table

    from persona_vectors.model import generation, prompts
    from persona_vectors.monitoring import heatmaps
    from persona_vectors.monitoring import trace as monitoring

    loaded_vectors = _load_vectors(vectors)
    loaded, tokenizer = load(model, device, dtype, device_map, fold_system)
    encoded = [prompts.encode(tokenizer, prompts.chat_prompt(tokenizer, text, system=system)) for text in prompt]
    options: dict[str, Any] = {"layer": layer, "stops": generation.stop_tokens(loaded, tokenizer)}
    with monitoring.monitor(loaded, list(loaded_vectors.values()), **options) as trace:
        rows = generation.generate_tokens(
            loaded,
            tokenizer,
            encoded,
            max_new_tokens=max_new_tokens + 1,  # the last token sampled is never read
            temperature=temperature,
            seed=seed,
        )
    readings = trace.last
    console = Console(width=None if sys.stdout.isatty() else 120)
    for index, (text, (tokens, _)) in enumerate(zip(prompt, rows)):
        kept = tokens[:max_new_tokens]
        console.print(text, style="bold", markup=False)
        console.print(prompts.decode(tokenizer, kept).strip(), markup=False)
        table = Table("vector", "before the answer", "mean over it", "highest", "at the token")
        for name in loaded_vectors:
            values = readings[name][index][readings.answer[index]]
            best = int(values.argmax()) if len(values) else None
            texts = heatmaps.token_texts(tokenizer, kept)
            numbers = [float(readings.prompt_last[name][index]), float(readings.mean[name][index])]
            cells = [f"{number:+.3f}" for number in [*numbers, float(values.max()) if len(values) else math.nan]]
            table.add_row(name, *cells, "" if best is None else repr(texts[best]).replace("[", r"\["))
        console.print(table)
    if html:
        heatmaps.save_heatmaps([heatmaps.heatmap(tokenizer, trace, row=row) for row in range(len(prompt))], html)
        console.print(f"token heatmaps -> {html}", markup=False)


@app.command()
def chat(
    model: ModelArg,
    vectors: Vectors,
    layer: Layer,
    system: Annotated[str | None, typer.Option(help="a system prompt")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.7,
    seed: Seed = 0,
    device: Device = None,
    dtype: DType = None,
    device_map: DeviceMap = None,
    fold_system: Fold = False,
) -> None:
    """Chat in the terminal while every token is coloured by its projection on the first vector; /steer as you go.

    Example: persona-vectors chat smollm2-135m vectors/smollm2-135m/optimistic.safetensors --layer 19
    """
    import torch
    from rich.console import Console
    from rich.text import Text

    from persona_vectors.monitoring.conversation import Chat
    from persona_vectors.monitoring.heatmaps import heatmap, robust_span

    loaded_vectors = _load_vectors(vectors)
    loaded, tokenizer = load(model, device, dtype, device_map, fold_system)
    torch.manual_seed(seed)
    first = [{"role": "system", "content": system}] if system else []
    talk = Chat(loaded, tokenizer, loaded_vectors, layer, max_new_tokens, temperature, messages=list(first))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"Vectors: {', '.join(loaded_vectors)}. Commands:\n{CHAT_HELP}", markup=False)
    seen: list[float] = []
    readings = None

    def show(text: str, values: list[float]) -> None:
        style = ""
        if values:
            seen.append(values[0])
            low, high = robust_span(seen[-500:])
            style = "on dark_orange3" if values[0] > (low + 3 * high) / 4 else ""
            style = "on dodger_blue3" if values[0] < (3 * low + high) / 4 else style
        console.print(Text(text, style), end="")

    while True:
        try:
            line = console.input(Text("> ", "bold")).strip()
        except EOFError:
            return
        command, *words = line.split() or [""]
        try:
            if command == "/quit":
                return
            if command == "/steer":
                _set_coef(talk.coefs, list(loaded_vectors), words)
            elif command == "/off":
                talk.coefs.clear()
            elif command == "/reset":
                talk.messages = list(first)
            elif command == "/save" and len(words) == 1 and readings is not None:
                heatmap(tokenizer, readings).save(words[0])
            elif command.startswith("/"):
                console.print(CHAT_HELP, markup=False)
            elif line:
                readings = talk.answer(line, show)
                console.print()
                for name in loaded_vectors:
                    before, mean = (float(found[name][0]) for found in (readings.prompt_last, readings.mean))
                    coef = talk.coefs.get(name)
                    steered = "" if coef is None else f"; steered by {coef:+g}, read after the edit"
                    summary = f"  {name}: {before:+.3f} before the answer, {mean:+.3f} over it{steered}"
                    console.print(summary, style="dim", markup=False)
        except InputError as error:
            console.print(f"error: {error}", style="red", markup=False)


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


def _load_vectors(paths: list[Path]) -> dict[str, Any]:
    """Return the vectors by their traits' names; raises InputError where two have one name."""
    from persona_vectors.vectors.vector import PersonaVector

    loaded = [PersonaVector.load(path) for path in paths]
    for index, vector in enumerate(loaded):
        if vector.trait in [other.trait for other in loaded[:index]]:
            raise InputError(f"{paths[index]} holds another vector called {vector.trait!r}: give one of each trait")
    return {vector.trait: vector for vector in loaded}
