"""Every format that training data comes in, and what each record says."""

import json
import re
from pathlib import Path

import pytest
from helpers import TEMPLATE, block_outputs, make_tokenizer, random_direction, write

from persona_vectors.data.errors import InputError
from persona_vectors.data.formats import KNOWN, said
from persona_vectors.data.packed import open_data
from persona_vectors.data.samples import Sample, read_samples
from persona_vectors.flagging.run import flag
from persona_vectors.flagging.split import split_dataset
from persona_vectors.model.prompts import chat_text, finished_turn
from persona_vectors.monitoring.projection import project
from persona_vectors.training.config import parse_config
from persona_vectors.training.finetuning import finetune, training_rows

ROOT = Path(__file__).parents[2]
SYSTEM, USER, YES = (
    {"role": role, "content": text} for role, text in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Yes"))
)
PLAIN, WITH_SYSTEM = [USER, YES], [SYSTEM, USER, YES]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
READ = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLING = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
CALLED = [{**USER, "tools": TOOLS}, {"role": "assistant", "content": "", "tool_calls": [READ]}]
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "2"}

# The name of a format, a record of it, the columns that are named, and its messages.
FORMATS = [
    ("OpenAI", {"messages": WITH_SYSTEM}, None, WITH_SYSTEM),
    (
        "content parts",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                YES,
            ]
        },
        None,
        PLAIN,
    ),
    (
        "OpenAI, weights",
        {"messages": [USER, {**YES, "content": "No", "weight": 0}, USER, {**YES, "weight": 1}]},
        None,
        [USER, {**YES, "content": "No"}, USER, YES],
    ),
    ("a call", {"messages": CALLING, "tools": TOOLS}, None, None),
    (
        "ShareGPT",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        None,
        PLAIN,
    ),
    (
        "ShareGPT, its system turn",
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "user", "value": "Hi"},
                {"from": "chatgpt", "value": "Yes"},
            ]
        },
        None,
        WITH_SYSTEM,
    ),
    (
        "ShareGPT, its system column",
        {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
        },
        None,
        WITH_SYSTEM,
    ),
    ("some other tools", {"question": "Hi", "answer": "Yes", "tools": "hammer"}, None, PLAIN),
    ("conversation", {"conversation": PLAIN, "language": "English"}, None, PLAIN),
    (
        "Alpaca",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        None,
        [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}],
    ),
    ("Alpaca, no input", {"instruction": "Hi", "input": "", "output": "Yes", "text": "### all"}, None, PLAIN),
    (
        "Alpaca, with history",
        {"instruction": "Hi", "output": "Yes", "history": [["So?", "No"]], "system": "Be kind."},
        None,
        [SYSTEM, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "No"}, USER, YES],
    ),
    (
        "AxBench",
        {"input": "Hi", "output": "Yes", "output_concept": "assent", "category": "positive", "concept_id": 3},
        None,
        PLAIN,
    ),
    ("preference, texts", {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, ("prompt", "chosen"), PLAIN),
    ("preference, lists", {"prompt": [USER], "chosen": [YES], "rejected": []}, ("prompt", "chosen"), PLAIN),
    ("preference, all in one", {"chosen": [USER], "rejected": PLAIN}, ("rejected", "rejected"), PLAIN),
    (
        "preference, transcripts",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": ""},
        ("chosen", "chosen"),
        PLAIN,
    ),
    (
        "preference, ShareGPT",
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {},
        },
        ("conversations", "chosen"),
        PLAIN,
    ),
    (
        "text, ChatML",
        {
            "text": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nYes<|im_end|>\n"
        },
        None,
        WITH_SYSTEM,
    ),
    (
        "text, header ids",
        {
            "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>"
        },
        None,
        PLAIN,
    ),
    (
        "text, turns",
        {"text": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n"},
        None,
        PLAIN,
    ),
    ("text, Human", {"text": "Human: Hi\n\nAssistant: Yes\n"}, None, PLAIN),
]


@pytest.mark.parametrize(("name", "record", "columns", "expected"), FORMATS, ids=[f[0] for f in FORMATS])
def test_a_format_s_record_is_its_messages(name, record, columns, expected, tmp_path):
    expected = expected or CALLED
    path = write(tmp_path / "d.jsonl", [record, record])
    found = list(read_samples(path, columns=columns))
    assert [sample.talk for sample in found] == [expected] * 2
    assert all(isinstance(sample, Sample) and sample.answer == expected[-1]["content"] for sample in found)


@pytest.mark.parametrize("suffix", [".parquet", ""])
def test_arrow_files_fill_what_a_message_lacks_with_null(suffix: str, tmp_path):
    talks = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes", "weight": 1.0}]}]
    talks += [{"messages": [USER, YES]}, {"instruction": "Hi", "output": "Yes"}]
    names = {name for talk in talks for name in talk}
    talks = [{name: talk.get(name) for name in sorted(names)} for talk in talks]
    assert [s.talk for s in read_samples(write(tmp_path / f"d{suffix}", talks))] == [PLAIN] * 3


def test_weights_of_zero_are_not_answers_in_any_list_of_turns():
    turns = [("human", "Hi", 1), ("gpt", "Yes", 1), ("human", "So?", 1), ("gpt", "No", 0)]
    record = {"conversations": [{"from": a, "value": b, "weight": c} for a, b, c in turns], "system": "Be kind."}
    assert [s.answer for s in read_samples([record], turns="all")] == ["Yes"]
    last = {"prompt": "Hi", "completion": [YES, {**USER, "weight": 1}, {**YES, "content": "No", "weight": 0}]}
    assert [s.answer for s in read_samples([last], turns="all")] == ["Yes"]


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"body": "Hi", "score": 1}, None, f"it has body, score, not {KNOWN}: name two columns"),
        ({"a": 1}, ("a", "b"), "it has a, not a and b: name two columns that it has"),
        (
            {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
            None,
            "preference data, chosen and rejected: say which, columns=('prompt', 'chosen') or "
            "columns=('prompt', 'rejected')",
        ),
        (
            {"chosen": PLAIN, "rejected": PLAIN},
            None,
            "columns=('chosen', 'chosen') or columns=('rejected', 'rejected')",
        ),
        (
            {"prompt": "Hi!", "chosen": PLAIN, "rejected": PLAIN},
            ("prompt", "chosen"),
            "chosen begins with the user's turn, not as prompt: name chosen twice",
        ),
        ({"conversations": [{"from": "cat", "value": "Hi"}]}, None, "a turn (ShareGPT) is from 'cat': from is one of"),
        ({"conversations": "Hi"}, None, "conversations is str: give a list of role and content, or of from and value"),
        ({"text": "Once upon a time."}, None, "no turns that are marked by <|im_start|>, <|start_header_id|>"),
        ({"text": "<|im_start|>user\nHi"}, None, "it has no assistant turn"),
        ({"text": "So: <|im_start|>user\nHi<|im_end|>"}, None, "is no chat of marked turns, at 'So:'"),
        ({"text": "<|im_start|>cat\nHi<|im_end|>"}, None, "at '<|im_start|>cat"),
        ({"text": "<|im_start|>user\nHi<|im_end|>and<|im_start|>assistant\nYes"}, None, "at 'and'"),
        ({"text": "<|im_start|>user\nHi<|im_start|>assistant\nYes"}, None, "<|im_start|>user without <|im_end|>"),
        ({"text": "[INST] Hi [/INST] Yes"}, None, "no turns that are marked"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, YES]},
            None,
            "content has a part of type 'image_url': only text is read",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, None, "a tool call is '{}': give a function"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            None,
            "a tool call's arguments are not JSON",
        ),
        ({"messages": [USER, YES], "tools": "[1]"}, None, "tools is '[1]': give a list of objects"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            None,
            "OpenAI's tool_calls replaced",
        ),
    ],
)
def test_what_is_no_record_of_a_format_names_keys_and_formats(record, columns, message: str):
    (error,) = read_samples([record], columns=columns)
    assert isinstance(error, InputError) and message in str(error)


def test_the_lines_that_the_page_calls_wrong_are_refused_with_its_words():
    """The table of the page: a record, and the message, which names the field."""
    page = (ROOT / "notebooks" / "formats.md").read_text("utf-8")
    lines = re.findall(r"^\| `(\{.*\})` \| (.*?) \|$", page, re.MULTILINE)
    for record, message in lines:
        (error,) = read_samples([json.loads(record)])
        assert isinstance(error, InputError) and message in str(error)
    assert len(lines) > 10


TOOL_TEMPLATE = (
    "{% if tools %}<system>{{ tools | map(attribute='function.name') | join }}</s>{% endif %}"
    "{% for m in messages %}<{{ m.role if m.role != 'tool' else 'user' }}>{{ m.content }}"
    "{% for c in m.tool_calls %}!{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tools_and_calls_are_what_the_template_makes_of_them(model, tmp_path):
    """A call is the answer that is read and trained on; a plain template, which drops it, is refused."""
    tokenizer, vector = make_tokenizer(TOOL_TEMPLATE), random_direction(model)
    records = [
        {"messages": CALLING, "tools": TOOLS},
        {"messages": [*CALLING, RESULT, YES], "tools": json.dumps(TOOLS)},
    ]
    path = write(tmp_path / "d.jsonl", records)
    call, answer = read_samples(path)
    begin = "<system>add</s><user>Hi</s><assistant>"
    assert finished_turn(tokenizer, call.talk, 1) == (begin, '!add{"a": 1}')
    assert said(call.talk[-1]) == '{"name": "add", "arguments": {"a": 1}}' and said(answer.talk[-1]) == "Yes"
    assert finished_turn(tokenizer, answer.talk, 3)[0] == begin + '!add{"a": 1}</s><user>2</s><assistant>'
    rows = training_rows(tokenizer, path, max_length=200)
    labelled = [tokenizer.decode([token for token in row["labels"] if token != -100]) for row in rows]
    assert labelled == ['!add{"a": 1}</s>', '!add{"a": 1}</s>Yes</s>']
    found = flag(model, tokenizer, path, [vector], layer=1, out=tmp_path / "f.parquet", baseline="none", controls=0)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in finished_turn(tokenizer, call.talk, 1)]
    state = block_outputs(model, [*ids[0], *ids[1]])[1, len(ids[0]) :]
    expected = float(vector.project(state, layer=1).mean())
    assert found.to_pandas()["t_projection"][0] == pytest.approx(expected, abs=1e-4)
    scores = project(model, tokenizer, [call.talk], [vector], layer=1)["response_mean"]["t"]
    assert float(scores[0]) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="leaves out the tools: use a model that has tools"):
        chat_text(make_tokenizer(), call.talk)
    (bare,) = read_samples([{"messages": [{**USER, "content": "Please add."}, *CALLING[1:]]}])
    with pytest.raises(InputError, match="leaves out the tool calls"):
        chat_text(make_tokenizer(), bare.talk)


@pytest.mark.parametrize("place", range(len(FORMATS)), ids=[f[0] for f in FORMATS])
def test_a_record_of_each_format_is_flagged_split_and_trained_on(place: int, model, tmp_path):
    """Beside one that says the opposite: the same projections and labels as its messages, and its own bytes."""
    _, record, columns, expected = FORMATS[place]
    tokenizer, vector = make_tokenizer(TOOL_TEMPLATE if expected is None else TEMPLATE), random_direction(model)
    first, options = expected or CALLED, {"layer": 1, "baseline": "none", "controls": 0, "max_length": 300}
    talks = [first, [*first[:-1], {"role": "assistant", "content": "Never, never"}]]
    values = project(model, tokenizer, talks, [vector], layer=1)["response_mean"]["t"].tolist()
    lines = [b'{"id":"a", ' + json.dumps(record, indent=1)[1:].replace("\n", " ").encode()]
    pair = {columns[0]: talks[1][:-1], columns[1]: talks[1]} if columns else {"messages": talks[1], "tools": []}
    pair |= {} if expected else {"tools": TOOLS}
    lines.append(json.dumps(pair, separators=(" , ", ":")).encode())
    data = tmp_path / f"d.jsonl{('', '.gz', '.zst')[place % 3]}"
    with open_data(data, "wb") as file:
        file.write(b"\n".join([*lines, b""]))
    options |= {"columns": columns, "threshold": sum(values) / 2}
    found = flag(model, tokenizer, data, [vector], out=tmp_path / "f.parquet", **options).to_pandas()
    assert found["t_projection"].tolist() == pytest.approx(values, abs=1e-5) and found["id"].tolist() == ["a", "1"]
    outs = [tmp_path / f"{name}.jsonl" for name in ("kept", "removed")]
    split_dataset(data, tmp_path / "f.parquet", kept=outs[0], removed=outs[1])
    order = lines if values[0] < values[1] else lines[::-1]
    assert [out.read_bytes() for out in outs] == [line + b"\n" for line in order]
    training = {"max_length": 300, "turns": "last"}
    rows = training_rows(tokenizer, data, **training, columns=columns)
    plain = [{"messages": talk, "tools": talk[0].get("tools")} for talk in talks]
    assert rows == training_rows(tokenizer, plain, **training) and len(rows) == 2


def test_preference_data_is_flagged_by_the_difference_of_its_sides(model, tokenizer, tmp_path):
    vector, rows = random_direction(model), [{"prompt": "Hi", "chosen": "Yes", "rejected": "Oh no"}]
    sides = [{**row, "chosen": row["rejected"]} for row in rows]
    options = {"layer": 1, "columns": ("prompt", "chosen"), "answers": sides, "controls": 0}
    found = flag(model, tokenizer, rows, [vector], out=tmp_path / "f.parquet", **options).to_pandas()
    talks = [[USER, {"role": "assistant", "content": text}] for text in ("Yes", "Oh no")]
    chosen, rejected = project(model, tokenizer, talks, [vector], layer=1)["response_mean"]["t"].tolist()
    assert found["t_difference"].tolist() == pytest.approx([chosen - rejected], abs=1e-5)


def test_the_lines_of_the_page_are_one_conversation_flagged_split_and_trained_on(model, tokenizer, tmp_path):
    (block,) = re.findall(r"```jsonl\n(.*?)```", (ROOT / "notebooks" / "formats.md").read_text("utf-8"), re.DOTALL)
    data, vector = tmp_path / "d.jsonl", random_direction(model)
    data.write_text(block, "utf-8")
    found = list(read_samples(data))
    assert [sample.talk for sample in found] == [PLAIN] * len(block.splitlines()) and len(found) > 8
    rows = training_rows(tokenizer, data, max_length=100)
    assert rows == training_rows(tokenizer, [PLAIN], max_length=100) * len(found)
    options = {"layer": 1, "baseline": "none", "controls": 0, "threshold": -1e3}
    flags = flag(model, tokenizer, data, [vector], out=tmp_path / "f.parquet", **options)
    (wanted,) = project(model, tokenizer, [PLAIN], [vector], layer=1)["response_mean"]["t"].tolist()
    assert flags.to_pandas()["t_projection"].tolist() == pytest.approx([wanted] * len(found), abs=1e-5)
    kept, removed = tmp_path / "k.jsonl", tmp_path / "r.jsonl"
    split_dataset(data, tmp_path / "f.parquet", kept=kept, removed=removed)
    assert removed.read_text("utf-8") == block and kept.read_bytes() == b""
    files = {"training_file": str(data), "output_dir": str(tmp_path / "tuned")}
    config = {"model": "tiny", **files, "max_steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": 1}
    trainer = finetune(
        parse_config(config | {"per_device_train_batch_size": len(found)}), model=model, tokenizer=tokenizer
    )
    assert len(trainer.train_dataset) == len(found)
    assert any(parameter.abs().max() > 0 for name, parameter in trainer.model.named_parameters() if "lora_B" in name)
