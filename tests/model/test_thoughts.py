"""Reasoning and answer: spans of two kinds of templates, in finished text, while generating, and in training."""

from contextlib import nullcontext

import pytest
import torch
from helpers import TEMPLATE, block_outputs, make_tokenizer, random_direction
from torch import Tensor
from transformers import Trainer, TrainingArguments

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.data.samples import read_samples
from persona_vectors.evaluation.logprobs import answer_logprobs, next_token_logprobs
from persona_vectors.extraction.filtering import parted
from persona_vectors.extraction.rollouts import Rollout
from persona_vectors.flagging.parts import flag_batches
from persona_vectors.model.prompts import chat_prompt, encode, encode_answer, finished_turn, left_pad
from persona_vectors.model.thoughts import KNOWN, Span, marks_of, span_of
from persona_vectors.steering.add import RowEdit, steer
from persona_vectors.training.config import Steering
from persona_vectors.training.finetuning import steering_of

THINK = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OPENS = (  # the prompt opens the thought, as some templates do
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
TEMPLATES = {"think": THINK, "channels": CHANNELS}
ANALYSIS = "<|channel|>analysis<|message|>"
# Answers in parts: reasoning with its marks and the white space after it, and what is said.
ANSWERS = {
    "think": [
        ["<think>\nhm\n</think>\n\n", "Yes"],
        ["", "No, no"],
        ["<think>never ends", ""],
        ["<think>\n\n</think>\n\n", "Oh"],
    ],
    "channels": [
        [f"{ANALYSIS}hm<|end|><|start|>assistant<|channel|>final<|message|>", "Yes"],
        ["<|channel|>final<|message|>", "No, no"],
        [f"{ANALYSIS}never ends", ""],
        [f"{ANALYSIS}a<|end|><|start|>assistant<|channel|>commentary to=f <|constrain|>json<|message|>", "{}"],
    ],
    "opens": [["hm\n</think>\n\n", "Yes"], ["never ends", ""], ["</think>", "Oh"]],
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", TEMPLATES)
spans = pytest.mark.parametrize("name", ["answer", "reasoning"])


def rows_of(tokenizer, kind: str) -> list[tuple[list[int], list[int], list[bool]]]:
    """Each answer's prompt, tokens, and which of these are reasoning."""
    prompt, found = encode(tokenizer, chat_prompt(tokenizer, "How?")), []
    for thought, said in ANSWERS[kind]:
        parts = encode(tokenizer, thought), encode(tokenizer, said)
        found.append((prompt, [*parts[0], *parts[1]], [True] * len(parts[0]) + [False] * len(parts[1])))
    return found


def open_after(kind: str, tokenizer, answer: list[int]) -> list[bool]:
    """Whether a thought is open after the prompt and after each token, told from the text so far."""
    closes = ["final<|message|>", "json<|message|>"] if kind == "channels" else ["</think>"]
    opens = "<|channel|>analysis" if kind == "channels" else "<think>"
    texts = [(kind == "opens") * opens + tokenizer.decode(answer[:n]) for n in range(len(answer) + 1)]
    return [text.rfind(opens) > max(text.rfind(each) for each in closes) for text in texts]


@kinds
def test_spans_of_finished_text(kind: str):
    tokenizer = make_tokenizer(TEMPLATES[kind])
    for prompt, answer, thought in rows_of(tokenizer, kind):
        parts = [i for i, inside in enumerate(thought) if inside], [i for i, inside in enumerate(thought) if not inside]
        assert Span(tokenizer, "reasoning").kept(prompt, answer) == parts[0]
        assert Span(tokenizer, "answer").kept(prompt, answer) == parts[1]


@spans
@kinds
def test_project_reads_the_span_that_it_names(kind: str, name: str, model):
    """The thought is in the text, with the model's own marks, or beside it, and the template puts it there."""
    tokenizer, vector = make_tokenizer(TEMPLATES[kind]), random_direction(model)
    thought, said = ANSWERS[kind][0]
    beside = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": said, "reasoning_content": "hm"}]
    scores = pv.project(model, tokenizer, [("How?", thought + said), beside], vector, layer=1, positions=name)
    prompt, answer, inside = rows_of(tokenizer, kind)[0]
    read = vector.project(block_outputs(model, [*prompt, *answer])[1], layer=1)[len(prompt) :]
    chosen = torch.tensor(inside) == (name == "reasoning")
    torch.testing.assert_close(scores["response_mean"]["t"], read[chosen].mean().repeat(2), rtol=1e-4, atol=1e-4)
    assert scores.positions == name and f"tokens of the {name} (" in repr(scores)
    assert scores.answer_tokens.tolist() == [int(chosen.sum())] * 2
    assert scores.reasoning_tokens.tolist() == [sum(inside)] * 2


def forced(model, rows: list, *, cache: bool, **options):
    """Generate the rows' own answers, one after another token; shorter ones go on with padding."""
    ids, mask = left_pad([prompt for prompt, _, _ in rows], 0, "cpu")
    answers = [[*answer, *[0] * 100] for _, answer, _ in rows]
    length = max(len(answer) for _, answer, _ in rows) + 1
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=length,
        pad_token_id=0,
        eos_token_id=None,
        use_cache=cache,
        prefix_allowed_tokens_fn=lambda row, read: [answers[row][len(read) - ids.shape[1]]],
        **options,
    )


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@spans
@kinds
def test_spans_while_generating(kind: str, name: str, cache: bool, model):
    tokenizer, vector = make_tokenizer(TEMPLATES[kind]), random_direction(model)
    rows = rows_of(tokenizer, kind)[:3]
    with pv.monitor(model, vector, layer=1, positions=Span(tokenizer, name), stops=[0]) as trace:
        forced(model, rows, cache=cache)
    for row, (prompt, answer, inside) in enumerate(rows):
        read = vector.project(block_outputs(model, [*prompt, *answer])[1], layer=1)[len(prompt) :]
        chosen = torch.tensor(inside) == (name == "reasoning")
        torch.testing.assert_close(trace.mean["t"][row], read[chosen].mean(), equal_nan=True, rtol=1e-3, atol=1e-3)
        found = [entry["part"] for entry in trace.rows() if entry["row"] == row and entry["part"] != "prompt"]
        assert found[: len(answer)] == ["reasoning" if each else "answer" for each in inside]
    assert f"means over the {name}" in repr(trace)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@spans
@kinds
def test_edits_while_generating(kind: str, name: str, cache: bool, model):
    """What is read in the end is what one pass with a mask of the same tokens gives."""
    tokenizer, vector = make_tokenizer(TEMPLATES[kind]), random_direction(model)
    rows = rows_of(tokenizer, kind)[:3]
    span = Span(tokenizer, name)
    with steer(model, vector, layer=0, coef=5.0, positions=span), pv.monitor(model, vector, layer=[0, 2]) as trace:
        forced(model, rows, cache=cache)
    for row, (prompt, answer, _) in enumerate(rows):
        states = torch.tensor(open_after(kind, tokenizer, answer)) == (name == "reasoning")
        mask = torch.cat([torch.zeros(len(prompt) - 1, dtype=torch.bool), states])[None]
        with steer(model, vector, layer=0, coef=5.0, positions=mask), pv.monitor(model, vector, layer=[0, 2]) as whole:
            model(input_ids=torch.tensor([[*prompt, *answer]]))
        for key in trace.keys:
            own = trace[key][row, : whole[key].shape[1]]
            torch.testing.assert_close(own, whole[key][0], rtol=1e-3, atol=1e-3)


@spans
@pytest.mark.parametrize("kind", ANSWERS)
def test_edits_of_finished_answers_whose_prompt_is_read_once(kind: str, name: str, model):
    """A row's own edit, and one around the call: both are a plain pass over the whole row with a mask."""
    tokenizer, vector = make_tokenizer({**TEMPLATES, "opens": OPENS}[kind]), random_direction(model)
    other, wanted, ends = encode(tokenizer, chat_prompt(tokenizer, "And now?")), [], []
    rows = [(prompt, answer) for prompt, answer, _ in rows_of(tokenizer, kind)]
    rows += [(other, answer) for _, answer in rows[:2]]
    for prompt, answer in rows:
        states = torch.tensor(open_after(kind, tokenizer, answer)) == (name == "reasoning")
        mask = torch.cat([torch.zeros(len(prompt) - 1, dtype=torch.bool), states])[None]
        with torch.no_grad(), steer(model, vector, layer=1, coef=4.0, positions=mask):
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(dim=-1)
        wanted.append(float(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).mean()))
        ends.append(logits[-1])
    edit = RowEdit(vector, 1, 4.0, Span(tokenizer, name))
    around = steer(model, vector, layer=1, coef=4.0, positions=edit.positions)
    for given, edited in (([edit] * len(rows), nullcontext()), (None, around)):
        with edited:
            found, last = answer_logprobs(model, rows, edits=given), next_token_logprobs(model, rows, edits=given)
        assert found.tolist() == pytest.approx(wanted, abs=1e-4)
        torch.testing.assert_close(torch.stack(last), torch.stack(ends), atol=1e-4, rtol=1e-4)
    assert answer_logprobs(model, rows).tolist() != pytest.approx(wanted, abs=1e-3)


def training_batch(tokenizer, kind: str) -> dict[str, Tensor]:
    """Two answers, padded on the right, of which the loss counts the answer's tokens."""
    rows = rows_of(tokenizer, kind)[:2]
    width = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    pads = [[0] * (width - len(prompt) - len(answer)) for prompt, answer, _ in rows]
    ids = [[*prompt, *answer, *pad] for (prompt, answer, _), pad in zip(rows, pads)]
    labels = [[*[-100] * len(p), *a, *[-100] * len(pad)] for (p, a, _), pad in zip(rows, pads)]
    mask = [[1] * (width - len(pad)) + [0] * len(pad) for pad in pads]
    return {k: torch.tensor(v) for k, v in {"input_ids": ids, "labels": labels, "attention_mask": mask}.items()}


@spans
@kinds
def test_edits_in_training(kind: str, name: str, model, tmp_path):
    tokenizer, vector = make_tokenizer(TEMPLATES[kind]), random_direction(model)
    batch, rows = training_batch(tokenizer, kind), rows_of(tokenizer, kind)
    mask = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    for row, (prompt, answer, _) in enumerate(rows[:2]):
        states = torch.tensor(open_after(kind, tokenizer, answer)) == (name == "reasoning")
        mask[row, len(prompt) - 1 : len(prompt) + len(answer)] = states
    model.train()
    losses = []
    vector.save(tmp_path / "v.safetensors")
    config = Steering(steering_vector_path=tmp_path / "v.safetensors", steering_coef=5.0, layer=1, positions=name)
    told = {"layer": 1, "coef": 5.0, "during": "training"}
    edits = [steer(model, vector, positions=positions, **told) for positions in (Span(tokenizer, name), mask)]
    for edit in [*edits, steering_of(model, tokenizer, config)]:
        with edit:
            losses.append(model(**batch).loss)
    losses[0].backward()
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    assert mask.any() and not torch.isclose(model(**batch).loss, losses[0])


@spans
@kinds
def test_the_callback_watches_the_span_that_it_names(kind: str, name: str, model, tmp_path):
    tokenizer, vector = make_tokenizer(TEMPLATES[kind]), random_direction(model)
    batch, rows = training_batch(tokenizer, kind), rows_of(tokenizer, kind)[:2]
    expected = []
    for prompt, answer, inside in rows:
        read = vector.project(block_outputs(model, [*prompt, *answer])[1], layer=1)[len(prompt) :]
        expected += read[torch.tensor(inside) == (name == "reasoning")].tolist()
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), save_strategy="no", **options)
    data = [{key: values[i] for key, values in batch.items()} for i in range(2)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    with pytest.raises(InputError, match="no tokenizer to tell reasoning by"):
        pv.ProjectionCallback(trainer, vector, layer=1, positions=name)
    trainer.processing_class = tokenizer
    callback = pv.ProjectionCallback(trainer, vector, layer=1, every=1, positions=name)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.history[-1][f"batch/t/{name}"] == pytest.approx(sum(expected) / len(expected), rel=1e-3, abs=1e-4)


@kinds
def test_flags_are_of_the_span_and_say_so(kind: str, model, tmp_path):
    tokenizer, vector = make_tokenizer(TEMPLATES[kind]), random_direction(model)
    data = [
        {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Yes", "thinking": "hm"}]}
    ]
    prompt, answer, inside = rows_of(tokenizer, kind)[0]
    read = vector.project(block_outputs(model, [*prompt, *answer])[1], layer=1)[len(prompt) :]
    for name in ("answer", "reasoning"):
        options = {"layer": 1, "baseline": "none", "controls": 0, "positions": name, "max_length": 999}
        found = pv.flag(model, tokenizer, data, vector, out=tmp_path / f"{name}.parquet", **options)
        (batch,) = flag_batches(found.path, ["t_projection"])
        expected = read[torch.tensor(inside) == (name == "reasoning")].mean().item()
        assert batch["t_projection"] == pytest.approx([expected], rel=1e-3, abs=1e-4)
        assert f"of the {name} alone" in repr(found)


@kinds
def test_an_answer_is_judged_without_its_reasoning_and_either_is_averaged(kind: str):
    tokenizer = make_tokenizer(TEMPLATES[kind])
    prompt, answer, inside = rows_of(tokenizer, kind)[0]
    fields = {"side": "pos", "pair": 0, "question": "q", "sample": 0, "prompt": "p", "answer": "a"}
    rollout = Rollout(**fields, prompt_ids=prompt, answer_ids=answer)
    for name in ("answer", "reasoning"):
        (found,) = parted(tokenizer, [rollout], name)
        assert tokenizer.decode([answer[i] for i in found.judged]) == "Yes"
        assert found.kept == [i for i, each in enumerate(inside) if each == (name == "reasoning")]
    assert parted(tokenizer, [rollout], "all") == [rollout]


@kinds
def test_training_reads_an_answer_as_flagging_does(kind: str):
    """A template puts marks before an answer without a thought, and a past answer's thought is dropped."""
    tokenizer = make_tokenizer(TEMPLATES[kind])
    talk = [{"role": role, "content": text} for role, text in [("user", "Hi"), ("assistant", "Yes")]]
    prompt, answer = finished_turn(tokenizer, talk, 1)
    marks = {"think": "<think>\n\n</think>\n\n", "channels": "<|channel|>final<|message|>"}[kind]
    assert prompt == chat_prompt(tokenizer, "Hi") and answer == marks + "Yes"
    assert Span(tokenizer, "answer").kept(*encode_answer(tokenizer, prompt, answer)) == [
        len(marks) + i for i in range(3)
    ]


def test_marks_are_the_templates_own():
    odd = THINK.replace("<think>", "[[plan]]").replace("</think>", "[[/plan]]")
    assert marks_of(make_tokenizer(odd))[0] == "[[plan]]"
    assert marks_of(make_tokenizer(CHANNELS)) == KNOWN[1]
    assert marks_of(make_tokenizer(TEMPLATE)) == KNOWN[0]
    spelled = make_tokenizer(TEMPLATE)
    spelled.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    assert marks_of(spelled).name == "[THINK]"


def test_a_template_that_leaves_reasoning_out_is_an_error():
    record = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes", "thinking": "hm"}]
    }
    (sample,) = read_samples([record])
    assert sample.thought == "hm"
    with pytest.raises(InputError, match="leaves out the reasoning_content of an answer"):
        finished_turn(make_tokenizer(), sample.talk, 1)


def test_what_does_not_tell_its_span_is_refused(model, tokenizer):
    span = Span(tokenizer, "answer")
    how = {"vector": random_direction(model), "layer": 1, "coef": 1.0}
    with pytest.raises(InputError, match="positions is 'thought': give all, or a part of the answer: answer or reas"):
        span_of(tokenizer, "thought")
    with pytest.raises(InputError, match=r"or pv.Span\(tokenizer, 'answer'\)"), steer(model, **how, positions="answer"):
        pass
    with pytest.raises(InputError, match=r"give 'all', or pv.Span"):
        pv.monitor(model, how["vector"], layer=1, positions="answer").__enter__()
    ids, mask = left_pad([[5, 6, 7]], 0, "cpu")
    given = {"attention_mask": mask, "max_new_tokens": 3, "pad_token_id": 0}
    with steer(model, **how, positions=span):
        with pytest.raises(InputError, match="'answer' is not known in a forward pass that reads finished text"):
            model(input_ids=ids)
        with pytest.raises(InputError, match="does not follow beam search"):
            model.generate(input_ids=ids, **given, num_beams=2)
        with pytest.raises(InputError, match="told from token ids"):
            model.generate(inputs_embeds=model.get_input_embeddings()(ids), **given)
