"""What a vector costs, from the trait on: ours, ours as of an earlier commit, and the official procedure."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers.utils import logging

from bench.inputs import Device, ModelName, Out, Rounds, TraitName, load
from bench.measuring import environment, measure, median, save, show
from bench.peers import official
from persona_vectors.cli.judges import make_judge
from persona_vectors.data.traits import Trait, load_trait
from persona_vectors.evaluation.judge import Answer, Judge
from persona_vectors.evaluation.judges import score_both
from persona_vectors.extraction.difference import extract
from persona_vectors.extraction.rollouts import plan
from persona_vectors.model.blocks import Model
from persona_vectors.model.loading import EMBEDDED
from persona_vectors.model.prompts import decode, encode

ROOT = Path(__file__).parents[2]
BATCH = 20  # eval_persona.py's batches of answers that transformers generates
THRESHOLD = 50.0
CHILD = """
import json, sys, time
import torch
import persona_vectors as pv
from persona_vectors.cli.judges import make_judge

name, device, trait, judge, threads, options = json.loads(sys.argv[1])
torch.set_num_threads(threads)
model, tokenizer = pv.load_model(name, device=device)
trait = pv.load_trait(trait)
judge = make_judge(judge, model, tokenizer, trait, None)
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    try:
        pv.extract(model, tokenizer, trait, judge=judge, **(options | json.loads(line)))
        print(time.perf_counter() - start, flush=True)
    except ValueError as error:
        print(str(error).splitlines()[0], flush=True)
"""


@dataclass
class Way:
    """One way to make a vector, and the seconds that it took in each round."""

    name: str
    does: str
    run: Callable[[dict[str, Any]], float]
    seconds: list[float] = field(default_factory=list)


def end_to_end(
    model_name: ModelName = EMBEDDED,
    device: Device = None,
    trait: TraitName = "optimistic",
    judge: Annotated[str, typer.Option(help="contrast[:PAIRS], sentiment or openai:MODEL")] = "contrast:2",
    samples: Annotated[int, typer.Option(help="answers to each question", min=1)] = 10,
    first: Annotated[int | None, typer.Option(help="only the first questions", min=1)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="most tokens of an answer", min=1)] = 100,
    since: Annotated[str | None, typer.Option(help="also ours as of this commit of this repository")] = None,
    rounds: Rounds = 3,
    out: Out = None,
) -> None:
    """Measure trait to vector: answers, judging, activations and their difference."""
    logging.disable_progress_bar()
    model, tokenizer = load(model_name, None, device)
    loaded = load_trait(trait)
    options: dict[str, Any] = {"samples": samples, "first": first, "max_new_tokens": max_new_tokens, "min_pairs": 1}
    found = environment(model, model_name) | options | {"trait": trait, "judge": judge, "rounds": rounds}
    chosen = make_judge(judge, model, tokenizer, loaded, lambda name: load(name, None, device))
    ways = ways_of(model, tokenizer, loaded, chosen, options)
    with ExitStack() as stack:
        if since:
            child = [model_name, str(model.device), trait, judge, torch.get_num_threads(), options]
            ways.insert(1, stack.enter_context(earlier(since, child)))
        run_ways(ways, rounds)
    answers = len(plan(tokenizer, loaded, first=first, samples=samples))
    found["end_to_end"] = report(ways, answers)
    save(found, out)


def ways_of(model: Model, tokenizer: Any, trait: Trait, judge: Judge | None, options: dict[str, Any]) -> list[Way]:
    """Return ours and the official procedure."""

    def ours(more: dict[str, Any]) -> float:
        return measure(lambda: extract(model, tokenizer, trait, judge=judge, **(options | more)), model.device)[0]

    def theirs(more: dict[str, Any]) -> float:
        return measure(lambda: official_vector(model, tokenizer, trait, judge, **(options | more)), model.device)[0]

    return [
        Way("ours", "read while answering, prompts read once, judged beside it", ours),
        Way("official procedure", f"batches of {BATCH} in order; then judged; then read one by one", theirs),
    ]


def official_vector(
    model: Model,
    tokenizer: Any,
    trait: Trait,
    judge: Judge | None,
    *,
    samples: int,
    first: int | None,
    max_new_tokens: int,
    min_pairs: int,
    seed: int = 0,
) -> Tensor:
    """Make a vector as the paper's scripts do with transformers: eval_persona.py for each side, then generate_vec.py.

    Returns the difference of the mean answer activations, [entry of hidden_states, hidden]. As theirs, it keeps a pair
    where both answers pass, and the answers' text is tokenised anew.
    """
    torch.manual_seed(seed)
    tasks = plan(tokenizer, trait, first=first, samples=samples)
    texts = official_answers(model, tokenizer, [list(task["prompt_ids"]) for task in tasks], max_new_tokens)
    answers = [Answer(task["question"], text, task["pair"]) for task, text in zip(tasks, texts)]
    passed: dict[str, dict[Any, int]] = {"pos": {}, "neg": {}}
    scores = [(100.0, 100.0)] * len(tasks) if judge is None else None
    scored = scores or score_both(model, tokenizer, judge, answers, trait.eval_prompt)  # type: ignore[arg-type]
    for i, (task, (score, coherence)) in enumerate(zip(tasks, scored)):
        right = judge is None or (score is not None and (score >= THRESHOLD) == (task["side"] == "pos"))
        if right and coherence is not None and coherence >= THRESHOLD and texts[i].strip():
            passed[task["side"]][task["pair"], task["question"], task["sample"]] = i
    kept = [key for key in passed["pos"] if key in passed["neg"]]
    if len(kept) < min_pairs:
        raise ValueError(f"only {len(kept)} pairs are kept of {len(tasks)} answers")
    means = []
    for side in ("pos", "neg"):
        rows = [(tasks[i]["prompt_ids"], encode(tokenizer, texts[i])) for i in (passed[side][key] for key in kept)]
        means.append(
            torch.stack([torch.cat(layer).float().mean(0) for layer in official(model, rows)["response_mean"]])
        )
    return means[0] - means[1]


def official_answers(model: Model, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Answer prompts in batches, in their order, padded on the left, each batch until its longest answer ends."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts = []
    for begin in range(0, len(prompts), BATCH):
        batch = prompts[begin : begin + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=model.device)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, min_new_tokens=1, pad_token_id=pad, **sampling
            )
        texts += [decode(tokenizer, row) for row in made[:, width:].tolist()]
    return texts


@contextmanager
def earlier(commit: str, given: list[Any]) -> Iterator[Way]:
    """Yield ours as of a commit: a process that imports the package from a checkout of it, and loads the model once."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "add", "--quiet", "--detach", f"{folder}/then", commit], check=True)
        command = [sys.executable, "-c", CHILD, json.dumps(given)]
        process = subprocess.Popen(
            command, cwd=f"{folder}/then", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None and process.stdout is not None
        asked, answered = process.stdin, process.stdout

        def run(more: dict[str, Any]) -> float:
            asked.write(json.dumps(more) + "\n")
            asked.flush()
            return float(answered.readline())

        try:
            if answered.readline() != "ready\n":
                raise RuntimeError(f"the package as of {commit} did not start")
            yield Way(f"ours at {commit}", "the same call, in a process of its own", run)
        finally:
            process.kill()
            process.wait()
            subprocess.run([*git, "remove", "--force", f"{folder}/then"], check=True)


def run_ways(ways: list[Way], rounds: int) -> None:
    """Run every way once a round, forwards and backwards in turn, after a short run of each."""
    for way in ways:
        with suppress(ValueError):  # so short answers may all fail the judge
            way.run({"first": 1, "samples": 1, "max_new_tokens": 8})
    with tqdm(total=rounds * len(ways), unit="run", leave=False, disable=None) as bar:
        for number in range(rounds):
            for way in ways if number % 2 == 0 else reversed(ways):
                bar.set_postfix_str(way.name)
                way.seconds.append(way.run({"seed": number}))
                bar.update()


def report(ways: list[Way], answers: int) -> list[dict[str, Any]]:
    """Print the table, and return it with each round's seconds; ratios are taken within a round."""
    print(f"{answers} answers; medians of {len(ways[0].seconds)} rounds\n")
    lines = [
        {
            "way": way.name,
            "answers/min": 60 * answers / (median(way.seconds) or 1.0),
            "ours x": median([theirs / ours for ours, theirs in zip(ways[0].seconds, way.seconds)]),
            "": way.does,
        }
        for way in ways
    ]
    show(lines)
    return [line | {"seconds": way.seconds} for line, way in zip(lines, ways)]
