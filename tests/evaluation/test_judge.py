import http.server
import json
import math
import threading
from typing import ClassVar

import pytest
import torch
import zoo
from helpers import make_tokenizer, plain_logprob

from persona_vectors.cli.judges import make_judge
from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.judge import Answer, fill, score
from persona_vectors.evaluation.judges import ContrastJudge, LocalJudge, PerplexityJudge, SentimentJudge
from persona_vectors.evaluation.logprobs import answer_logprobs
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.steering.add import steer


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "bloom"])
def test_answer_logprobs_equal_a_plain_forward(name: str):
    model = zoo.build(name)
    rows = [([5, 6, 7], [20, 21]), ([5, 6, 7], [22]), ([8, 9], [23, 24, 25]), ([8, 9], [])]
    found = answer_logprobs(model, rows)
    for row, value in zip(rows[:3], found.tolist()):
        assert value == pytest.approx(plain_logprob(model, *row), abs=1e-4)
    assert math.isnan(found[3])


def test_contrast_judge_averages_the_other_pairs(model, tokenizer, trait):
    judge = ContrastJudge(model, tokenizer, trait, scale=0.1)
    answers = [Answer("How?", "well", 1), Answer("Why so?", "no"), Answer("How?", "", 0)]
    for answer, found in zip(answers[:2], judge.batch(answers, "")):
        differences = []
        for pair in {0, 1, 2} - {answer.pair}:
            of = {}
            for side in ("pos", "neg"):
                prompt = chat_prompt(tokenizer, answer.question, system=trait.system_prompt(side, pair))
                of[side] = plain_logprob(model, encode(tokenizer, prompt), encode(tokenizer, answer.answer))
            differences.append(of["pos"] - of["neg"])
        expected = 100 / (1 + math.exp(-sum(differences) / len(differences) / 0.1))
        assert found == pytest.approx(expected, abs=0.01)
    assert judge.batch(answers, "")[2] is None


def test_a_judge_reads_the_plain_model_inside_a_steered_block(model, tokenizer, trait):
    from helpers import random_direction

    judge, answers = ContrastJudge(model, tokenizer, trait), [Answer("How?", "well")]
    plain = score(judge, answers, "")
    with steer(model, random_direction(model), layer=1, coef=5.0):
        model(**zoo.inputs(model))
        assert score(judge, answers, "") == plain


def test_perplexity_is_a_gate_at_its_limit(model, tokenizer):
    answer = Answer("How?", "well")
    prompt = encode(tokenizer, chat_prompt(tokenizer, "How?"))
    perplexity = math.exp(-plain_logprob(model, prompt, encode(tokenizer, "well")))
    judge = PerplexityJudge(model, tokenizer, limit=perplexity)
    assert judge.batch([answer, Answer("How?", "")], "") == [pytest.approx(50, abs=0.01), 0.0]


def test_local_judge_is_the_expected_number_digit_by_digit(model, tokenizer):
    """Against the enumeration of every number 0..100 as a string, one forward pass each."""
    prompt = encode(tokenizer, chat_prompt(tokenizer, "Score q a"))

    def after(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompt + encode(tokenizer, text)])).logits[0, -1].softmax(dim=-1)

    digit = {d: encode(tokenizer, d)[0] for d in "0123456789"}
    value = mass = 0.0
    for number in range(101):
        text, p = str(number), 1.0
        for i, d in enumerate(text):
            p *= float(after(text[:i])[digit[d]])
        if 1 <= number <= 9:
            p *= 1 - sum(float(after(text)[digit[d]]) for d in "0123456789")
        if number == 10:
            p *= 1 - float(after(text)[digit["0"]])
        value, mass = value + number * p, mass + p
    judge = LocalJudge(model, tokenizer, min_mass=0.0)
    assert judge("q", "a", "Score {question} {answer}") == pytest.approx(value / mass, abs=1e-3)
    assert LocalJudge(model, tokenizer, min_mass=0.9)("q", "a", "Score {question} {answer}") is None


def test_sentiment_judge():
    judge = SentimentJudge()
    assert judge("", "I love this wonderful day", "") > 80 and judge("", "I hate this awful day", "") < 20
    assert judge("", " ", "") is None


def test_fill_leaves_other_braces_alone():
    assert fill("{question}|{answer}|{x}", "{answer}", "{question}") == "{answer}|{question}|{x}"


@pytest.mark.parametrize("garbage", ["good", -1, 101, float("nan"), [50]])
def test_garbage_from_a_judge_is_refused(garbage):
    with pytest.raises(InputError, match="return a number from 0 to 100, or None to abstain"):
        score(lambda question, answer, rubric: garbage, [Answer("q", "a")], "r")


def test_judges_by_name(model, tokenizer, trait):
    def load(name: str):
        return model, tokenizer

    assert make_judge("contrast:2", model, tokenizer, trait, load).pairs == 2
    assert make_judge("none", model, tokenizer, trait, load) is None
    assert isinstance(make_judge("local:x", model, tokenizer, trait, load), LocalJudge)
    with pytest.raises(InputError, match="no judge 'gpt': give contrast"):
        make_judge("gpt", model, tokenizer, trait, load)


class Server(http.server.BaseHTTPRequestHandler):
    """Replies as an OpenAI-compatible server does, with 90 and 70 as the likeliest numbers; fails the first request."""

    requests: ClassVar[list[dict]] = []
    top: ClassVar[dict[str, float]] = {}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).requests.append(body)
        failing = len(self.requests) == 1
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in self.top.items()]
        message = {"role": "assistant", "content": "90"}
        content = [{"token": "90", "logprob": math.log(0.5), "bytes": None, "top_logprobs": top}]
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        payload = json.dumps(reply).encode()
        self.send_response(500 if failing else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.requests, Server.top = [], {"90": 0.4, "70": 0.2, "A": 0.3, "x": 0.1}
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()


def test_openai_judge_weighs_the_numbers_retries_and_caches(server, tmp_path, monkeypatch):
    from persona_vectors.evaluation.openai_judge import OpenAIJudge

    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    judge = OpenAIJudge("m", base_url=server, cache=tmp_path / "judge.jsonl")
    answers = [Answer("q", f"a{i}") for i in range(5)]
    scores = score(judge, answers, "Score {question} {answer}")
    assert scores == [pytest.approx((90 * 0.4 + 70 * 0.2) / 0.6)] * 5
    sent = Server.requests[0]
    assert (sent["temperature"], sent["max_tokens"], sent["top_logprobs"]) == (0, 1, 20)
    assert len(Server.requests) == 6  # one failed and was sent again
    again = OpenAIJudge("m", base_url=server, cache=tmp_path / "judge.jsonl")
    assert score(again, answers, "Score {question} {answer}") == scores
    assert len(Server.requests) == 6
    assert "secret-key" not in (tmp_path / "judge.jsonl").read_text()


def test_openai_judge_abstains_where_numbers_are_unlikely(server, tmp_path, monkeypatch):
    from persona_vectors.evaluation.openai_judge import OpenAIJudge

    monkeypatch.setenv("OPENAI_API_KEY", "k")
    Server.top = {"90": 0.2, "A": 0.8}
    judge = OpenAIJudge("m", base_url=server, cache=tmp_path / "judge.jsonl")
    assert score(judge, [Answer("q", "a")], "Score {question} {answer}") == [None]


def test_openai_judge_names_what_is_missing(monkeypatch):
    from persona_vectors.evaluation.openai_judge import OpenAIJudge

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY is not set"):
        OpenAIJudge("m")


def test_one_pair_is_too_few_for_the_contrast(model, trait):
    with pytest.raises(InputError, match="needs two or more"):
        ContrastJudge(model, make_tokenizer(), trait.model_copy(update={"instruction": trait.instruction[:1]}))
