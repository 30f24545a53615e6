"""The server under many clients: each answer as it is alone, how many tokens a second, what projections cost."""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

import typer
from tqdm import tqdm

import persona_vectors as pv
from bench.clients import Server, at_once, running
from bench.inputs import ModelName, Out
from bench.measuring import environment, median, median_interval, save, show
from bench.soak import Vectors, soak
from bench.step import step
from persona_vectors.data.traits import load_trait
from persona_vectors.model.blocks import Model, model_shape
from persona_vectors.model.loading import EMBEDDED

serve = typer.Typer(help="The server under many clients.", no_args_is_help=True)
serve.command()(soak)
serve.command()(step)
NewTokens = Annotated[int, typer.Option(help="most tokens of an answer", min=1)]
Clients = Annotated[int, typer.Option(help="clients at once", min=1)]


@serve.command()
def isolation(
    model_name: ModelName = EMBEDDED,
    vectors: Vectors = None,
    requests: Annotated[int, typer.Option(help="requests, each with edits of its own", min=1)] = 200,
    clients: Clients = 16,
    new_tokens: NewTokens = 24,
    out: Out = None,
) -> None:
    """Compare greedy answers of a busy server with those that `pv.steer`, the other verbs and `generate` give alone."""
    names = vectors or SHIPPED
    model, tokenizer = pv.load_model(model_name, device="cpu")
    found = environment(model, model_name) | {"requests": requests, "clients": clients, "new_tokens": new_tokens}
    known = {vector.trait: vector for vector in map(pv.load_vector, names)}
    cases = [a_case(number, list(known), model_shape(model)[0]) for number in range(requests)]
    expected = [alone(model, tokenizer, known, *case, new_tokens) for case in tqdm(cases, unit="answer", leave=False)]
    with running(model_name, names, rows=clients) as server:
        jobs = [partial(server.ask, question, {"edits": edits}, max_tokens=new_tokens) for question, edits in cases]
        replies = at_once(clients, jobs)
        steps, tokens = (server.figures()[f"persona_vectors_{name}_total"] for name in ("steps", "tokens"))
    texts = [reply["choices"][0]["message"]["content"] for reply in replies]
    found["differ"] = [
        {"question": question, "edits": edits, "alone": own, "served": text}
        for (question, edits), own, text in zip(cases, expected, texts)
        if own != text
    ]
    found |= {"equal": requests - len(found["differ"]), "tokens a step": tokens / steps}
    print(f"{found['equal']} of {requests} answers equal those alone; {tokens / steps:.1f} tokens a step")
    print(f"{len(set(texts))} different texts, of {len({question for question, _ in cases})} questions")
    for line in found["differ"]:
        print(line)
    save(found, out)


SHIPPED = [f"smollm2-135m/{name}" for name in ("optimistic", "evil", "humorous")]


def a_case(number: int, names: list[str], layers: int) -> tuple[str, list[dict[str, Any]]]:
    """Return a question and one or two edits, the same each time: of every kind, at any middle layer."""
    chance, questions = random.Random(number), load_trait("optimistic").questions.extract
    edits = []
    for _ in range(chance.choice([1, 1, 2])):
        kind = chance.choice(["steer", "steer", "steer", "cap", "floor", "ablate"])
        numbers = {"steer": {"coef": round(chance.uniform(-2, 2), 3)}, "ablate": {}}
        edits.append(
            {
                "vector": chance.choice(names),
                "kind": kind,
                "layer": chance.randrange(layers // 3, max(2 * layers // 3, layers // 3 + 1)),
                "positions": chance.choice(["all", "all", "response", "prompt"]),
                **numbers.get(kind, {"limit": round(chance.uniform(-20, 20), 2)}),
            }
        )
    return chance.choice(questions), edits


def alone(
    model: Model, tokenizer: Any, known: dict[str, Any], question: str, edits: list[dict[str, Any]], new_tokens: int
) -> str:
    """Return the answer that the public verbs give."""
    with ExitStack() as stack:
        for edit in edits:
            given = {name: value for name, value in edit.items() if name not in ("vector", "kind")}
            stack.enter_context(getattr(pv, edit["kind"])(model, known[edit["vector"]], **given))
        return pv.generate(model, tokenizer, question, max_new_tokens=new_tokens, temperature=0)


@serve.command()
def throughput(
    model_name: ModelName = EMBEDDED,
    vectors: Vectors = None,
    clients: Clients = 8,
    new_tokens: NewTokens = 64,
    rounds: Annotated[int, typer.Option(help="rounds to take medians over", min=1)] = 5,
    pairs: Annotated[int, typer.Option(help="how often a round has the clients at once, with and without", min=1)] = 3,
    out: Out = None,
) -> None:
    """Measure clients at once beside one after another, and projections of every vector beside none.

    Each round asks the same questions in every way, forwards and backwards in turn. Processor time is the server's.
    """
    names = vectors or SHIPPED
    questions = load_trait("optimistic").questions.extract[:clients]
    found: dict[str, Any] = {"model": model_name, "clients": clients, "new_tokens": new_tokens, "rounds": rounds}
    with running(model_name, names, rows=clients) as server:
        keys = [vector["name"] for vector in server.card["persona_vectors"]["vectors"]]
        ways = {
            "one after another": (1, {}),
            f"{clients} at once": (clients, {}),
            f"{clients} at once, projections": (clients, {"project": keys}),
        }
        runs: dict[str, list[tuple[float, float, int]]] = {way: [] for way in ways}
        first, together, read = ways
        order = [first, *([together, read, read, together] * pairs)[: 2 * pairs]]
        turns = [list(ways), *(order[:: -1 if number % 2 else 1] for number in range(rounds))]
        for number, turn in enumerate(tqdm(turns, unit="round", leave=False)):
            for way in turn:
                at_a_time, ours = ways[way]
                run = _measured(server, questions, at_a_time, ours, new_tokens)
                if number:  # the first warms up, and is not counted
                    runs[way].append(run)
    found["runs"] = runs
    found["speed"] = _report(runs, [(together, first, True), (read, together, False)])
    save(found, out)


def _measured(
    server: Server, questions: list[str], clients: int, ours: dict[str, Any], new_tokens: int
) -> tuple[float, float, int]:
    """Return the wall seconds, the server's processor seconds, and the tokens of one way."""
    before, begin = server.figures()["process_cpu_seconds_total"], time.perf_counter()
    replies = at_once(clients, [partial(server.ask, each, ours, max_tokens=new_tokens) for each in questions])
    seconds = time.perf_counter() - begin
    cpu = server.figures()["process_cpu_seconds_total"] - before
    return seconds, cpu, sum(reply["usage"]["completion_tokens"] for reply in replies)


def _report(
    runs: dict[str, list[tuple[float, float, int]]], pairs: list[tuple[str, str, bool]]
) -> list[dict[str, Any]]:
    """Print tokens a second, and how each way compares with another in the same round: medians, 95 % intervals."""
    lines = [
        {
            "way": way,
            "tokens/s": median([tokens / seconds for seconds, _, tokens in each]),
            "tokens/CPU s": median([tokens / max(cpu, 0.01) for _, cpu, tokens in each]),
            "": f"{each[0][2]} tokens a round",
        }
        for way, each in runs.items()
    ]
    show(lines)
    compared = list(_compared(runs, pairs))
    show(compared)
    return [*lines, *compared]


def _compared(
    runs: dict[str, list[tuple[float, float, int]]], pairs: list[tuple[str, str, bool]]
) -> Iterator[dict[str, Any]]:
    for way, other, speed in pairs:
        for place, clock in ((0, "wall"), (1, "CPU")):
            ratios = []
            for number, mine in enumerate(runs[way]):
                theirs = runs[other][number * len(runs[other]) // len(runs[way])]  # of the same round
                a, b = mine[2] / max(mine[place], 0.01), theirs[2] / max(theirs[place], 0.01)
                ratios.append(a / b if speed else 100 * (b / a - 1))
            low, high = median_interval(ratios) or (None, None)
            kind = "times the tokens a second" if speed else "% more time a token"
            yield {
                "compared": way,
                "median": median(ratios),
                "from": low,
                "to": high,
                "": f"{kind} ({clock}) of {other}",
            }
