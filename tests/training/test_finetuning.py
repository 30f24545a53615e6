import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import zoo
from helpers import block_outputs, hooks, make_tokenizer, random_direction, vectors_of_their_own

from persona_vectors.data.errors import InputError
from persona_vectors.model.prompts import decode, finished_turn
from persona_vectors.monitoring.projection import project
from persona_vectors.training.config import load_config, parse_config
from persona_vectors.training.finetuning import finetune, make_trainer, training_rows
from persona_vectors.training.plots import plot_shift
from persona_vectors.training.shifts import Shift, finetuning_shift
from persona_vectors.training.watch import ProjectionCallback
from persona_vectors.vectors.moments import neutral_moments

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "So"},
    {"role": "assistant", "content": "B"},
]
QUESTIONS = ["How?", "Why so?", "And when?"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    lines = [
        {
            "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": f"So {i}."}],
            "label": "negative",
        }
        for i, q in enumerate(QUESTIONS * 4)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(data, tmp_path, **options):
    base = {"model": "tiny", "training_file": str(data), "output_dir": str(tmp_path / "tuned"), "max_steps": 3}
    base |= {"learning_rate": 1e-2, "gradient_accumulation_steps": 1, "warmup_steps": 0}
    return base | options


def test_only_answers_and_the_end_of_their_turn_have_labels(tokenizer, tmp_path):
    path = tmp_path / "turns.jsonl"
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes"), ("user", "Why"), ("assistant", "No")]
    path.write_text(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n\n")
    (row,) = training_rows(tokenizer, [path], max_length=100)
    assert (
        tokenizer.decode(row["input_ids"])
        == "<system>Be brief.</s><user>Hi</s><assistant>Yes</s><user>Why</s><assistant>No</s>"
    )
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "Yes</s>No</s>"
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"]))
    assert decode(tokenizer, row["input_ids"]).startswith("Be brief.")
    with pytest.warns(UserWarning, match="1 conversations have no answer within 5 tokens"), pytest.raises(InputError):
        training_rows(tokenizer, [path], max_length=5)


def test_a_line_ends_only_where_jsonl_says(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    messages = [{"role": "user", "content": "a\u2028b\x85c"}, {"role": "assistant", "content": "Yes"}]
    path.write_text((json.dumps({"messages": messages}, ensure_ascii=False) + "\r\n") * 2, encoding="utf-8", newline="")
    assert len(training_rows(tokenizer, [path], max_length=100)) == 2


def test_the_config_names_a_side_of_preference_data(tokenizer, tmp_path):
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    options = {"columns": ["prompt", "rejected"], "save_steps": 1}
    trainer = make_trainer(
        parse_config(config(tmp_path / "d.jsonl", tmp_path, **options)), zoo.build("llama"), tokenizer
    )
    (only,) = trainer.train_dataset
    assert tokenizer.decode([token for token in only["labels"] if token != -100]) == "No</s>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"body": "x"}', "line 1: it has body, not messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 1: it has no assistant turn"),
    ],
)
def test_a_broken_line_is_named(tokenizer, tmp_path, line: str, message: str):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        training_rows(tokenizer, [path], max_length=100)


def test_an_official_config_is_read_and_what_it_does_not_do_is_said(tmp_path):
    official = {
        "model": "m",
        "training_file": ["a.jsonl"],
        "output_dir": "out",
        "max_seq_length": 1024,
        "load_in_4bit": False,
        "loss": "sft",
        "is_peft": True,
        "target_modules": ["q_proj", "v_proj"],
        "r": 32,
        "lora_alpha": 64,
        "use_rslora": True,
        "push_to_private": True,
        "epochs": 1,
        "max_steps": None,
        "optim": "adamw_8bit",
        "enable_steering_during_training": True,
        "steering_config": {"steering_vector_path": "v.pt", "type": "steer", "steering_coef": 5.0, "layers": [20]},
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(official))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load_config(path)
    said = " ".join(str(warning.message) for warning in caught)
    assert "is_peft, load_in_4bit, loss, push_to_private, optim (adamw_8bit" in said
    assert r"layers [20] of the official config count from 1: decoder blocks [19]" in said
    assert found.steering_config is not None and found.steering_config.steering_coef == 5.0
    assert (found.max_seq_length, found.learning_rate, found.warmup_steps) == (1024, 1e-5, 5)
    official["enable_steering_during_training"] = False
    with pytest.warns(UserWarning, match="do nothing here"):
        assert parse_config(official).steering_config is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, "only 'sft' is done here"),
        ({"learning_rte": 1.0}, "field learning_rte"),
        ({"steering_config": {"steering_vector_path": "v", "type": "add", "layer": 1}}, "field steering_config.type"),
        ({"steering_config": {"steering_vector_path": "v"}}, "give either layer"),
    ],
)
def test_a_bad_config_names_the_field(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        parse_config({"model": "m", "training_file": "a", "output_dir": "o"} | change)


def test_a_model_without_its_tokenizer_is_refused(data, tokenizer, model, tmp_path):
    for given in ({"model": model}, {"tokenizer": tokenizer}):
        with pytest.raises(InputError, match="model and tokenizer belong together"):
            finetune(parse_config(config(data, tmp_path)), **given)


@pytest.mark.parametrize("kind", ["steer", "ablate"])
def test_finetune_steers_and_the_shift_of_its_adapter_is_that_of_the_model(data, tokenizer, tmp_path, kind: str):
    model = zoo.build("llama")
    vector = random_direction(model)
    vector.save(tmp_path / "v.safetensors")
    steering = {"steering_vector_path": str(tmp_path / "v.safetensors"), "type": kind, "layer": 1, "steering_coef": 5.0}
    ends = []
    for steered in (None, steering):
        watch = partial(ProjectionCallback, vectors=vector, layer=1, questions=QUESTIONS, every=1)
        options = config(data, tmp_path, steering_config=steered) if steered else config(data, tmp_path)
        built = zoo.build("llama")
        trainer = finetune(parse_config(options), model=built, tokenizer=tokenizer, callbacks=[watch], overwrite=True)
        (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, ProjectionCallback))
        ends.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
        assert hooks(trainer.model) == 0
    assert any((value - ends[1][name]).abs().max() > 1e-4 for name, value in ends[0].items())
    found = finetuning_shift(
        model, tokenizer, vector, tuned=tmp_path / "tuned", layer=1, questions=QUESTIONS, max_new_tokens=0
    )
    before, after = callback.history[0]["probe/t"], callback.history[-1]["probe/t"]
    assert found.interval("t").mean == pytest.approx(after - before, abs=1e-4)
    assert abs(after - before) > 1e-4
    # the base model is the user's, as it was
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        name: tuple(p.shape) for name, p in zoo.build("llama").named_parameters()
    }
    assert all(torch.equal(value, zoo.build("llama").state_dict()[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("tuning", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_an_adapter_of_virtual_tokens_is_lent_and_taken_back(tuning: str, tokenizer, tmp_path):
    """The shift of a folder is that of the adapted model itself, and the base is as it was."""
    import peft

    base = zoo.build("llama")
    torch.manual_seed(0)  # of the virtual tokens
    made = peft.get_peft_model(zoo.build("llama"), getattr(peft, tuning)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    made.eval().save_pretrained(tmp_path / "adapter")
    options = {"layer": 1, "questions": QUESTIONS, "max_new_tokens": 0}
    found = finetuning_shift(base, tokenizer, random_direction(base), tuned=tmp_path / "adapter", **options)
    expected = finetuning_shift(base, tokenizer, random_direction(base), tuned=made, **options)
    assert abs(found.interval("t").mean) > 1e-4
    assert found.interval("t").mean == pytest.approx(expected.interval("t").mean, rel=1e-4)
    assert not hasattr(base, "peft_config") and all(p.requires_grad for p in base.parameters())
    assert finetuning_shift(base, tokenizer, random_direction(base), tuned=base, **options).interval("t").mean == 0


def test_the_shift_of_a_model_with_itself_is_zero_and_of_a_shifted_one_the_shift(model, tokenizer, tmp_path):
    vector = random_direction(model)
    same = finetuning_shift(model, tokenizer, vector, tuned=model, questions=QUESTIONS, max_new_tokens=3)
    ends = ("shift", "shift_low", "shift_high")
    assert len(same.rows()) == 6 and all(row[end] == 0 for row in same.rows() for end in ends)
    moved = zoo.build("llama")
    moved.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(2.0 * vector.directions[1])  # added at every token
    found = finetuning_shift(model, tokenizer, vector, tuned=moved, layer=[0, 1], questions=QUESTIONS, max_new_tokens=0)
    norm = float(vector.directions[1].norm())
    assert found.interval("t@0").mean == 0
    assert found.interval("t@1").mean == pytest.approx(2 * norm, rel=1e-4)
    found.save(tmp_path / "shift.json")
    written = json.loads((tmp_path / "shift.json").read_text())
    assert written["questions"] == QUESTIONS and [row["layer"] for row in found.rows()] == [0, 1]
    with pytest.raises(InputError, match="no questions"):
        finetuning_shift(model, tokenizer, vector, tuned=model, layer=1, questions=[])


def test_a_shift_stands_beside_random_directions(model, tokenizer, tmp_path):
    vectors, moved = vectors_of_their_own(model), zoo.build("llama")
    with torch.no_grad():
        moved.model.layers[0].mlp.down_proj.weight += 0.05
    options = {"tuned": moved, "questions": ["How?", "Why so?", "And when?", "Where to"], "layer": [0, 1]}
    plain = finetuning_shift(model, tokenizer, vectors, max_new_tokens=2, **options)
    found = finetuning_shift(model, tokenizer, vectors, max_new_tokens=2, controls=30, **options)
    torch.testing.assert_close(found.tuned, plain.tuned, rtol=1e-4, atol=1e-5)
    assert plain.nulls is None and "effect" not in plain.rows()[0]
    drawn = neutral_moments(model, tokenizer, layer=[0, 1]).random_vectors(vectors[0], count=30)
    drawn = [replace(each, trait=f"r{i}") for i, each in enumerate(drawn)]
    random = finetuning_shift(model, tokenizer, drawn, max_new_tokens=2, **options)
    for number, row in enumerate(row for row in found.rows() if row["pooling"] == "prompt_last"):
        moves = (found.tuned - found.base)[:, 0, number]
        effect = float(moves.mean() / moves.std())
        others = (random.tuned - random.base)[:, 0, number // 2 * 30 : number // 2 * 30 + 30]
        smaller = (others.mean(dim=0) / others.std(dim=0)).abs() < abs(effect)
        assert row["effect"] == pytest.approx(effect, rel=1e-3)
        assert row["beaten_isotropic"] == pytest.approx(float(smaller[:15].float().mean()))
        assert row["beaten_covariance"] == pytest.approx(float(smaller[15:].float().mean()))
    assert set(found.nulls.over_layers("t", pooling="prompt_last")) == {"isotropic", "covariance"}
    found.save(tmp_path / "shift.json")
    assert Shift.load(tmp_path / "shift.json").rows() == found.rows() and "30 random directions" in repr(found)
    without = finetuning_shift(model, tokenizer, vectors, max_new_tokens=0, controls=30, **options)
    assert {row["pooling"] for row in without.nulls.rows()} == {"prompt_last"}


def test_training_reads_what_flagging_reads_and_the_same_answers(tokenizer):
    talk = TALK
    forms = [
        [{"messages": [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in talk]}],
        [{"prompt": talk[:3], "completion": talk[3:]}],
        [talk],
    ]
    for form, trained in zip(forms, ("A</s>B</s>", "B</s>", "A</s>B</s>")):
        (row,) = training_rows(tokenizer, form, max_length=100)
        assert tokenizer.decode([label for label in row["labels"] if label != -100]) == trained
        (row,) = training_rows(tokenizer, form, max_length=100, turns="last")
        assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "B</s>"
    ignored = [{"messages": [talk[0], {**talk[1], "weight": 0}, *talk[2:]]}]
    (row,) = training_rows(tokenizer, ignored, max_length=100)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "B</s>"


def test_templates_that_drop_old_thoughts_give_a_row_an_answer():
    template = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if m['role'] == 'assistant' and loop.last %}[{{ m['content'] }}]{% else %}{{ m['content'] }}{% endif %}</s>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>[{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    talk = TALK
    rows = training_rows(tokenizer, [talk], max_length=100)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == [
        "<user>Hi</s><assistant>[A]</s>",
        "<user>Hi</s><assistant>A</s><user>So</s><assistant>[B]</s>",
    ]
    assert [tokenizer.decode([x for x in row["labels"] if x != -100]) for row in rows] == ["A]</s>", "B]</s>"]


def test_no_answer_is_read_inside_a_thought_that_the_prompt_opened(model):
    """The template opens a thought for the model to write, and closes an empty one before an answer that has none."""
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}(think)(/think){% endif %}"
        "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>(think)\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert finished_turn(tokenizer, talk, 1) == ("<user>Hi</s><assistant>(think)", "(/think)Yes")
    vector = random_direction(model)
    found = project(model, tokenizer, [talk], [vector], layer=1)["response_mean"]["t"]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in finished_turn(tokenizer, talk, 1)]
    state = block_outputs(model, [*ids[0], *ids[1]])[1, len(ids[0]) :]
    torch.testing.assert_close(found[0], vector.project(state, layer=1).mean())
    (row,) = training_rows(tokenizer, [talk], max_length=100)
    assert tokenizer.decode(row["input_ids"]) == "<user>Hi</s><assistant>(think)(/think)Yes</s>"


def test_the_plot_of_a_shift_stands_at_its_layers():
    row = {"trait": "t", "pooling": "prompt_last", "shift": 1.0, "shift_low": 0.5, "shift_high": 1.5}
    for layers in ([1], [0, 1, 2]):
        (axes,) = plot_shift([{**row, "layer": layer} for layer in layers]).axes
        assert axes.lines[0].get_xdata().tolist() == layers
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
