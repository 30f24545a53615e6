"""Where weights go as they are read, in how many bits, and over how many processes."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import save_tiny
from transformers import BitsAndBytesConfig

import persona_vectors as pv
from persona_vectors.data.errors import InputError
from persona_vectors.model.loading import load_model


@pytest.fixture
def asked(monkeypatch):
    """What transformers is asked for; it loads nothing."""
    options: dict = {}

    def from_pretrained(name, **given):
        options.update(given)
        return SimpleNamespace(config=SimpleNamespace(), eval=lambda: None)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return options


def stored(folder: Path, quantization: dict) -> Path:
    """Save a tiny model whose config says that it is quantised."""
    config = save_tiny(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantization}))
    return folder


def test_weights_are_read_straight_onto_the_device(tmp_path, asked):
    load_model(save_tiny(tmp_path / "tiny"), device="cpu")
    assert asked["device_map"] == "cpu" and asked["dtype"] == torch.float32
    load_model(tmp_path / "tiny", device="cpu", device_map="auto")
    assert asked["device_map"] == "auto" and asked["dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    "method", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "mxfp4"}, {"load_in_4bit": 1}]
)
def test_a_quantised_checkpoint_is_loaded_as_it_is(tmp_path, asked, method):
    folder = stored(tmp_path / "tiny", method)
    load_model(folder, device="cpu")
    assert asked["dtype"] == "auto" and "quantization_config" not in asked
    load_model(folder, device="cpu", dtype=torch.float16)
    assert asked["dtype"] == torch.float16
    name = method.get("quant_method", "bitsandbytes")
    with pytest.raises(InputError, match=rf"stored quantised already \({name}\): leave quantization out"):
        load_model(folder, device="cpu", quantization=BitsAndBytesConfig(load_in_8bit=True))


def test_a_library_that_a_quantised_checkpoint_lacks_is_named_in_one_line(tmp_path):
    if importlib.util.find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed")
    with pytest.raises(InputError, match=r"cannot load model.*(gptq|optimum)") as raised:
        load_model(stored(tmp_path / "tiny", {"quant_method": "gptq", "bits": 4}), device="cpu")
    assert "\n" not in str(raised.value)


def test_attention_is_transformers_own_choice_or_the_users(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    for name in ("eager", "sdpa"):
        assert load_model(folder, device="cpu", attn_implementation=name)[0].config._attn_implementation == name
    with pytest.raises(InputError, match=r"cannot load model .*no_such_attention"):
        load_model(folder, device="cpu", attn_implementation="no_such_attention")


def test_quantisation_says_what_it_needs(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "tiny")
    with pytest.raises(InputError, match="quantization is 'int3': give 'nf4', 'int8', or"):
        load_model(folder, device="cpu", quantization="int3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, library in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(InputError, match=rf"quantization='{name}' needs {library}: pip install .*\[quantize\]"):
            load_model(folder, device="cpu", quantization=name)


def test_nf4_computes_in_the_models_dtype(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    load_model(save_tiny(tmp_path / "tiny"), device="cpu", dtype=torch.bfloat16, quantization="nf4")
    config = asked["quantization_config"]
    assert config.quantization_method() == "nf4" and config.bnb_4bit_compute_dtype == torch.bfloat16
    own = BitsAndBytesConfig(load_in_8bit=True)
    load_model(tmp_path / "tiny", device="cpu", quantization=own)
    assert asked["quantization_config"] is own


def test_int8_is_near_the_full_weights_and_is_steered(tmp_path):
    pytest.importorskip("torchao")
    folder, ids = save_tiny(tmp_path / "tiny"), torch.tensor([[5, 6, 7]])
    full, tokenizer = load_model(folder, device="cpu")
    small, _ = load_model(folder, device="cpu", quantization="int8")
    assert type(small.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor
    torch.testing.assert_close(small(ids).logits, full(ids).logits, atol=0.05, rtol=0.05)
    assert pv.generate(small, tokenizer, "Hi", max_new_tokens=3) is not None


def test_a_gguf_file_is_not_quantised(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(InputError, match=r"m\.gguf is de-quantised as it is read: leave quantization out"):
        load_model(tmp_path / "m.gguf", device="cpu", quantization=BitsAndBytesConfig(load_in_8bit=True))


def test_a_plan_needs_processes_and_no_other_placing(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    with pytest.raises(InputError, match="start them with torchrun"):
        load_model(folder, device="cpu", tp_plan="auto")
    with pytest.raises(InputError, match="tp_plan and device_map both place the weights"):
        load_model(folder, device_map="auto", tp_plan="auto")
    with pytest.raises(InputError, match="tp_plan is 'all': give 'auto', or a dict"):
        load_model(folder, device="cpu", tp_plan="all")


@pytest.mark.slow
def test_two_processes_with_half_the_weights_each_write_one_file_like_one_process(tmp_path):
    folder, script = save_tiny(tmp_path / "tiny"), str(Path(__file__).parent / "sharded_run.py")
    two = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29619"]
    for name, launcher in (("one", []), ("two", two)):
        command = [sys.executable, *launcher, script, str(folder), str(tmp_path / name)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, again = (pv.load_vector(tmp_path / name / "v.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(again.directions, one.directions)
    assert (tmp_path / "two" / "r.jsonl").read_text() == (tmp_path / "one" / "r.jsonl").read_text()
    texts = [(tmp_path / "two" / f"steered-{rank}").read_text() for rank in (0, 1)]
    assert texts == [(tmp_path / "one" / "steered-0").read_text()] * 2
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "r.jsonl", "steered-0", "steered-1", "v.safetensors"
    ]  # fmt: skip


def test_the_cli_passes_how_a_model_is_loaded(tmp_path, asked):
    from persona_vectors.cli.options import load_by_name

    load_by_name(str(save_tiny(tmp_path / "tiny")), device="cpu", attn_implementation="eager")
    assert asked["attn_implementation"] == "eager"
