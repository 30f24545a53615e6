"""Answers of Ray actors that each load the model."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import save_tiny

import persona_vectors as pv
from persona_vectors.cli.judges import make_generate
from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.worker_generator import _answer
from persona_vectors.model import actors
from persona_vectors.model.generation import generate_tokens


def test_an_actor_s_answers_are_those_of_the_seeds(model, tokenizer):
    """One part, as an actor answers it, against one prompt at a time."""
    prompts, seeds = [[5, 6, 7], [5, 6, 7], [8, 9]], [2**61 + 3, 4, 5]
    part = json.dumps([(i + 10, prompt, seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds))])
    found = json.loads(_answer(tokenizer, {"max_new_tokens": 6, "temperature": 1.0}, model, part))
    assert sorted(row for row, *_ in found) == [10, 11, 12]
    for row, text, tokens, ended in found:
        alone = generate_tokens(model, tokenizer, [prompts[row - 10]], max_new_tokens=6, seed=[seeds[row - 10]])[0]
        assert (tokens, ended) == tuple(alone) and text == tokenizer.decode(tokens)


def test_no_workers_are_refused():
    with pytest.raises(InputError, match="workers is 0 and part is 64: give 1 or more"):
        make_generate("workers:0", lambda: pytest.fail("loaded"))
    with pytest.raises(InputError, match=r"give openai:MODEL, .* or workers:N"):
        make_generate("workers:many", lambda: pytest.fail("loaded"))


def test_more_workers_than_gpus_are_told(model, monkeypatch):
    monkeypatch.setattr(actors, "_ray", lambda: SimpleNamespace(cluster_resources=lambda: {"GPU": 2}))
    with pytest.raises(InputError, match="3 workers of 1 GPUs are more than the 2 there are: give fewer workers"):
        next(actors.map_in_actors(model, lambda *_: "", ["a"], workers=3, gpus_per_worker=1))


@pytest.mark.slow
def test_actors_answer_as_one_process_does(tmp_path, trait, monkeypatch):
    ray = pytest.importorskip("ray")
    folder = save_tiny(tmp_path / "tiny")
    model, tokenizer = pv.load_model(folder, device="cpu")
    drawing = {"judge": None, "samples": 2, "max_new_tokens": 6, "min_pairs": 1, "seed": 3}
    own = pv.extract(model, tokenizer, trait, rollouts=tmp_path / "own.jsonl", **drawing)
    asked = {"judge": pv.SentimentJudge(), "max_new_tokens": 6}
    plain = pv.evaluate(model, tokenizer, trait, **asked)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    try:
        workers = pv.WorkerGenerator(folder, workers=2, part=5)
        theirs = pv.extract(model, tokenizer, trait, rollouts=tmp_path / "theirs.jsonl", generate=workers, **drawing)
        answered = pv.evaluate(model, tokenizer, trait, generate=workers, **asked)
    finally:
        ray.shutdown()
    wanted, found = (pv.load_rollouts(tmp_path / f"{name}.jsonl", side="pos", trait=trait, tokenizer=tokenizer)
                     for name in ("own", "theirs"))  # fmt: skip
    assert {(r.key, r.answer_ids) for r in found} == {(r.key, r.answer_ids) for r in wanted} and len(found) > 10
    torch.testing.assert_close(theirs.directions, own.directions)
    assert answered.answers == plain.answers
