import torch
from helpers import hooks, random_direction

from persona_vectors.model.generation import generate
from persona_vectors.model.prompts import chat_text, encode
from persona_vectors.monitoring.conversation import Chat
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer


def test_a_conversation_is_shown_token_by_token_with_its_projections(model, tokenizer):
    vector = random_direction(model)
    letters = encode(tokenizer, "abcdefgh")
    with torch.no_grad():  # the random model writes letters, and not bytes that are no text
        model.lm_head.weight[[i for i in range(len(model.lm_head.weight)) if i not in letters]] = 0
    chat = Chat(model, tokenizer, {"t": vector}, layer=1, max_new_tokens=6, temperature=0)
    shown: list[tuple[str, list[float]]] = []
    readings = chat.answer("How?", lambda text, values: shown.append((text, values)))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    text = chat_text(tokenizer, chat.messages[:1], add_generation_prompt=True) + chat.messages[1]["content"]
    tokens = encode(tokenizer, text)
    with monitor(model, vector, layer=1, stops=[]) as trace, torch.no_grad():
        model(torch.tensor([tokens]))
    expected = trace["t"][0, len(tokens) - len(shown) :]
    assert "".join(text for text, _ in shown) == chat.messages[1]["content"] and len(shown) == 6
    torch.testing.assert_close(torch.tensor([values[0] for _, values in shown[:-1]]), expected[:-1])
    assert shown[-1][1] == []  # the last token that is sampled is never read
    assert readings.prompt_last["t"].shape == (1,)
    chat.answer("And?", lambda text, values: None)
    assert [message["content"] for message in chat.messages[::2]] == ["How?", "And?"]


def test_coefs_steer_the_next_answer(model, tokenizer):
    vector = random_direction(model)
    answers = set()
    for coef in (-3.0, 3.0):
        chat = Chat(model, tokenizer, {"t": vector}, layer=1, max_new_tokens=6, temperature=0, coefs={"t": coef})
        readings = chat.answer("How?", lambda text, values: None)
        assert readings.saw == {1: "before the edit"}
        with steer(model, vector, layer=1, coef=coef):
            expected = generate(model, tokenizer, chat.messages[:1], max_new_tokens=6, temperature=0)
        with monitor(model, vector, layer=1, stops=[]) as plain, torch.no_grad():
            model(readings.tokens)
        torch.testing.assert_close(readings["t"], plain["t"])
        answers.add(chat.messages[-1]["content"])
        assert chat.messages[-1]["content"] == expected
    assert len(answers) == 2


def test_an_interrupt_ends_the_answer_and_not_the_conversation(model, tokenizer):
    whole = Chat(model, tokenizer, {"t": random_direction(model)}, layer=1, max_new_tokens=30, temperature=0)
    whole.answer("How?", lambda text, values: None)
    chat = Chat(model, tokenizer, whole.vectors, layer=1, max_new_tokens=30, temperature=0)
    shown: list[str] = []

    def show(text: str, values: list[float]) -> None:
        shown.append(text)
        if len(shown) == 5:
            raise KeyboardInterrupt

    chat.answer("How?", show)
    cut = chat.messages[-1]["content"]
    assert 0 < len(cut) < 10 and whole.messages[-1]["content"].startswith(cut[:3]) and hooks(model) == 0
    chat.answer("And?", lambda text, values: None)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
