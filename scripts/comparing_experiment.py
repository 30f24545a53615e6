"""How often `compare_datasets` gives a verdict on datasets that differ in no trait, and on mixtures that differ in one.

Sources are a model's own plain answers: to the questions of each trait (topics), and to all of them in several forms.
None shows a trait on purpose, so a verdict on two of them is an error. The mixtures hold answers under a trait's
instructions and under the opposite ones, a quarter more of the former in the second. Everything is flagged once; each
draw takes samples of that.

Usage: python scripts/comparing_experiment.py smollm2-135m vectors/smollm2-135m/*.safetensors --out runs/comparing
"""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import persona_vectors as pv
from persona_vectors.cli.options import Device, DType, MaxNewTokens, ModelArg, load_by_name
from persona_vectors.data.files import atomic_path
from persona_vectors.flagging.compare import _compared, _Read, _read, _some
from persona_vectors.flagging.parts import read_header

FORMS = {
    "plain": None,
    "one sentence": "Answer in one short sentence.",
    "list": "Answer with a numbered list of short points.",
    "letter": "Answer in the form of a formal letter.",
}


def write_sources(model: Any, tokenizer: Any, out: Path, samples: int, max_new_tokens: int) -> list[Path]:
    """Write each source's samples, without the system prompts that gave them their form."""
    traits = [pv.load_trait(name) for name in pv.list_traits()]
    asked = {f"topic {trait.name}": [*trait.questions.extract, *trait.questions.eval] for trait in traits}
    sources = {name: (questions, None, samples // len(questions)) for name, questions in asked.items()}
    every = [question for trait in traits for question in trait.questions.extract]
    sources |= {name: (every, system, samples // len(every)) for name, system in FORMS.items()}
    paths = []
    for number, (name, (questions, system, each)) in enumerate(sources.items()):
        paths.append(out / f"{name}.jsonl")
        if paths[-1].exists():
            continue
        repeated = [question for question in questions for _ in range(max(each, 1))]
        before = [] if system is None else [{"role": "system", "content": system}]
        prompts = [[*before, {"role": "user", "content": question}] for question in repeated]
        answers = pv.generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=number)
        with atomic_path(paths[-1]) as temporary, temporary.open("w", encoding="utf-8") as file:
            for question, answer in zip(repeated, answers):
                if answer.strip():
                    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                    file.write(json.dumps({"messages": talk}) + "\n")
    return paths


def sides(path: Path) -> dict[str, _Read]:
    """Return what a flags file holds of each vector at each layer."""
    header = read_header(path)
    settings, found = header["settings"], {}
    for number, key in enumerate(header["summary"]):
        layer = settings["layers"][number // len(settings["vectors"])]
        found[key] = _read(path, key, f"controls@{layer}", 0)
    return found


def rows_of(side: _Read, rows: np.ndarray) -> _Read:
    """Return some rows; all of a file this small have their random directions."""
    kept = np.arange(len(rows))
    return _Read(side.values[rows], side.prompts[rows], kept, side.controls[rows], side.lengths[rows])


def halves(side: _Read, size: int, rng: np.random.Generator) -> tuple[_Read, _Read]:
    """Return two parts of one source that share no sample."""
    order = rng.permutation(len(side.values))
    size = min(size, len(order) // 2)
    return rows_of(side, order[:size]), rows_of(side, order[size : 2 * size])


def mixtures(
    trait: _Read, opposite: _Read, size: int, rng: np.random.Generator, *, shared: bool
) -> tuple[_Read, _Read]:
    """Return two mixtures: of the trait, a random share and a quarter more.

    With `shared` the second is the first with a quarter of its samples exchanged, as make_training_sets mixes; else no
    sample is in both.
    """
    share = rng.uniform(0, 0.75)
    counts = [round(share * size), round((share + 0.25) * size)]
    if shared:
        order = rng.permutation(min(len(trait.values), len(opposite.values)))[:size]
        parts = [(order[:n], order[n:]) for n in counts]
    else:
        one, two = (rng.permutation(len(side.values)) for side in (trait, opposite))
        parts = [(one[: counts[0]], two[: size - counts[0]])]
        parts.append((one[counts[0] :][: counts[1]], two[size - counts[0] :][: size - counts[1]]))
    first, second = (joined(rows_of(trait, pos), rows_of(opposite, neg)) for pos, neg in parts)
    return first, second


def joined(one: _Read, two: _Read) -> _Read:
    whole = [np.concatenate(pair) for pair in zip(one, two)]
    return _Read(*whole)._replace(kept=np.arange(len(whole[0])))


def verdicts(found: dict[Path, dict[str, _Read]], draws: int, size: int, *, same: bool) -> Iterator[tuple[str, Any]]:
    """Yield each draw's key and verdict, of two parts of one source or of two sources."""
    rng, pairs = np.random.default_rng(0), list(combinations(found, 2))
    for _ in range(draws):
        one, two = (list(found)[rng.integers(len(found))],) * 2 if same else pairs[rng.integers(len(pairs))]
        for key in found[one]:
            if same:
                a, b = halves(found[one][key], size, rng)
            else:
                a, b = (_some(found[path][key], min(size, len(found[path][key].kept)), rng) for path in (one, two))
            yield key, _compared(a, b, None)


def main(
    model_name: ModelArg,
    vectors: Annotated[list[Path], typer.Argument(metavar="VECTOR...", help=".safetensors files of shipped traits")],
    out: Annotated[Path, typer.Option(help="folder for the sources and the flags")] = Path("runs/comparing"),
    sets: Annotated[
        Path | None, typer.Option(help="folder of make_training_sets: positive.jsonl and negative.jsonl to mix")
    ] = None,
    mixed: Annotated[str, typer.Option(help="the trait of those sets")] = "optimistic",
    layer: Annotated[str, typer.Option(help="layers to read, with commas")] = "10,13,16,19,22,25",
    samples: Annotated[int, typer.Option(help="samples a source")] = 420,
    size: Annotated[int, typer.Option(help="samples of each dataset in a draw")] = 200,
    mixed_size: Annotated[int, typer.Option(help="the same for mixtures")] = 400,
    draws: Annotated[int, typer.Option(help="draws of each comparison")] = 200,
    max_new_tokens: MaxNewTokens = 64,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Write sources, flag them, and print how often two of them get a verdict, by vector and layer."""
    model, tokenizer = load_by_name(model_name, device=device, dtype=dtype)
    loaded = [pv.PersonaVector.load(path) for path in vectors]
    out.mkdir(parents=True, exist_ok=True)
    layers = [int(part) for part in layer.split(",")]

    def flagged(data: Path) -> dict[str, _Read]:
        file = out / f"{data.stem}.parquet"
        return sides(pv.flag(model, tokenizer, data, loaded, layer=layers, baseline="prompt_last", out=file).path)

    found = {path: flagged(path) for path in write_sources(model, tokenizer, out, samples, max_new_tokens)}
    report_sources(found, draws, size)
    if sets:
        trait, opposite = (flagged(sets / f"{name}.jsonl") for name in ("positive", "negative"))
        report_mixtures(trait, opposite, mixed, draws, mixed_size)


def report_sources(found: dict[Path, dict[str, _Read]], draws: int, size: int) -> None:
    """Print how often the interval of a gap leaves out zero, and how often there is a verdict."""
    for same, words in ((True, "two parts of one source"), (False, "two sources")):
        counts: dict[str, Counter] = {}
        for key, compared in verdicts(found, draws, size, same=same):
            apart = not compared.gap.low <= 0 <= compared.gap.high
            counts.setdefault(key, Counter()).update(verdict=compared.verdict is not None, apart=apart)
        print(f"{words}, {draws} draws of {size} and {size} samples: interval leaves out zero, verdict")
        for key, each in counts.items():
            print(f"  {key:20} {each['apart'] / draws:6.1%} {each['verdict'] / draws:6.1%}")
        total = sum((each for each in counts.values()), Counter())
        print(f"  {'all':20} {total['apart'] / draws / len(counts):6.1%} {total['verdict'] / draws / len(counts):6.1%}")


def report_mixtures(trait: dict[str, _Read], opposite: dict[str, _Read], mixed: str, draws: int, size: int) -> None:
    """Print how often two mixtures get the right verdict, and how often the wrong one."""
    rng = np.random.default_rng(0)
    for shared, words in ((True, "a quarter of the samples exchanged"), (False, "no sample in both")):
        print(
            f"mixtures of {mixed} that differ by a quarter, {words}, {draws} draws of {size}: right and wrong verdicts"
        )
        for key in [key for key in trait if key.partition("@")[0] == mixed]:
            pairs = (mixtures(trait[key], opposite[key], size, rng, shared=shared) for _ in range(draws))
            told = [_compared(one, two, None).verdict for one, two in pairs]
            print(f"  {key:20} {told.count('second') / draws:6.1%} {told.count('first') / draws:6.1%}")


if __name__ == "__main__":
    typer.run(main)
