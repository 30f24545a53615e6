import http.server
import json
import threading

import pytest

from persona_vectors.data.errors import InputError
from persona_vectors.data.traits import load_trait
from persona_vectors.evaluation import openai_client
from persona_vectors.extraction.trait_writer import check_reply, write_trait


def reply(**changes) -> str:
    data = {
        "positive_adjective": "curious",
        "negative_adjective": "incurious",
        "instruction": [{"pos": f"Ask more, {i}.", "neg": f"Ask less, {i}."} for i in range(5)],
        "questions": [f"What about {i}?" for i in range(40)],
        "rubric": "Curiosity is asking {more}. 0 means none.",
    }
    return json.dumps({**data, **changes})


def test_a_whole_reply_becomes_a_trait_that_loads(tmp_path):
    trait = check_reply(f"Here it is:\n```json\n{reply()}\n```", "curious", "Wanting to know.")
    assert len(trait.instruction) == 5
    assert len(trait.questions.extract) == len(trait.questions.eval) == 20
    assert len({*trait.questions.extract, *trait.questions.eval}) == 40
    assert "asking (more)" in trait.eval_prompt and trait.eval_prompt.count("{question}") == 1
    trait.save(tmp_path / "curious.json")
    assert load_trait(tmp_path / "curious.json") == trait


def test_what_can_be_mended_is():
    many = [f"What about {i // 2}?" if i < 20 else f"  What about {i}? " for i in range(60)]
    pairs = [{"pos": f"Ask more, {i}.", "neg": f"Ask less, {i}."} for i in range(7)]
    trait = check_reply(reply(questions=many, instruction=pairs), "curious", "d")
    assert len(trait.instruction) == 5 and len(trait.questions.extract + trait.questions.eval) == 40


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"questions": ["Same?"] * 40}, "it has 1 different questions, and 40 are needed"),
        ({"instruction": [{"pos": "a", "neg": "b"}] * 5}, "it has 1 instruction pairs, and 5 are needed"),
        ({"instruction": [{"pos": "a"}]}, 'objects with the texts "pos" and "neg"'),
        ({"rubric": ""}, "it lacks rubric"),
        ({"rubric": ["a"]}, '"rubric" must be a text'),
        ({"questions": "What?"}, "it has 0 different questions"),
    ],
)
def test_what_cannot_be_mended_is_named(changes: dict, reason: str):
    with pytest.raises(InputError, match=reason):
        check_reply(reply(**changes), "curious", "d")


@pytest.mark.parametrize("text", ["", "no JSON", "{'a': 1}", reply()[:-30]])
def test_text_that_is_no_json_is_refused(text: str):
    with pytest.raises(InputError, match="it is not JSON"):
        check_reply(text, "curious", "d")


@pytest.fixture
def llm(monkeypatch):
    """A server that gives the queued replies, the last one again and again; `llm.requests` holds what it was sent."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setattr(openai_client, "BACKOFF", 0.001)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            texts = self.server.texts
            message = {"role": "assistant", "content": texts.pop(0) if len(texts) > 1 else texts[0]}
            payload = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_invalid_reply_is_sent_back_with_the_reason(llm):
    llm.texts = ["{", reply(questions=["Only one?"]), reply()]
    trait = write_trait("curious", "Wanting to know.", llm="m", base_url=llm.url)
    assert trait.name == "curious" and len(llm.requests) == 3
    first, _, third = llm.requests
    assert first["response_format"]["type"] == "json_schema" and "Wanting to know." in first["messages"][0]["content"]
    assert "it has 1 different questions, and 40 are needed" in third["messages"][-1]["content"]


def test_a_model_that_never_writes_one_is_refused_with_the_reason(llm):
    llm.texts = [reply(rubric="")]
    with pytest.raises(InputError, match=r"m wrote no valid trait in 3 attempts \(it lacks rubric\)"):
        write_trait("curious", "d", llm="m", base_url=llm.url, attempts=3)
    assert len(llm.requests) == 3
    with pytest.raises(InputError, match="give one word of letters"):
        write_trait("two words", "d", llm="m", base_url=llm.url)


def test_the_command_writes_a_file_once(llm, tmp_path):
    from helpers import run

    llm.texts, path = [reply()], tmp_path / "curious.json"
    arguments = ("new-trait", "curious", "--description", "d", "--llm", "m", "--base-url", llm.url, "--out", path)
    out, _ = run(*arguments)
    assert "curious against incurious" in out and load_trait(path).name == "curious"
    _, err = run(*arguments, code=2)
    assert "is there already" in err and len(llm.requests) == 1
    _, err = run("new-trait", "x", "--description", "d", "--llm", "m", "--base-url", "nowhere", code=2)
    assert "is no address" in err
