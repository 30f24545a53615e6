"""Steering methods at equal cost: how far each moves a trait at one KL from the plain model, beside random vectors.

Methods: adding the vector, adding it whitened, turning the hidden states to an angle from it, raising their projection
to a floor, and adding it as strongly as the nearest stored activations say (K-CAST: 1 near statements that show the
opposite, 0 near those that show the trait). Every strength is the one at which the 95th percentile of KL(plain |
steered) on plain facts reaches the target; random vectors get the same methods at the same KL. The effect is VADER's
sentiment of answers to the evaluation questions, 0 to 100, less the plain model's, with its 95 % interval by question.
Answers under the trait's own positive instructions are the reference. Killed, the same command goes on.

Usage: python scripts/equal_kl.py smollm2-135m vectors/smollm2-135m/optimistic.safetensors optimistic
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure

import persona_vectors as pv
from persona_vectors.cli.options import MaxNewTokens, ModelArg, load_by_name, save_figure
from persona_vectors.data.files import atomic_path
from persona_vectors.data.intervals import mean_interval
from persona_vectors.data.ledger import Ledger
from persona_vectors.data.texts import neutral_texts
from persona_vectors.evaluation.cost import kl_cost, strength_at
from persona_vectors.model.identity import hash_of, identity
from persona_vectors.model.prompts import chat_prompt, encode_answer
from persona_vectors.vectors.drawing import BLUE, GREY, ORANGE, bare

Edit = Callable[[float], AbstractContextManager[Any]]
TEXTS = neutral_texts()[:4]


def shown(method: str, strength: float) -> str:
    """Return a strength in the method's own words."""
    if method == "rotate":
        return f"to {angle(strength):.0f} degrees"
    return f"lowest {strength:+.2f} v" if method == "floor" else f"{strength:.2f} v"


def angle(strength: float) -> float:
    """Return the degrees from the vector at which the projection is `strength` times what is left of it."""
    return math.degrees(math.atan2(1, strength))


class Methods:
    """The methods for any vector of one model, at one layer and these positions."""

    def __init__(self, model: Any, tokenizer: Any, statements: Any, layer: int, positions: str) -> None:
        self.model, self.at = model, {"layer": layer, "positions": positions}
        self.facts = pv.neutral_moments(model, tokenizer, layer=layer)
        read: list[torch.Tensor] = []
        for asked, text in TEXTS:
            prompt, answer = encode_answer(tokenizer, chat_prompt(tokenizer, asked), text)
            with pv.edit_blocks(model, {layer: lambda hidden, _: read.append(hidden[0])}), torch.no_grad():
                model(input_ids=torch.tensor([prompt + answer], device=model.device))
            read[-1] = read[-1][len(prompt) - 1 :]
        self.neutral = torch.cat(read)
        sides = [(q, text) for q, pair in zip(statements.questions, statements.pairs) for text in (pair.pos, pair.neg)]
        rows = [encode_answer(tokenizer, chat_prompt(tokenizer, asked), text) for asked, text in sides]
        self.states = pv.pool(model, rows, layer=layer).means[:, 0, 0]
        self.needed = torch.tensor([0.0, 1.0] * len(statements.pairs))

    def of(self, vector: pv.PersonaVector) -> dict[str, Edit]:
        """Return each method's edit by its strength."""
        model, at, layer = self.model, self.at, self.at["layer"]
        whitened = self.facts.whiten(vector, steers=True)
        lowest, length = float(vector.project(self.neutral, layer=layer).min()), float(vector.norm()[layer])

        def gated(strength: float) -> AbstractContextManager[Any]:
            coef = pv.nearest_coef(self.states, strength * self.needed)
            return pv.steer_where(model, vector, coef=coef, **at)

        return {
            "add": lambda s: pv.steer(model, vector, coef=s, **at),
            "add whitened": lambda s: pv.steer(model, whitened, coef=s, **at),
            "rotate": lambda s: pv.rotate(model, vector, angle=angle(s), **at),
            "floor": lambda s: pv.floor(model, vector, limit=lowest + s * length, **at),
            "add where near": gated,
        }


def measure(
    model: Any, tokenizer: Any, methods: Methods, vectors: list[pv.PersonaVector], kls: list[float], run: "Run"
) -> None:
    """Find every strength and draw its answers, as far as the ledger lacks them: the vector first, then controls."""
    for vector in vectors:
        for method, edit in methods.of(vector).items():
            keys = {kl: f"{vector.trait}, {method}, {kl:g}" for kl in kls}
            todo = {kl: key for kl, key in keys.items() if key not in run.ledger.found}
            cost = kl_cost(model, tokenizer, edit, texts=TEXTS) if todo else None
            for kl, key in todo.items():
                try:
                    strength = strength_at(cost, kl, of=key, tolerance=0.03)
                except pv.InputError:
                    run.ledger.add([{"key": key, "strength": None}])
                    continue
                with edit(strength):
                    run.answer(key, strength=strength)


class Run:
    """What answers the evaluation questions, scores the answers, and keeps both."""

    def __init__(self, model: Any, tokenizer: Any, trait: pv.Trait, ledger: Ledger, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.trait, self.ledger = model, tokenizer, trait, ledger
        self.judge, self.options = pv.SentimentJudge(), {"max_new_tokens": max_new_tokens, "seed": 0}

    def answer(self, key: str, *, own: bool = False, **facts: Any) -> None:
        """Answer every question as the model stands, or under the trait's own positive instructions in turn."""
        pairs, asked = len(self.trait.instruction), self.trait.questions.eval
        prompts = []
        for i, question in enumerate(asked):
            before = [{"role": "system", "content": self.trait.system_prompt("pos", i % pairs)}] if own else []
            prompts.append([*before, {"role": "user", "content": question}])
        answers = pv.generate(self.model, self.tokenizer, prompts, **self.options)
        scores = [self.judge(q, a, "") for q, a in zip(asked, answers)]
        self.ledger.add([{"key": key, **facts, "scores": scores, "answers": answers}])

    def effect(self, key: str) -> Any:
        """Return the scores' mean difference from the plain model's; None where no strength was found."""
        both = self.ledger.found["plain"]["scores"], self.ledger.found[key].get("scores")
        if both[1] is None:
            return None
        return mean_interval([[b - a] if None not in (a, b) else [math.nan] for a, b in zip(*both)])


def rows_of(run: Run, vector: str, controls: list[str], kls: list[float], methods: list[str]) -> list[dict[str, Any]]:
    """Return one row a method and KL: the strength, the effect, and the random vectors' effects."""
    rows = []
    for method in methods:
        for kl in kls:
            key = f"{vector}, {method}, {kl:g}"
            noise = [run.effect(f"{name}, {method}, {kl:g}") for name in controls]
            row = {"method": method, "kl": kl, "strength": run.ledger.found[key]["strength"], "effect": run.effect(key)}
            rows.append({**row, "random": [each.mean for each in noise if each is not None]})
    return rows


def table(rows: list[dict[str, Any]], prompted: Any, controls: int) -> str:
    """Return the rows as Markdown."""
    lines = [
        f"| method | KL (nats) | strength | effect [95 %] | {controls} random vectors: mean; largest |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        reached = row["effect"] is not None
        strength = shown(row["method"], row["strength"]) if reached else "not reached"
        effect, noise = f"{row['effect']:+.1f}" if reached else "", row["random"]
        null = f"{sum(noise) / len(noise):+.1f}; {max(noise):+.1f}" if noise else ""
        lines.append(f"| {row['method']} | {row['kl']:g} | {strength} | {effect} | {null} |")
    return "\n".join([*lines, f"| own positive prompt | | | {prompted:+.1f} | |"]) + "\n"


def plot(rows: list[dict[str, Any]], prompted: Any, trait: str) -> Figure:
    """Plot a panel a method: its effect by KL, the random vectors', and that of the trait's own prompt."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(2.6 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True), names):
        own = [row for row in rows if row["method"] == name and row["effect"] is not None]
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.axhline(prompted.mean, color=ORANGE, linestyle=":", label="own positive prompt")
        for row in rows:
            if row["method"] == name and row["random"]:
                label = "random vectors" if row is next(r for r in rows if r["method"] == name) else None
                axes.plot([row["kl"]] * len(row["random"]), row["random"], "_", color=GREY, markersize=10, label=label)
        x, effects = [row["kl"] for row in own], [row["effect"] for row in own]
        bars = [[e.mean - e.low for e in effects], [e.high - e.mean for e in effects]]
        axes.errorbar(x, [e.mean for e in effects], bars, color=BLUE, marker="o", markersize=4, capsize=3, label=trait)
        axes.set(title=name, xlabel="KL on plain facts (nats)", xticks=sorted({row["kl"] for row in rows}))
        bare(axes)
    first = figure.axes[0]
    first.set_ylabel("VADER, 0 to 100, less plain")
    figure.legend(*first.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    return figure


def main(
    model_name: ModelArg,
    vector: Annotated[Path, typer.Argument(help="a .safetensors file")],
    trait: Annotated[str, typer.Argument(help="its trait, of valence; statements of it ship")],
    layer: Annotated[int | None, typer.Option(help="(default: the recommended one)")] = None,
    kl: Annotated[str, typer.Option(help="the costs to compare at, with commas")] = "0.25,0.5,1",
    controls: Annotated[int, typer.Option(help="random vectors", min=0)] = 3,
    positions: Annotated[str, typer.Option(help="all, prompt or response")] = "response",
    max_new_tokens: MaxNewTokens = 24,
    out: Annotated[Path, typer.Option(help="folder for the answers, the table and the plot")] = Path("runs/equal_kl"),
    device: Annotated[str | None, typer.Option(help="cuda or cpu")] = None,
) -> None:
    """Measure what is missing, print the table, and write it and the plot."""
    model, tokenizer = load_by_name(model_name, device=device)
    own, told, costs = pv.load_vector(vector), pv.load_trait(trait), [float(part) for part in kl.split(",")]
    place = own.recommended("steer").layer if layer is None else layer
    asked = {"trait": hash_of(told.model_dump()), "vector": hash_of(own.directions[place].tolist())}
    settings = {**identity(model, tokenizer), **asked, "layer": place, "positions": positions, "texts": len(TEXTS)}
    ledger = Ledger(out / "answers.jsonl", {**settings, "max_new_tokens": max_new_tokens})
    run = Run(model, tokenizer, told, ledger, max_new_tokens)
    for key in ("plain", "own prompt"):
        if key not in ledger.found:
            run.answer(key, own=key != "plain")
    methods = Methods(model, tokenizer, pv.load_statements(trait), place, positions)
    noise = [pv.random_vector(own, seed=seed) for seed in range(controls)]
    measure(model, tokenizer, methods, [own, *noise], costs, run)
    rows = rows_of(run, own.trait, [v.trait for v in noise], costs, list(methods.of(own)))
    prompted = run.effect("own prompt")
    text = table(rows, prompted, controls)
    print(text, end="")
    with atomic_path(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    save_figure(plot(rows, prompted, own.trait), out / "methods.png")


if __name__ == "__main__":
    typer.run(main)
