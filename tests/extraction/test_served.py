"""Answers from a server that fails as real ones do, from a function, and from llama.cpp's server."""

import hashlib
import json
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from fault_server import FAULTS, started
from helpers import make_tokenizer, plain_logprob, random_direction, run, save_tiny, write

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import load_trait
from persona_vectors.evaluation import openai_client
from persona_vectors.evaluation.openai_generator import OpenAIGenerator
from persona_vectors.evaluation.served import Completion
from persona_vectors.extraction.difference import extract, extract_from
from persona_vectors.extraction.rollouts import Rollout, load_rollouts, read_jsonl
from persona_vectors.flagging.parts import Flags
from persona_vectors.model.loading import embedded_gguf
from persona_vectors.model.prompts import encode
from persona_vectors.steering.add import steer
from persona_vectors.vectors.vector import PersonaVector

SMALL = {"judge": None, "samples": 4, "first": 1, "max_new_tokens": 6, "min_pairs": 2}
ASKED = 2 * 3 * 4  # sides, pairs, samples of one question


def answer(prompt: list[int], seed: int, number: int) -> str:
    return "a" + hashlib.sha256(f"{prompt}{seed + number}".encode()).hexdigest()[:5]


def reply(body: dict, *, style: str, most: int) -> dict | str:
    """Reply as vLLM or llama.cpp does, or as one that gives no token ids; `most` samples a request, or a refusal."""
    if body["n"] > most:
        return f"Field 'n': Value must be between 1 <= value <= {most}"
    if len(body["prompt"]) > 300:
        return "this model's maximum context length is 300 tokens"
    choices, tokenizer = [], make_tokenizer()
    for number in range(1 if style == "one" else body["n"]):
        text = answer(body["prompt"], body["seed"], number)
        choice = {"index": number, "text": text, "finish_reason": "length", "logprobs": None}
        ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
        if style == "vllm" and body["return_token_ids"]:
            choice |= {"token_ids": ids, "finish_reason": "stop"}
        if style == "llama.cpp" and body["n_probs"]:
            choice["logprobs"] = {"content": [{"id": token, "token": "", "logprob": -1.0} for token in ids]}
        choices.append(choice)
    return {"choices": choices, "usage": {"prompt_tokens": len(body["prompt"])}}


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr(openai_client, "BACKOFF", 0.005)
    with started() as start:
        yield lambda style="vllm", *, most=100, **options: start(partial(reply, style=style, most=most), **options)


def kept(path: Path) -> list[Rollout]:
    return read_jsonl(path)[1]


@pytest.mark.parametrize(("style", "most"), [("vllm", 100), ("llama.cpp", 3), ("plain", 1), ("one", 100)])
def test_a_server_that_fails_in_30_of_100_requests_loses_no_answer(
    serve, tmp_path, model, tokenizer, trait, style, most
):
    server, path = serve(style, most=most, share=0.3), tmp_path / "r.jsonl"
    generate = OpenAIGenerator("m", base_url=server.url, attempts=12, timeout=0.3, concurrency=16)
    vector = extract(model, tokenizer, trait, generate=generate, rollouts=path, **{**SMALL, "first": 3})
    found, asked_for = kept(path), 3 * ASKED
    assert len({(r.side, r.key) for r in found}) == len(found) == asked_for == vector.info["pairs_kept"] * 2
    assert len(server.faults) > 1 and set(server.faults) <= {*FAULTS, "none"}
    assert len({r.answer for r in found}) == asked_for  # no seed was used twice
    for rollout in found:  # our own template, and the tokens that were generated, without the end
        assert list(rollout.prompt_ids) == encode(tokenizer, rollout.prompt)
        assert list(rollout.answer_ids) == encode(tokenizer, rollout.answer) and len(rollout.answer) == 6
    assert {tuple(request["prompt"]) for request in server.requests} == {r.prompt_ids for r in found}
    marks = style in ("plain", "one")
    assert {r.retokenised for r in found} == {marks} and vector.info["retokenised"] == asked_for * marks
    assert {r.finished for r in found} == {style == "vllm"}
    again = extract_from(model, tokenizer, trait, found, judge=None, unfiltered=True, min_pairs=2)
    torch.testing.assert_close(vector.directions, again.directions)
    assert vector.info["generate"] == "openai:m" and "secret-key" not in path.read_text()


def test_the_samples_of_a_prompt_are_asked_for_at_once_where_the_server_can(serve, tmp_path, model, tokenizer, trait):
    requests = {}
    for most in (100, 2):
        server = serve(most=most)
        generate = OpenAIGenerator("m", base_url=server.url, concurrency=4)
        extract(model, tokenizer, trait, generate=generate, **SMALL)
        requests[most] = [request["n"] for request in server.requests]
        assert server.most <= 4 // min(most, 4) + 1
    assert requests[100] == [4] * 6 and requests[2] == [4] + [2] * 12
    whole = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "temperature": 1.0, "max_tokens": 6, "model": "m"}
    assert whole.items() <= server.requests[0].items()


def test_a_run_that_was_cut_anywhere_asks_for_what_is_missing(serve, tmp_path, model, tokenizer, trait):
    server, whole = serve(most=1), tmp_path / "whole.jsonl"
    generate = OpenAIGenerator("m", base_url=server.url)
    vector = extract(model, tokenizer, trait, generate=generate, rollouts=whole, **SMALL)
    text = whole.read_bytes()
    lines = text.splitlines(keepends=True)
    for cut in (len(lines[0]) + 3, sum(map(len, lines[:14])), len(text) - 5):
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(text[:cut])
        before = len(server.requests)
        again = extract(model, tokenizer, trait, generate=generate, rollouts=path, **SMALL)
        assert sorted(path.read_bytes().splitlines()) == sorted(text.splitlines())
        assert sum(r["n"] == 1 for r in server.requests[before:]) == ASKED + 1 - text[:cut].count(b"\n")
        torch.testing.assert_close(again.directions, vector.directions, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="was made with generate='openai:m', not None"):
        extract(model, tokenizer, trait, rollouts=whole, **SMALL)


def test_a_function_may_give_the_answers(tmp_path, model, tokenizer, trait):
    def mine(prompts, seeds, max_new_tokens, temperature):
        assert len(set(seeds)) == len(prompts) == ASKED and (max_new_tokens, temperature) == (6, 1.0)
        yield [Completion(row, f"answer {row}") for row in range(1, len(prompts))]
        yield [Completion(0, "é", tokens=encode(tokenizer, "é"))]

    path = tmp_path / "r.jsonl"
    vector = extract(model, tokenizer, trait, generate=mine, rollouts=path, **SMALL)
    assert vector.info["generate"] == "mine" and vector.info["retokenised"] == ASKED - 1
    assert [r.answer for r in kept(path)][-1] == "é"
    with pytest.raises(InputError, match="generate left 23 of 24 prompts without an answer"):
        extract(model, tokenizer, trait, generate=lambda *_: [[Completion(0, "a")]], **SMALL)
    for wrong in ([0, 0], [24]):
        with pytest.raises(InputError, match=rf"answered prompt {wrong[-1]} twice, or it is none of 24"):
            extract(model, tokenizer, trait, generate=lambda *_: [[Completion(i, "a") for i in wrong]], **SMALL)  # noqa: B023


def test_what_cannot_be_is_said_in_a_line(serve, tmp_path, model, tokenizer, trait, monkeypatch):
    made = partial(extract, model, tokenizer, trait, **SMALL)
    server = serve()
    edited = pytest.raises(InputError, match="from elsewhere, where nothing is edited: leave the `with`")
    with edited, steer(model, random_direction(model), layer=1, coef=1.0):
        made(generate=OpenAIGenerator("m", base_url=server.url))
    with pytest.raises(InputError, match=r"read 'zzzzzz' with the tokenizer of .*: serve the same model"):
        made(generate=lambda prompts, *_: [[Completion(i, "aaaaaa", encode(tokenizer, "zzzzzz")) for i in range(2)]])
    for always in ("401", "404"):
        with pytest.raises(InputError, match="check the address, the model's name, the key and the account"):
            made(generate=OpenAIGenerator("m", base_url=serve(always=always).url))
    long = [question * 90 for question in trait.questions.extract]
    longer = trait.model_copy(update={"questions": type(trait.questions)(extract=long)})
    with pytest.raises(InputError, match="maximum context length is 300 tokens"):
        extract(model, tokenizer, longer, generate=OpenAIGenerator("m", base_url=server.url), **SMALL)
    with pytest.raises(InputError, match="is no address: give one such as http"):
        OpenAIGenerator("m", base_url="localhost:8000")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        OpenAIGenerator("m", base_url=server.url)


def test_a_server_that_goes_down_keeps_what_came(serve, tmp_path, model, tokenizer, trait):
    server, path = serve(most=1), tmp_path / "r.jsonl"
    down = threading.Event()

    def until_half(body, known=server.reply):
        if len(server.requests) > 16:
            down.set()
        return known(body) if not down.is_set() else {"choices": [{"text": "a", "finish_reason": "abort"}]}

    server.reply = until_half
    generate = OpenAIGenerator("m", base_url=server.url, attempts=2, concurrency=2)
    with pytest.raises(InputError, match=r"failed 2 times in a row .*what came before is kept"):
        extract(model, tokenizer, trait, generate=generate, rollouts=path, **SMALL)
    had, requests = len(kept(path)), len(server.requests)
    assert 8 < had < ASKED and requests < 30  # nobody went on asking
    server.reply = until_half.__defaults__[0]
    extract(model, tokenizer, trait, generate=generate, rollouts=path, **SMALL)
    assert len(kept(path)) == ASKED and len(server.requests) <= requests + ASKED - had + 5


def test_no_more_is_asked_for_after_a_judge_s_error(serve, model, tokenizer, trait):
    server = serve(most=1, hangs=0.02)
    generate = OpenAIGenerator("m", base_url=server.url, concurrency=2)
    with pytest.raises(InputError, match="the judge returned 'high'") as error:
        extract(model, tokenizer, trait, generate=generate, **{**SMALL, "judge": lambda *_: "high"})
    asked = len(server.requests)
    threading.Event().wait(0.1)
    assert error.tb is not None and len(server.requests) <= asked + 2 < ASKED


def test_the_command_line_names_the_server_s_model(serve, tmp_path, trait, monkeypatch):
    folder, out = save_tiny(tmp_path / "tiny"), tmp_path / "loud.safetensors"
    trait.save(tmp_path / "loud.json")
    asked = ["extract", folder, tmp_path / "loud.json", "--judge", "none", "--out", out, "--generate"]
    monkeypatch.chdir(tmp_path)  # where answers are kept
    monkeypatch.setenv("OPENAI_BASE_URL", serve().url)
    run(*asked, "openai:m", "--samples", 4, "--first", 1, "--max-new-tokens", 6)
    assert PersonaVector.load(out).info["generate"] == "openai:m"
    assert "--generate is 'vllm': give openai:MODEL, with the server's address" in run(*asked, "vllm", code=2)[1]
    assert "leave one out" in run(*asked, "openai:m", "--from", "a", "b", code=2)[1]
    options = ["--generate", "openai:m", "--max-new-tokens", 6]
    told = run("evaluate", folder, tmp_path / "loud.json", "--judge", "sentiment", "--samples", 1, "--json", *options)
    assert json.loads(told[0])[0]["answers"] == 2
    assert (
        "leave one out"
        in run("evaluate", folder, "optimistic", "--vector", out, "--layer", 1, "--coef", 1, *options, code=2)[1]
    )
    data = write(tmp_path / "d.jsonl", [{"question": "How?", "answer": "So."}])
    flags = [
        "--data",
        data,
        "--layer",
        1,
        "--controls",
        0,
        "--cache",
        tmp_path / "c.sqlite",
        "--out",
        tmp_path / "f.parquet",
    ]
    run("flag", folder, out, *flags, *options)
    assert Flags.load(tmp_path / "f.parquet").settings["generate"] == "openai:m"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "OPENAI_API_KEY is not set: export your key" in run(*asked, "openai:m", code=2)[1]


@pytest.mark.real
def test_answers_of_llama_cpp_s_server_become_the_vector_that_they_give_from_a_file(embedded, tmp_path, monkeypatch):
    """The quantised model behind the server, and the same file's weights here."""
    xllamacpp = pytest.importorskip("xllamacpp")
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    params = xllamacpp.CommonParams()
    params.model.path = str(embedded_gguf())
    params.n_ctx, params.n_parallel, params.verbosity = 2048, 2, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # two threads spin where the machine is busy
    server = xllamacpp.Server(params)
    monkeypatch.setenv("OPENAI_BASE_URL", server.listening_address + "/v1")
    path, trait = tmp_path / "r.jsonl", load_trait("optimistic")
    options = {"judge": None, "samples": 2, "first": 1, "max_new_tokens": 12, "min_pairs": 2, "rollouts": path}
    vector = extract(*embedded, trait, generate=OpenAIGenerator("smollm2"), **options)
    sides = [load_rollouts(path, side=side, trait=trait, tokenizer=embedded[1]) for side in ("pos", "neg")]
    found = [rollout for side in sides for rollout in side]
    again = extract_from(*embedded, trait, found, judge=None, unfiltered=True, min_pairs=2)
    torch.testing.assert_close(vector.directions, again.directions, rtol=1e-3, atol=1e-4)
    assert len(found) == 20 and not any(rollout.retokenised for rollout in found)
    assert len({rollout.answer for rollout in found}) > 15
    likely = [plain_logprob(embedded[0], r.prompt_ids, r.answer_ids) for r in found if r.answer_ids]
    assert sum(likely) / len(likely) > -4  # of tokens that are another model's, or at another place, it is under -10
