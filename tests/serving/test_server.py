"""The server by the stock openai client: answers, edits, projections, and what each request is told."""

import json
import threading

import openai
import pytest
import torch
from helpers import hooks, use, vectors_of_their_own

import persona_vectors as pv
from persona_vectors.model.generation import generate_tokens
from persona_vectors.serving.cards import model_card
from persona_vectors.serving.run import make_served

MESSAGES = [{"role": "user", "content": "How are you?"}]


def ask(server, **given):
    ours = {name: given.pop(name) for name in ("edits", "project", "alarm") if name in given}
    options = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0} | given
    return server.client().chat.completions.create(
        model=server.served.name, extra_body={"persona_vectors": ours} if ours else {}, **options
    )


def alone(server, edits=(), question=MESSAGES, max_new_tokens=8, **options) -> str:
    served = server.served
    with (
        pv.steer_rows(served.model, [None])
        if not edits
        else pv.steer(
            served.model, served.vectors[edits[0]["vector"]], layer=edits[0].get("layer", 1), coef=edits[0]["coef"]
        )
    ):
        settings = {"max_new_tokens": max_new_tokens, "temperature": 0.0} | options
        return pv.generate(served.model, served.tokenizer, question, **settings)


def begun(stream) -> None:
    """Wait for a stream's first token."""
    next(chunk for chunk in stream if chunk.choices[0].delta.content)


def test_a_plain_answer_is_the_model_s_own_and_says_that_nothing_was_edited(server):
    reply = ask(server)
    assert reply.choices[0].message.content == alone(server)
    assert reply.choices[0].finish_reason == "length"
    assert reply.persona_vectors["note"] == "no edit was applied" and reply.persona_vectors["edits"] == []
    assert reply.usage.completion_tokens == 8
    assert [model.id for model in server.client().models.list()] == [server.served.name]


def test_edits_and_projections_are_those_of_the_verbs(server):
    edits = [{"vector": "u", "layer": 2, "coef": 4.0}]
    reply = ask(server, edits=edits, project=["t", "u@2"])
    assert reply.choices[0].message.content == alone(server, edits) != alone(server)
    ours, served = reply.persona_vectors, server.served
    assert ours["edits"] == [{"vector": "u", "kind": "steer", "layer": 2, "coef": 4.0, "positions": "all"}]
    assert ours["note"] == "1 edit applied"
    vectors = list(served.vectors.values())
    text = pv.chat_prompt(served.tokenizer, MESSAGES[0]["content"])
    with (
        pv.steer(served.model, vectors[1], layer=2, coef=4.0),
        pv.monitor(served.model, vectors, layer=[1, 2]) as trace,
    ):
        ids = served.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        answer = served.tokenizer(reply.choices[0].message.content, return_tensors="pt").input_ids
        with torch.no_grad():
            served.model(torch.cat([ids, answer], dim=1))
    [choice] = ours["choices"]
    for key, name in (("t", "t@1"), ("u@2", "u@2")):
        values = trace[name][0, ids.shape[1] :]
        torch.testing.assert_close(torch.tensor(choice["projections"][key]), values, rtol=1e-4, atol=1e-4)
        assert choice["mean"][key] == pytest.approx(float(values.mean()), rel=1e-4)
    assert "".join(choice["tokens"]) == reply.choices[0].message.content


def test_a_stream_says_the_same_piece_by_piece(server):
    edits = [{"vector": "t", "coef": -3.0}]
    whole = ask(server, edits=edits, project=["t"], logprobs=True, top_logprobs=2)
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2}
    chunks = list(ask(server, edits=edits, project=["t"], **options))
    content = [c for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(c.choices[0].delta.content for c in content) == whole.choices[0].message.content
    assert len(content) == 8 and chunks[-1].usage == whole.usage
    read = [c.persona_vectors["choices"][0]["projections"]["t"][0] for c in content]
    assert read == pytest.approx(whole.persona_vectors["choices"][0]["projections"]["t"], rel=1e-4)
    assert [c.choices[0].logprobs.content[0].token for c in content] == [
        each.token for each in whole.choices[0].logprobs.content
    ]
    last = next(c for c in chunks if c.choices and c.choices[0].finish_reason)
    assert last.choices[0].finish_reason == "length" and last.persona_vectors["edits"] == whole.persona_vectors["edits"]


def test_sampling_depends_on_the_seed_alone(server):
    options = {"temperature": 0.9, "n": 3, "max_tokens": 12}
    reply = ask(server, seed=5, **options)
    texts = [choice.message.content for choice in reply.choices]
    expected = alone(server, question=[MESSAGES] * 3, max_new_tokens=12, temperature=0.9, seed=5)
    assert texts == expected and len(set(texts)) == 3
    drawn = ask(server, **options)
    again = ask(server, seed=drawn.persona_vectors["seed"], **options)
    assert [c.message.content for c in drawn.choices] == [c.message.content for c in again.choices]
    narrow = ask(server, seed=5, top_p=0.001, **options)
    assert {choice.message.content for choice in narrow.choices} == {alone(server, max_new_tokens=12)}


def test_completions_take_texts_and_tokens(server):
    client, served = server.client(), server.served
    tokens = served.tokenizer("Once upon").input_ids
    found = [
        client.completions.create(
            model=served.name, prompt=prompt, max_tokens=5, temperature=0, logprobs=2, extra_body={"unknown": 1}
        )
        for prompt in ("Once upon", tokens, ["Once upon", "Once"])
    ]
    assert found[0].choices[0].text == found[1].choices[0].text == found[2].choices[0].text
    assert len(found[2].choices) == 2 and found[2].choices[1].index == 1
    assert len(found[0].choices[0].logprobs.token_logprobs) == 5
    text = found[0].choices[0].text
    stopped = client.completions.create(
        model=served.name, prompt="Once upon", max_tokens=5, temperature=0, stop=text[2:4]
    )
    assert stopped.choices[0].text == text[: text.index(text[2:4])] and stopped.choices[0].finish_reason == "stop"


def test_lm_eval_s_local_completions_finds_the_model_s_own_numbers(server, tmp_path, monkeypatch):
    """Log-likelihoods of continuations, and answers up to a stop string, by lm-eval's own client."""
    pytest.importorskip("tenacity")  # lm-eval's own extra for its clients
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("OPENAI_API_KEY", "any")
    served = server.served
    served.tokenizer.save_pretrained(tmp_path / "tokenizer")
    client = LocalCompletionsAPI(
        f"{server.url}/v1/completions", model=served.name, tokenizer=str(tmp_path / "tokenizer"), num_concurrent=2
    )
    pairs = [("Once upon", " a bed"), ("a", "bcd"), ("Once upon", " a cage")]
    found = client.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (score, greedy), pair in zip(found, pairs):
        context, answer = (served.tokenizer(text, add_special_tokens=False).input_ids for text in pair)
        with torch.no_grad():
            logs = served.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].log_softmax(dim=-1)
        assert score == pytest.approx(sum(float(row[token]) for row, token in zip(logs, answer)), abs=1e-3)
        assert greedy == (logs.argmax(dim=1).tolist() == answer)
    prompt = served.tokenizer("Once", add_special_tokens=False).input_ids
    [(tokens, _)] = generate_tokens(
        served.model, served.tokenizer, [prompt], max_new_tokens=20, temperature=0.0, seed=[0]
    )
    text = served.tokenizer.decode(tokens)
    asked = ("Once", {"until": [text[6:8]], "max_gen_toks": 20, "temperature": 0})
    assert client.generate_until([Instance("generate_until", {}, asked, 0)]) == [text[: text.index(text[6:8])]]


def test_an_alarm_ends_the_answer_and_says_so(server):
    values = ask(server, project=["t"]).persona_vectors["choices"][0]["projections"]["t"]
    reply = ask(server, alarm={"t": sorted(values)[-2]})
    assert reply.choices[0].finish_reason == "alarm"
    [choice] = reply.persona_vectors["choices"]
    assert choice["alarm"] == "t" and len(choice["tokens"]) == values.index(max(values)) + 1


BAD = [
    ({"edits": [{"vector": "nobody", "coef": 1.0}]}, "no vector 'nobody' here: give one of t, u"),
    ({"edits": [{"vector": "t"}]}, "needs coef or dose"),
    ({"edits": [{"vector": "t", "coef": 1.0, "layer": 99}]}, "layer 99 is out of range"),
    ({"edits": [{"vector": "t", "kind": "cap", "coef": 1.0}]}, "kind 'cap' needs limit"),
    ({"edits": [{"vector": "t", "dose": 1.0}]}, "does not know the residual norms"),
    ({"edits": [{"vector": "t", "coef": 1.0, "strength": 2}]}, "strength: Extra inputs"),
    ({"edits": [{"vector": "t", "coef": 1.0, "positions": "answer"}]}, "'all', 'prompt' or 'response'"),
    ({"edits": [{"vector": "../../etc/passwd", "coef": 1.0}]}, "no vector '../../etc/passwd'"),
    ({"project": ["t@x"]}, "'t@x' names no projection"),
    ({"temperature": -1}, "temperature"),
    ({"n": 1000}, "n: "),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": "long " * 30_000}]}, "the prompt has 1500"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_request_is_told_in_one_line(server, given, message):
    with pytest.raises(openai.BadRequestError) as error:
        ask(server, **given)
    told = error.value.body
    assert message in told["message"] and "\n" not in told["message"] and told["type"] == "invalid_request_error"


def test_another_model_is_refused(server):
    with pytest.raises(openai.BadRequestError, match="no model 'gpt-4' here"):
        server.client().chat.completions.create(model="gpt-4", messages=MESSAGES)


@pytest.mark.slow
def test_sixteen_clients_at_once_get_what_each_would_get_alone(server):
    edits = [[], [{"vector": "t", "coef": 3.0}], [{"vector": "u", "coef": -4.0, "layer": 0}]]
    questions = [[{"role": "user", "content": "How " * (1 + i)}] for i in range(6)]
    cases = [(edits[i % 3], questions[i // 3 % 6]) for i in range(48)]
    expected = {i: alone(server, *cases[i]) for i in range(18)}
    found, steps = {}, server.engine.figures["steps"]

    def client(first: int) -> None:
        for number in range(first, 48, 16):
            edit, question = cases[number]
            reply = ask(server, edits=edit, messages=question)
            found[number] = reply.choices[0].message.content, len(reply.persona_vectors["edits"])

    threads = [threading.Thread(target=client, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: (expected[i % 18], len(cases[i][0])) for i in range(48)}
    assert server.engine.figures["steps"] - steps < 48 * 7 / 2
    server.idle()
    assert hooks(server.served.model) == 0


def test_a_client_that_goes_away_frees_its_row(server):
    stream = ask(server, stream=True, max_tokens=100_000)
    begun(stream)
    assert server.engine.load[0] == 1
    stream.close()
    server.idle()
    impatient = server.client().with_options(timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        impatient.chat.completions.create(model=server.served.name, messages=MESSAGES, max_tokens=100_000)
    server.idle()


def test_a_full_queue_says_when_to_ask_again(served, start):
    with start(served, rows=1, waiting=0) as server:
        stream = ask(server, stream=True, max_tokens=100_000)
        begun(stream)
        with pytest.raises(openai.RateLimitError) as error:
            ask(server)
        assert error.value.response.headers["retry-after"] == "2"
        stream.close()
        server.idle()
        assert ask(server).choices[0].message.content


def test_what_takes_too_long_is_an_error(served, start):
    from dataclasses import replace

    with start(replace(served, seconds=0.2)) as server:
        with pytest.raises(openai.InternalServerError, match="time limit"):
            ask(server, max_tokens=100_000)
        with pytest.raises(openai.APIError, match="time limit"):
            list(ask(server, max_tokens=100_000, stream=True))


def test_a_request_may_ask_for_less_time_than_the_server_gives(server):
    def asked(seconds: float):
        extra = {"persona_vectors": {"seconds": seconds}}
        return server.client().chat.completions.create(
            model=server.served.name, messages=MESSAGES, max_tokens=100_000, extra_body=extra
        )

    with pytest.raises(openai.InternalServerError, match="time limit"):
        asked(0.1)
    with pytest.raises(openai.BadRequestError, match="seconds"):
        asked(-1.0)
    server.idle()


def test_health_and_figures(server):
    from urllib.request import urlopen

    ask(server)
    server.idle()  # a reply may be here before its row is given back
    assert json.load(urlopen(f"{server.url}/health")) == {"status": "ok"}
    text = urlopen(f"{server.url}/metrics").read().decode()
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["persona_vectors_tokens_total"]) >= 8 and float(figures["persona_vectors_rows"]) == 0
    assert float(figures['persona_vectors_requests_total{status="200"}']) >= 1
    assert float(figures["persona_vectors_hooks"]) == 0 and float(figures["process_resident_memory_bytes"]) > 1e7
    stream = ask(server, stream=True, max_tokens=100_000, project=["t"])
    begun(stream)
    assert "persona_vectors_hooks 0.0" not in urlopen(f"{server.url}/metrics").read().decode()
    stream.close()
    server.idle()


def test_our_judge_reads_the_model_s_own_expected_value(server, monkeypatch):
    """On a model that answers in digits, so that the numbers have their mass."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    served = server.served
    digits = served.tokenizer("0123456789", add_special_tokens=False).input_ids
    bias = served.model.lm_head.bias.clone()
    bias[digits] = 99.0
    parameters = served.model.lm_head._parameters  # setattr of the module would take the bias away at the end
    monkeypatch.setitem(parameters, "bias", torch.nn.Parameter(bias, requires_grad=False))
    judge = pv.OpenAIJudge(served.name, base_url=f"{server.url}/v1")
    score = judge("Who?", "Me.", "Rate {question} {answer}")
    ids = served.tokenizer(pv.chat_prompt(served.tokenizer, "Rate Who? Me."), add_special_tokens=False).input_ids
    with torch.no_grad():
        logs = served.model(torch.tensor([ids])).logits[0, -1].softmax(dim=-1)[digits]
    assert score == pytest.approx(float(logs @ torch.arange(10.0) / logs.sum()), abs=1e-3)


def test_edits_that_name_no_layer_are_where_the_first_file_recommends(model, tokenizer):
    vector = vectors_of_their_own(model)[0]
    for uses, expected in (({}, 1), ({"layer": 2}, 2), ({"layer": 2, "evidence": False}, 1)):
        told = vector.with_use(use(**uses)) if uses else vector
        served = make_served(model, tokenizer, [told])
        assert served.layer == expected
    assert make_served(model, tokenizer, [told], layer=0).layer == 0
    card = model_card(served)["persona_vectors"]["vectors"][0]
    assert "no recommendation" in card["uses"][0] and card["steer"] is None
    told = make_served(model, tokenizer, [vector.with_use(use(layer=2))])
    assert model_card(told)["persona_vectors"]["vectors"][0]["steer"] == {"layer": 2, "coef": 2.0, "coherent": None}
