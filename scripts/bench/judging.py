"""What a slow judge behind a server adds to extraction: generating alone, judging alone, and one beside the other."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Rounds, TraitName, load
from bench.measuring import environment, measure, median, median_interval, save, show
from persona_vectors.data.traits import Trait, load_trait
from persona_vectors.evaluation.judge import Answer
from persona_vectors.evaluation.judges import score_both
from persona_vectors.evaluation.openai_judge import OpenAIJudge
from persona_vectors.extraction.difference import extract
from persona_vectors.extraction.rollouts import plan
from persona_vectors.model.blocks import Model
from persona_vectors.model.loading import EMBEDDED


class Slow(BaseHTTPRequestHandler):
    """A judge that says after a while, of an answer's text alone, 100 or 0; coherent is all that it is asked of."""

    protocol_version, seconds = "HTTP/1.1", 1.0

    def do_POST(self) -> None:
        """Answer a chat completion with the log-probabilities of one number."""
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        time.sleep(self.seconds)
        number = "100" if "coheren" in prompt or zlib.crc32(prompt.encode()) % 2 else "0"
        top = [{"token": number, "logprob": 0.0}]
        choice = {"message": {"content": number}, "logprobs": {"content": [{"top_logprobs": top}]}}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextlib.contextmanager
def slow_server(seconds: float) -> Iterator[str]:
    """Yield the address of such a judge, in a process of its own."""
    command = [sys.executable, __file__, str(seconds)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


def judging(
    model_name: ModelName = EMBEDDED,
    device: Device = None,
    trait: TraitName = "optimistic",
    seconds: Annotated[float, typer.Option(help="what the judge takes for an answer", min=0)] = 1.0,
    samples: Annotated[int, typer.Option(help="answers to each question", min=1)] = 4,
    first: Annotated[int | None, typer.Option(help="only the first questions", min=1)] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer", min=1)] = 60,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Measure extraction with a judge that takes its time, beside the longer of generating and judging alone."""
    logging.disable_progress_bar()
    model, tokenizer = load(model_name, None, device)
    options: dict[str, Any] = {"samples": samples, "first": first, "max_new_tokens": max_new_tokens, "min_pairs": 1}
    found = environment(model, model_name) | options | {"seconds": seconds, "rounds": rounds}
    os.environ.setdefault("OPENAI_API_KEY", "none")
    with slow_server(seconds) as address:
        times = run_ways(ways_of(model, tokenizer, load_trait(trait), address, options), rounds)
    answers = len(plan(tokenizer, load_trait(trait), first=first, samples=samples))
    found["judging"] = report(times, answers)
    save(found, out)


def ways_of(
    model: Model, tokenizer: Any, trait: Trait, address: str, options: dict[str, Any]
) -> dict[str, Callable[[int], float]]:
    """Return what gives the seconds of each way in a round, whose number is the answers' seed."""
    count = len(plan(tokenizer, trait, first=options["first"], samples=options["samples"]))

    def asked(work: Callable[[OpenAIJudge], object]) -> float:
        with tempfile.TemporaryDirectory() as folder:  # nothing is known of an earlier round
            judge = OpenAIJudge("slow", base_url=address, cache=Path(folder) / "judge.jsonl")
            return measure(lambda: work(judge), model.device)[0]

    def score(judge: OpenAIJudge, number: int) -> object:
        answers = [Answer(f"question {i}", f"answer {i} of round {number}") for i in range(count)]
        return score_both(model, tokenizer, judge, answers, trait.eval_prompt)

    return {
        "generating": lambda number: measure(
            lambda: extract(model, tokenizer, trait, judge=None, seed=number, **options), model.device
        )[0],
        "judging": lambda number: asked(lambda judge: score(judge, number)),
        "both": lambda number: asked(
            lambda judge: extract(model, tokenizer, trait, judge=judge, seed=number, **options)
        ),
    }


def run_ways(ways: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return each way's seconds in every round, forwards and backwards in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=rounds * len(ways), unit="run", leave=False, disable=None) as bar:
        for number in range(rounds):
            for name in ways if number % 2 == 0 else reversed(ways):
                bar.set_postfix_str(name)
                times[name].append(ways[name](number))
                bar.update()
    return times


def report(times: dict[str, list[float]], answers: int) -> list[dict[str, Any]]:
    """Print the table, and return it with each round's seconds; ratios are taken within a round."""
    print(f"{answers} answers; medians of {len(times['both'])} rounds\n")
    longer = [max(pair) for pair in zip(times["generating"], times["judging"])]
    lines = []
    for name, each in times.items():
        ratios = [own / most for own, most in zip(each, longer)]
        low, high = median_interval(ratios) or (None, None)
        lines.append({"": name, "s": median(each), "x the longer": median(ratios), "from": low, "to": high})
    show(lines)
    return [line | {"seconds": each} for line, each in zip(lines, times.values())]


if __name__ == "__main__":
    Slow.seconds = float(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    server.serve_forever()
