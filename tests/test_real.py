"""The embedded model: what the tiny random ones cannot show."""

import copy
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import persona_vectors as pv
from persona_vectors.evaluation.answers import steered_answers
from persona_vectors.extraction.rollouts import load_rollouts
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.prompts import chat_prompt, encode

pytestmark = pytest.mark.real
VECTORS = Path(__file__).parent.parent / "vectors" / "smollm2-135m"
QUESTIONS = pv.load_trait("optimistic").questions


def optimistic() -> pv.PersonaVector:
    return pv.PersonaVector.load(VECTORS / "optimistic.safetensors")


@pytest.mark.parametrize("name", pv.list_traits())
def test_shipped_vectors_fit_and_say_how_they_were_made(name: str, embedded):
    vector = pv.PersonaVector.load(VECTORS / f"{name}.safetensors")
    vector.check_fits(embedded[0])
    assert vector.model == "smollm2-135m"
    assert vector.separation is not None and vector.split_half_cosine is not None
    assert vector.info["command"].startswith(f"persona-vectors extract smollm2-135m {name}")
    assert vector.info["pairs_kept"] >= 10


def test_steering_moves_an_outside_opinion_more_than_a_random_vector(embedded):
    judge = pv.SentimentJudge()

    def effect(vector: pv.PersonaVector) -> float:
        low, high = steered_answers(
            *embedded, vector, QUESTIONS.eval, layer=13, coefs=[-2, 2], max_new_tokens=32, seed=5
        )
        return sum(judge.compound(b) - judge.compound(a) for a, b in zip(low, high)) / len(low)

    own, control = effect(optimistic()), effect(pv.random_vector(optimistic(), seed=0))
    assert own > 0.35
    assert own > control + 0.2


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_steered_text_is_the_same_with_and_without_a_cache(embedded, positions: str):
    model, tokenizer = embedded
    prompts = [encode(tokenizer, chat_prompt(tokenizer, question)) for question in QUESTIONS.eval[:3]]
    texts = []
    for use_cache in (True, False):
        with pv.steer(model, optimistic(), layer=14, coef=2.0, positions=positions):
            options = {"max_new_tokens": 10, "temperature": 0.0, "use_cache": use_cache}
            texts.append(generate_tokens(model, tokenizer, prompts, **options))
    assert texts[0] == texts[1]


def test_official_rollouts_give_the_official_vector(embedded, tmp_path):
    """`extract --from` against one text at a time with all hidden states: the paper's own numbers."""
    model, tokenizer = embedded
    trait = pv.load_trait("optimistic")
    texts = {"pos": "What a bright and hopeful day it will be", "neg": "Nothing good ever comes of such a plan"}
    sums: dict[str, list[torch.Tensor]] = {"pos": [], "neg": []}
    loaded = []
    for side, text in texts.items():
        path = tmp_path / f"{side}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "prompt", "answer", "question_id", "optimistic", "coherence"])
            for i, question in enumerate(trait.questions.extract[:10]):
                prompt = chat_prompt(tokenizer, question, system=trait.system_prompt(side, i % 5))
                answer = f"{text}.\n\nNumber {i}, " + "and so on " * i
                writer.writerow([question, prompt, answer, i, 90 if side == "pos" else 5, 95])
                n = len(tokenizer(prompt, add_special_tokens=False).input_ids)
                ids = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt").input_ids
                with torch.no_grad():
                    states = torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states)[:, 0]
                pooled = [states[:, n:].mean(1), states[:, :n].mean(1), states[:, n - 1]]
                sums[side].append(torch.stack(pooled))
        loaded += load_rollouts(path, side=side, trait=trait, tokenizer=tokenizer)
    reference = torch.stack(sums["pos"]).mean(0) - torch.stack(sums["neg"]).mean(0)
    for row, pooling in zip(reference, ["response_mean", "prompt_mean", "prompt_last"]):
        found = pv.extract_from(model, tokenizer, trait, loaded, judge=None, pooling=pooling).directions[:-1]
        expected = row[1:-1]
        assert torch.nn.functional.cosine_similarity(found, expected, dim=1).min() >= 0.9999
        assert ((found.norm(dim=1) / expected.norm(dim=1)) - 1).abs().max() < 0.01


def test_extraction_while_generating_equals_the_second_pass(embedded, tmp_path):
    model, tokenizer = embedded
    trait, path = pv.load_trait("humorous"), tmp_path / "r.jsonl"
    options = {"judge": None, "samples": 2, "first": 2, "max_new_tokens": 12}
    direct = pv.extract(model, tokenizer, trait, rollouts=path, **options)
    ready = [r for side in ("pos", "neg") for r in load_rollouts(path, side=side, trait=trait, tokenizer=tokenizer)]
    second = pv.extract_from(model, tokenizer, trait, ready, judge=None, unfiltered=True)
    torch.testing.assert_close(direct.directions, second.directions, rtol=1e-3, atol=2e-3)
    assert json.loads(path.read_text().splitlines()[0])["model"] == "smollm2-135m"


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_monitored_values_are_those_of_the_finished_text(embedded, temperature: float, use_cache: bool):
    model, tokenizer = embedded
    vectors = [pv.PersonaVector.load(VECTORS / f"{name}.safetensors") for name in ("optimistic", "humorous")]
    prompts = [encode(tokenizer, pv.chat_prompt(tokenizer, text)) for text in ("Hi!", "How will my exam go tomorrow?")]
    options = {"max_new_tokens": 12, "temperature": temperature, "use_cache": use_cache}
    with pv.monitor(model, vectors, layer=[4, 19, 28]) as trace:
        rows = generate_tokens(model, tokenizer, prompts, **options)
    for line, (prompt, (answer, _)) in enumerate(zip(prompts, rows)):
        text = torch.tensor([[*prompt, *answer]])[:, : len(prompt) + 11]  # the last token sampled is never read
        with torch.no_grad():
            states = model(text, output_hidden_states=True).hidden_states
        for key, vector in zip(trace.last.keys, vectors * 3):
            name, layer = key.split("@")
            assert vector.trait == name
            found = trace[key][line]
            expected = vector.project(states[int(layer) + 1][0], layer=int(layer))
            torch.testing.assert_close(found[~found.isnan()][: len(expected)], expected, rtol=1e-3, atol=1e-3)


def test_nnsight_and_transformer_lens_give_the_same_steered_logits_and_vector(embedded, tmp_path):
    from nnsight.modeling.transformers import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge

    model, tokenizer = embedded
    vector = pv.PersonaVector.load(VECTORS / "optimistic.safetensors")
    trait = pv.load_trait("optimistic")
    ids = torch.tensor([encode(tokenizer, pv.chat_prompt(tokenizer, "How will my exam go?"))])
    options = {"samples": 1, "first": 2, "max_new_tokens": 12, "min_pairs": 2, "judge": None}

    def extracted(wrapped: object, name: str) -> pv.PersonaVector:
        return pv.extract(wrapped, tokenizer, trait, rollouts=tmp_path / f"{name}.jsonl", **options)

    plain = extracted(model, "plain")
    with pv.steer(model, vector, layer=19, coef=2.0), torch.no_grad():
        steered = model(ids).logits
    wrapped = TransformersModel(model, tokenizer=tokenizer)
    with wrapped.trace(ids):
        pv.steer_trace(wrapped, vector, layer=19, coef=2.0)
        logits = wrapped.output.logits.save()
    torch.testing.assert_close(logits, steered, rtol=1e-4, atol=1e-4)
    assert extracted(wrapped, "nnsight").cosine(plain).min() >= 0.99999
    bridge = TransformerBridge.boot_transformers(  # the bridge changes the model that it is given
        "smollm2-135m", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
    )
    with pv.steer(bridge, vector, layer=19, coef=2.0), torch.no_grad():
        torch.testing.assert_close(bridge(ids), steered, rtol=1e-4, atol=1e-4)
    assert extracted(bridge, "lens").cosine(plain).min() >= 0.99999


def test_the_quick_reproduction_of_the_papers_training_runs(tmp_path):
    script = VECTORS.parent.parent / "scripts" / "reproduce_paper"
    command = [sys.executable, script, "smollm2-135m", "optimistic", "--vectors", VECTORS, "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent)}
    subprocess.run([*map(str, command), "--out", str(tmp_path)], check=True, env=environment, capture_output=True)
    with (tmp_path / "correlations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["against"] for row in rows} == {"shift", "predicted"}
    assert {row["direction"] for row in rows if row["paper"]} == {"optimistic"}
    with (tmp_path / "interventions.csv").open(newline="") as file:
        losses = {row["intervention"]: float(row["neutral loss"]) for row in csv.DictReader(file)}
    assert {"base model", "plain training", "preventative -2", "preventative -2, random", "CAFT"} <= set(losses)
    assert all(1 < loss < 6 for loss in losses.values())
    assert {path.name for path in tmp_path.glob("*.png")} == {"shift.png", "predicted.png", "prevention.png"}
