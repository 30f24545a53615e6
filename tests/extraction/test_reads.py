"""What extraction keeps of each answer: the same numbers from the disk, and memory that does not grow with them."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ENVIRONMENT
from scipy.stats import mannwhitneyu
from torch import Tensor

from persona_vectors.data.errors import InputError
from persona_vectors.extraction import reads as module
from persona_vectors.extraction.difference import extract, extract_poolings_from
from persona_vectors.extraction.evidence import evidence
from persona_vectors.extraction.reads import Reads, no_reads
from persona_vectors.extraction.rollouts import Rollout, load_rollouts
from persona_vectors.model.pooling import POOLINGS, Pooled

SMALL = {"samples": 2, "max_new_tokens": 3, "batch_tokens": 400, "min_pairs": 2}


def answers(side: str, count: int) -> list[Rollout]:
    shared = {"side": side, "pair": 0, "prompt": "", "answer": "a", "prompt_ids": (int(side == "pos"),)}
    return [Rollout(question=f"q{i % 6}", sample=i, answer_ids=(i,), **shared) for i in range(count)]


def measure(reads: Reads, both: list[Rollout], pooling: int) -> dict[str, Tensor]:
    pos, neg = both[: len(both) // 2], both[len(both) // 2 :]
    means = partial(reads.mean, pooling=pooling)
    return evidence(lambda: zip(map(means, pos), map(means, neg)), torch.arange(len(pos)) % 6)


def plain_evidence(pos: Tensor, neg: Tensor, question: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from all answers at once, as the words have it."""
    generator, count = torch.Generator().manual_seed(0), int(question.max()) + 1
    cosines, areas = [], []
    for _ in range(20):
        first = torch.isin(question, torch.randperm(count, generator=generator)[: count // 2])
        halves = [pos[half].mean(dim=0) - neg[half].mean(dim=0) for half in (first, ~first)]
        cosines.append(torch.nn.functional.cosine_similarity(*halves, dim=1))
    for fold in range(5):
        held = question % 5 == fold
        along = pos[~held].mean(dim=0) - neg[~held].mean(dim=0)
        one, other = ((side[held] * along).sum(dim=2) for side in (pos, neg))
        areas.append((one[:, None] > other[None]).float().mean(dim=(0, 1)))
    return pos.mean(dim=0) - neg.mean(dim=0), torch.stack(cosines).mean(dim=0), torch.stack(areas).mean(dim=0)


@pytest.mark.parametrize("part", [1, 20_000, 2**20])
def test_the_statistics_are_those_of_all_answers_at_once(monkeypatch, part: int):
    """From a file that is on the disk, that gets there half-way, or that stays in memory."""
    monkeypatch.setattr(module, "PART", part)
    means = torch.randn(80, 2, 7, 16, generator=torch.Generator().manual_seed(0))
    means += 0.02 * torch.arange(80)[:, None, None, None]
    both = [*answers("pos", 40), *answers("neg", 40)]
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1)).tolist()
    with no_reads() as reads:
        for some in (order[:13], order[13:60], order[60:]):
            reads.add([both[i] for i in some], Pooled(means[some], means[some].norm(dim=-1).mean(dim=1)))
        assert reads.file._rolled == (part < means.nbytes)
        for pooling in range(2):
            found = measure(reads, both, pooling)
            expected = plain_evidence(means[:40, pooling], means[40:, pooling], torch.arange(40) % 6)
            for name, value in zip(("directions", "split_half_cosine", "separation"), expected, strict=True):
                torch.testing.assert_close(found[name], value)
        reads.add([both[5], both[5]], Pooled(means[[5, 5]] + 1, means[[5, 5]].norm(dim=-1).mean(dim=1)))
        reads.add([both[6]], Pooled(means[6:7] + 2, torch.zeros(1, 7)))
        assert reads.mean(both[6], 1).equal(means[6, 1] + 2) and reads.mean(both[5], 0).equal(means[5, 0] + 1)
        assert reads.norm(both[5]).equal(means[5].norm(dim=-1).mean(dim=0))


def test_a_vector_does_not_depend_on_what_fits_into_memory(model, tokenizer, trait, tmp_path, monkeypatch):
    path = tmp_path / "r.jsonl"
    whole = extract(model, tokenizer, trait, judge=None, rollouts=path, **SMALL)
    both = [r for side in ("pos", "neg") for r in load_rollouts(path, side=side, trait=trait, tokenizer=tokenizer)]
    ready = {"judge": None, "unfiltered": True, "min_pairs": 2}
    read = extract_poolings_from(model, tokenizer, trait, both, **ready)
    monkeypatch.setattr(module, "PART", 3 * 4 * whole.directions.numel() * 5)  # five answers, all poolings
    parts = extract(model, tokenizer, trait, judge=None, **SMALL)
    again = extract_poolings_from(model, tokenizer, trait, both, **ready)
    for one, other in [(whole, parts), *((read[pooling], again[pooling]) for pooling in POOLINGS)]:
        for name in ("directions", "residual_norms", "split_half_cosine", "separation"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5)


def test_a_full_disk_is_named_with_what_is_needed(monkeypatch):
    monkeypatch.setattr(module, "PART", 1)

    def full(_) -> None:
        raise OSError(28, "No space left on device")

    with no_reads() as reads:
        monkeypatch.setattr(reads.file, "write", full)
        with pytest.raises(InputError, match=r"do not fit into .*No space left.*room for 0\.8 MB an answer"):
            reads.add(answers("pos", 1), Pooled(torch.zeros(1, 1, 8, 25_000), torch.zeros(1, 8)))


def memory(count: int, layers: int, hidden: int) -> float:
    """Return the MB that so many answers and their statistics take, at the most, in this process."""

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        while not done.wait(0.005):
            peak.append(max(peak.pop(), resident()))

    both = [*answers("pos", count // 2), *answers("neg", count // 2)]
    mannwhitneyu([1.0], [2.0])  # it is large when it is first used
    before, peak, done = resident(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    with no_reads() as reads:
        for first in range(0, count, 40):
            means = torch.randn(40, 1, layers, hidden, dtype=torch.float32)
            reads.add(both[first : first + 40], Pooled(means, torch.zeros(40, layers, dtype=torch.float32)))
        measure(reads, both, 0)
    done.set()
    thread.join()
    return (peak[0] - before) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_answers():
    """600 answers with 600 MB of means. 2,000 of a 70B model: PYTHONPATH=.:tests python THIS_FILE 2000 80 8192."""
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, __file__, "600", "64", "4096"]
    done = subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert float(done.stdout) < 250


if __name__ == "__main__":
    print(memory(*map(int, sys.argv[1:])))
