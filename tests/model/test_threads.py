"""Edits are a thread's and a model's own: nothing mixes, and what another thread does is not touched."""

import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zoo
from helpers import CHECKPOINTING, batch, block_output, hooks, lora, make_tokenizer, random_direction

from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.hooks import edits_are_active, pause_edits
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer

PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9], [10, 11, 12, 13]]


def answer(model, job: int) -> object:
    """One of many answers, each with a coefficient, positions and a seed of its own; every third is plain."""
    vector, tokenizer = random_direction(model), make_tokenizer()
    options = {"max_new_tokens": 4, "temperature": float(job % 2), "seed": job}
    if job % 3 == 0:
        return generate_tokens(model, tokenizer, PROMPTS[: 1 + job % 2], **options)
    positions = ["all", "prompt", "response"][job % 7 % 3]
    with steer(model, vector, layer=1, coef=float(job % 5 - 2) * 4, positions=positions):
        return generate_tokens(model, tokenizer, PROMPTS[: 1 + job % 2], **options)


@pytest.mark.slow
def test_a_thousand_interleaved_answers_are_those_that_each_gives_alone():
    one, other = zoo.build("llama"), zoo.build("qwen2")
    models = [one] * 4 + [other] * 2
    alone = {(id(model), job): answer(model, job) for model in (one, other) for job in range(42)}
    wrong, start = [], threading.Barrier(6)

    def work(model, first: int) -> None:
        start.wait()
        for job in range(first, first + 167):
            if answer(model, job % 42) != alone[id(model), job % 42]:
                wrong.append((first, job))

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, model, 13 * i) for i, model in enumerate(models)]:
            done.result()
    assert not wrong
    assert hooks(one) == hooks(other) == 0 and "generate" not in vars(one)


def test_another_thread_is_not_steered_unless_it_is_given_the_context(model):
    inputs, vector = zoo.inputs(model), random_direction(model)
    plain = block_output(model, 1, inputs)
    with steer(model, vector, layer=1, coef=1.0), ThreadPoolExecutor(1) as pool:
        own = block_output(model, 1, inputs)
        other = pool.submit(block_output, model, 1, inputs).result()
        given = pool.submit(contextvars.copy_context().run, block_output, model, 1, inputs).result()
    torch.testing.assert_close(other, plain)
    torch.testing.assert_close(own, plain + vector.directions[1])
    torch.testing.assert_close(given, own)
    with pytest.raises(RuntimeError, match=r"it ran in another thread: start that \w+ contextvars"):
        with steer(model, vector, layer=1, coef=1.0), ThreadPoolExecutor(1) as pool:
            pool.submit(block_output, model, 1, inputs).result()


def test_edits_of_one_model_are_not_another_s(model):
    other, vector = zoo.build("qwen2"), random_direction(model)
    inputs = zoo.inputs(model)
    plain = block_output(other, 1, inputs)
    with steer(model, vector, layer=1, coef=1.0):
        assert edits_are_active(model) and not edits_are_active(other)
        torch.testing.assert_close(block_output(other, 1, inputs), plain)
        with steer(other, vector, layer=1, coef=1.0), pause_edits(model):
            assert edits_are_active(other) and not edits_are_active(model)
            torch.testing.assert_close(block_output(other, 1, inputs), plain + vector.directions[1])
        block_output(model, 1, inputs)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_backward_in_another_thread_recomputes_the_edit(model, checkpointing: str):
    """On a GPU autograd runs `backward` in threads of its own, which have no context."""
    gradients = []
    for threaded in (False, True):
        torch.manual_seed(0)
        net = lora(zoo.build("llama")).train()
        net.enable_input_require_grads()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
        with steer(net, random_direction(model), layer=1, coef=3.0, positions="labels"):
            loss = net(**batch()).loss
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result() if threaded else loss.backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


def test_a_monitor_in_each_thread_reads_its_own_text(model):
    vector = random_direction(model)

    def read(prompt: list[int]) -> torch.Tensor:
        with monitor(model, vector, layer=1, stops=[]) as trace:
            model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert len(trace.calls) == 1
        return trace["t"]

    alone = [read(prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(3) as pool:
        for found, expected in zip(pool.map(read, PROMPTS * 4), alone * 4):
            torch.testing.assert_close(found, expected)
