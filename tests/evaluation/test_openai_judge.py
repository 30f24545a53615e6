"""OpenAIJudge against a server that fails as real ones do, and against llama.cpp's."""

import hashlib
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from fault_server import FAULTS, FaultServer, started

from persona_vectors.data.errors import InputError
from persona_vectors.evaluation import openai_client, openai_judge
from persona_vectors.evaluation.judge import Answer, fill, score
from persona_vectors.evaluation.openai_judge import OpenAIJudge
from persona_vectors.model.loading import embedded_gguf
from persona_vectors.model.prompts import chat_prompt, encode

RUBRIC = "Score {question} {answer}"


def reply(body: dict, *, logprobs: bool, refuses: str, reasons: bool) -> dict | str:
    text = body["messages"][0]["content"]
    if reasons and {"max_tokens", "temperature"} & set(body):
        return "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    if refuses and refuses in text:
        return "The prompt was filtered by the content management policy."
    number = str(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 101)
    content = "REFUSAL" if "refuse" in text else number
    top = [{"token": "REF" if "refuse" in text else number, "logprob": math.log(0.9), "bytes": None}]
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    if logprobs:
        token = {"token": number, "logprob": -0.1, "bytes": None, "top_logprobs": top}
        choice["logprobs"] = {"content": [token]}
    return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 1}}


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setattr(openai_client, "BACKOFF", 0.005)
    with started() as start:

        def served(share: float = 0.0, *, logprobs=True, refuses="", reasons=False, **options) -> FaultServer:
            how = partial(reply, logprobs=logprobs, refuses=refuses, reasons=reasons)
            return start(how, share=share, **options)

        yield served


def expected(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 101


def test_a_thousand_requests_with_faults_lose_no_item(serve, tmp_path):
    server = serve(0.3)
    options = {"base_url": server.url, "concurrency": 12, "attempts": 10, "timeout": 0.5, "cache": tmp_path / "j.jsonl"}
    judge = OpenAIJudge("m", **options)
    answers = [Answer("q", f"a{i}") for i in range(1000)]
    found = score(judge, answers, RUBRIC)
    assert found == [pytest.approx(expected(fill(RUBRIC, "q", f"a{i}"))) for i in range(1000)]
    assert set(server.faults) == {*FAULTS, "none"}
    failed = sum(server.faults.values()) - server.faults["none"]
    assert 0.2 < failed / sum(server.faults.values()) < 0.4
    assert 1 < server.most <= 12
    assert max(server.attempts.values()) <= 10
    usage = judge.usage
    assert (usage.requests, usage.prompt_tokens, usage.completion_tokens) == (1000, 7000, 1000)
    assert usage.retries == sum(server.attempts.values()) - 1000
    again = OpenAIJudge("m", **options)
    assert score(again, answers, RUBRIC) == found
    assert (again.usage.requests, again.usage.cached) == (0, 1000)
    assert "secret-key" not in (tmp_path / "j.jsonl").read_text()


def test_batches_from_several_threads_share_the_concurrency(serve, tmp_path):
    server = serve(0.1)
    options = {"base_url": server.url, "concurrency": 5, "attempts": 10, "timeout": 0.5, "cache": tmp_path / "j.jsonl"}
    judge = OpenAIJudge("m", **options)
    parts = [[Answer("q", f"a{part},{i}") for i in range(60)] for part in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: judge.batch(part, RUBRIC), parts))
    assert found == [[pytest.approx(expected(fill(RUBRIC, "q", a.answer))) for a in part] for part in parts]
    assert 1 < server.most <= 5


def test_a_server_that_goes_down_is_an_error_within_a_bound_and_loses_nothing(serve, tmp_path):
    server = serve()
    options = {"base_url": server.url, "attempts": 4, "timeout": 0.5, "cache": tmp_path / "j.jsonl"}
    judge = OpenAIJudge("m", **options)
    score(judge, [Answer("q", f"a{i}") for i in range(30)], RUBRIC)
    server.shutdown()
    server.server_close()
    start = time.monotonic()
    with pytest.raises(InputError, match=r"failed \d times in a row .* what came before is kept"):
        score(judge, [Answer("q", f"a{i}") for i in range(400)], RUBRIC)
    assert time.monotonic() - start < 10
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == 30
    again = OpenAIJudge("m", **options)
    assert len(score(again, [Answer("q", f"a{i}") for i in range(30)], RUBRIC)) == 30


def test_retry_after_is_respected(serve, tmp_path, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda _, seconds=None: waits.append(seconds))
    server = serve(always="429")
    judge = OpenAIJudge("m", base_url=server.url, attempts=3, cache=tmp_path / "j.jsonl")
    with pytest.raises(InputError, match="failed 3 times in a row"):
        judge("q", "a", RUBRIC)
    waits = [wait for wait in waits if wait and wait < 60]  # threads that start wait for one another without limit
    assert len(waits) == 2 and all(wait >= 0.05 for wait in waits)  # the backoff alone would be under 0.01


def test_what_cannot_be_mended_is_not_repeated(serve, tmp_path):
    server = serve(always="401")
    judge = OpenAIJudge("m", base_url=server.url, cache=tmp_path / "j.jsonl")
    with pytest.raises(InputError, match="refused the request"):
        judge("q", "a", RUBRIC)
    assert sum(server.attempts.values()) == 1


def test_a_refusal_is_no_failure(serve, tmp_path):
    judge = OpenAIJudge("m", base_url=serve().url, cache=tmp_path / "j.jsonl")
    assert score(judge, [Answer("q", "refuse"), Answer("q", "a")], RUBRIC)[0] is None
    assert (judge.usage.refusals, judge.usage.retries, judge.usage.requests) == (1, 0, 2)


def test_without_logprobs_numbers_are_sampled_where_that_was_asked_for(serve, tmp_path):
    server = serve(logprobs=False)
    judge = OpenAIJudge("m", base_url=server.url, cache=tmp_path / "j.jsonl")
    with pytest.raises(InputError, match="or samples=10 to average"):
        judge("q", "a", RUBRIC)
    sampling = OpenAIJudge("m", base_url=server.url, samples=4, cache=tmp_path / "j.jsonl")
    assert sampling("q", "a", RUBRIC) == expected("Score q a")
    assert sampling.usage.requests == 4 and sampling.name == "openai:m (mean of 4 sampled numbers)"
    assert sampling("q", "refuse", RUBRIC) is None


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://x/v1", "not a url", "http://", "http://x:99999/v1"])
def test_a_base_url_that_is_none_is_named(address: str, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(InputError, match="is no address: give one such as http"):
        OpenAIJudge("m", base_url=address)


@pytest.mark.real
def test_llama_cpp_s_server_gives_the_expected_value_of_its_own_logits(embedded, tmp_path, monkeypatch):
    """The quantised model behind the server against the same file's logits, read without a server."""
    from llama_cpp import LlamaCpp

    xllamacpp = pytest.importorskip("xllamacpp")
    monkeypatch.setenv("OPENAI_API_KEY", "local")
    _, tokenizer = embedded
    rubric = "Question: {question} Answer: {answer}. How good is it? Reply with one number from 0 to 9."
    answers = [Answer("What is 2 + 2?", "4"), Answer("How are you?", "I hate it"), Answer("Is it late?", "Very.")]
    raw, expectations = LlamaCpp(embedded_gguf()), []
    for answer in answers:
        ids = encode(tokenizer, chat_prompt(tokenizer, fill(rubric, answer.question, answer.answer)))
        logits = raw.logits(ids).astype(np.float64)
        chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        top = [(tokenizer.decode([int(i)]).strip(), chances[i]) for i in np.argsort(-chances)[:20]]
        numbers = [(int(token), p) for token, p in top if token.isascii() and token.isdigit()]
        expectations.append(sum(n * p for n, p in numbers) / sum(p for _, p in numbers))
    params = xllamacpp.CommonParams()
    params.model.path = str(embedded_gguf())
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.verbosity = 2048, 1, 2, -1
    server = xllamacpp.Server(params)
    options = {"base_url": server.listening_address + "/v1", "concurrency": 2, "cache": tmp_path / "j.jsonl"}
    judge = OpenAIJudge("smollm2", min_mass=0.0, **options)
    assert score(judge, answers, rubric) == [pytest.approx(value, abs=1e-3) for value in expectations]
    assert judge.usage.completion_tokens == len(answers) and judge.usage.prompt_tokens > 100


def test_an_answer_that_the_server_will_not_read_costs_the_others_nothing(serve, tmp_path):
    server = serve(refuses="forbidden")
    judge = OpenAIJudge("m", base_url=server.url, cache=tmp_path / "j.jsonl")
    answers = [Answer("q", f"a{i}") for i in range(3)] + [Answer("q", "forbidden")]
    found = score(judge, answers, RUBRIC)
    assert found[3] is None and None not in found[:3] and judge.usage.refusals == 1
    again = OpenAIJudge("m", base_url=server.url, cache=tmp_path / "j.jsonl")
    assert score(again, answers, RUBRIC) == found and again.usage.requests == 0


def test_a_model_that_reasons_is_given_room_and_no_temperature(serve, tmp_path):
    server = serve(reasons=True)
    judge = OpenAIJudge("m", base_url=server.url, cache=tmp_path / "j.jsonl")
    found = judge("q", "a", RUBRIC)
    assert found is not None and judge.usage.requests == 3
    for request in server.requests[-3:]:
        assert request["max_completion_tokens"] >= 1000
        assert not {"max_tokens", "temperature", "logprobs"} & set(request)


def test_an_interruption_waits_for_no_reply(serve, tmp_path, monkeypatch):
    server = serve(hangs=60.0)
    judge = OpenAIJudge("m", base_url=server.url, cache=tmp_path / "j.jsonl")

    def interrupted(items, **_):
        time.sleep(0.3)
        raise KeyboardInterrupt

    monkeypatch.setattr(openai_judge, "bar", interrupted)
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        score(judge, [Answer("q", f"a{i}") for i in range(40)], RUBRIC)
    assert time.perf_counter() - begin < 5


def test_an_interruption_does_not_wait_between_attempts(serve, tmp_path, monkeypatch):
    """The other waiting: every attempt fails, and the next one is an hour away."""
    monkeypatch.setattr(openai_client, "BACKOFF", 3600.0)
    judge = OpenAIJudge("m", base_url=serve(always="500").url, cache=tmp_path / "j.jsonl")

    def interrupted(items, **_):
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(openai_judge, "bar", interrupted)
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        score(judge, [Answer("q", f"a{i}") for i in range(4)], RUBRIC)
    assert time.perf_counter() - begin < 5


def test_that_a_model_reasons_is_found_out_once(serve, tmp_path):
    server = serve(reasons=True)
    judge = OpenAIJudge("m", base_url=server.url, cache=tmp_path / "j.jsonl")
    judge("q", "a", RUBRIC)
    before = len(server.requests)
    assert None not in score(judge, [Answer("q", f"b{i}") for i in range(5)], RUBRIC)
    assert len(server.requests) > before
    assert not any({"max_tokens", "temperature"} & set(request) for request in server.requests[before:])
