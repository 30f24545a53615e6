"""Where memory runs out the batch is halved, and the results are those of a machine with more."""

import weakref

import pytest
import torch
import zoo
from helpers import DECODERS, hooks, random_direction
from transformers import DynamicCache

from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model import memory
from persona_vectors.model.generation import generate, generate_batches
from persona_vectors.model.pooling import pool, pool_while_generating
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.steering.add import RowEdit
from persona_vectors.vectors.directions import unit_directions

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [5, 6, 7], [14, 15], [5, 6, 7], [9, 9]]
ROWS = [(prompt, [20 + i, 30, 40][: 1 + i % 3]) for i, prompt in enumerate(PROMPTS)]


class Small:
    """A memory for the activations of few rows: `seen` are the rows of each pass that began, in order."""

    def __init__(self, model, rows: int, *, decoding: bool | None = None, host: bool = False) -> None:
        self.rows, self.decoding, self.host, self.seen = rows, decoding, host, []
        self.held: list[weakref.ref] = []
        self.handle = model.model.layers[1].mlp.register_forward_pre_hook(self)

    def __call__(self, _module, args) -> None:
        assert all(reference() is None for reference in self.held), "what a failed batch made is still there"
        rows, width = args[0].shape[:2]
        self.seen.append(rows)
        if rows <= self.rows or self.decoding not in (None, width == 1):
            return
        activations = args[0] + 1  # in a frame that the traceback holds
        self.held.append(weakref.ref(activations))
        if self.host:
            torch.empty(1 << 60, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def answers(model, tokenizer) -> tuple[dict, dict]:
    tokens, means = {}, {}
    options = {"max_new_tokens": 5, "seed": 3, "reading": True}
    during = lambda _: pool_while_generating(model, stops=[2])  # noqa: E731
    for batch in generate_batches(model, tokenizer, PROMPTS, during=during, **options):
        tokens |= dict(zip(batch.rows, batch.answers))
        means |= dict(zip(batch.rows, batch.read().means))
    return tokens, means


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("decoding", [False, True], ids=["prefill", "decoding"])
def test_generation_goes_on_in_halves_with_the_same_answers(model, tokenizer, decoding: bool, host: bool):
    tokens, means = answers(model, tokenizer)
    small = Small(model, 2, decoding=decoding, host=host)
    found, found_means = answers(model, tokenizer)
    small.handle.remove()
    assert found == tokens and list(found) == list(tokens)
    torch.testing.assert_close(found_means, means, rtol=1e-4, atol=1e-5)
    assert small.held and hooks(model) == 0
    failures = len(small.held)
    small = Small(model, 2, decoding=decoding)
    assert answers(model, tokenizer)[0] == tokens
    assert failures <= 3 and len(small.held) == 0  # the size that fits is remembered


def test_finished_rows_are_read_in_halves_with_the_same_results(model):
    units = unit_directions(model, [random_direction(model)], "all")
    means, values = pool(model, ROWS).means, token_projections(model, ROWS, units)
    edits = [RowEdit(random_direction(model), 1, float(i % 2)) for i in range(len(ROWS))]
    logprobs = answer_logprobs(model, ROWS, edits=edits)
    for rows in (2, 1):
        small = Small(model, rows)
        torch.testing.assert_close(answer_logprobs(model, ROWS, edits=edits), logprobs)
        torch.testing.assert_close(pool(model, ROWS).means, means)
        torch.testing.assert_close(token_projections(model, ROWS, units), values)
        small.handle.remove()
        assert small.held and len(small.held) < 6


def test_one_row_that_does_not_fit_is_an_error_that_says_what_to_do(model, tokenizer):
    small = Small(model, 0)
    with pytest.raises(InputError, match=r"one row of \d+ tokens: give shorter texts, a smaller max_new_tokens"):
        generate(model, tokenizer, ["How?", "Why?"], max_new_tokens=3)
    with pytest.raises(InputError, match="memory ran out in a batch of one row"):
        pool(model, ROWS)
    small.handle.remove()
    assert hooks(model) == 0


def test_any_other_error_is_raised(model, tokenizer):
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a bug"):
        generate(model, tokenizer, ["How?", "Why?"], max_new_tokens=3)


@pytest.mark.parametrize("tokens", [4, 40], ids=["within the window", "beyond it"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "qwen3_moe", "gpt_oss", "deepseek_v3", "llava"])
def test_the_size_of_the_cache_is_known_before_there_is_one(name: str, tokens: int):
    """Grouped heads, sliding windows, latent attention, a language model inside another one."""
    model, ids = zoo.build(name), torch.full((1, tokens), 5)
    for dtype in (torch.float32, torch.bfloat16):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.to(dtype).get_decoder()(input_ids=ids, cache=cache, use_cache=True)
        assert memory.cache_bytes(model, tokens) == sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)


@pytest.mark.parametrize("name", DECODERS)
def test_batches_are_what_the_free_memory_holds(name: str, monkeypatch):
    model, prompts = zoo.build(name), [[5] * (3 + i % 4) for i in range(600)]
    one = memory.row_bytes(model, 6, 26)
    assert one > memory.row_bytes(model, 6, 16) or memory.cache_bytes(model, 26) == 0  # a state of fixed size
    sizes = {}
    for free in (0, 100 * one, 10**15, None):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        budget = memory.answers_budget(model, prompts, max_new_tokens=20)
        sizes[free] = len(next(budget.batches(prompts, 20))[0])
    assert sizes == {0: 1, 100 * one: 60, 10**15: memory.CPU_WIDTH, None: 128}
    monkeypatch.setattr(memory, "free_bytes", lambda _: None)
    unknown = memory.answers_budget(model, prompts, max_new_tokens=1000)
    assert len(next(unknown.batches(prompts, 1000))[0]) == memory.UNKNOWN // 1006
    monkeypatch.setattr(memory, "input_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 10**15)
    assert len(next(memory.answers_budget(model, prompts, max_new_tokens=20).batches(prompts, 20))[0]) == memory.WIDTH
    given = memory.answers_budget(model, prompts, max_new_tokens=20, batch_tokens=26 * 5)
    assert len(next(given.batches(prompts, 20))[0]) == 5


GIB = 2**30
MACHINE = {"proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n"}
V2 = {"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/step/memory.max": "max\n"}
V2 |= {"sys/fs/cgroup/job/step/memory.current": f"{GIB}\n"}
V1 = {"proc/self/cgroup": "5:devices:/\n4:cpu,memory:/docker/ab12\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MACHINE, 8 * GIB),
        (MACHINE | V2, 8 * GIB),
        # a limit on the job around the step, and file pages that can be had back
        (
            MACHINE
            | V2
            | {
                "sys/fs/cgroup/job/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/job/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
            },
            3 * GIB // 2,
        ),
        # the older kind, seen from inside a container: its path is the host's
        (
            MACHINE
            | V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}\n",
            },
            5 * GIB // 4,
        ),
        # without a limit this kind writes a number that no machine has
        (
            MACHINE
            | V1
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            },
            8 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{GIB}\n",
                "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
            },
            0,
        ),
    ],
)
def test_free_memory_is_the_machines_or_what_the_container_may_have(files, free, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.host_free_bytes(tmp_path) == free


def test_experts_that_are_gathered_for_each_row_count_off_the_cpu(monkeypatch):
    model = zoo.build("qwen3_moe")
    plain = memory.row_bytes(model, 6, 26)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    experts = model.model.layers[0].mlp.experts
    assert memory.row_bytes(model, 6, 26) - plain == 2 * sum(p[0].nbytes for p in experts.parameters())


def test_the_free_memory_is_known_here(model):
    free = memory.free_bytes(model)
    assert free is None or 2**20 < free < 2**50
