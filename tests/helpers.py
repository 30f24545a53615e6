"""What several test files share."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from persona_vectors.cli.main import main
from persona_vectors.data.intervals import Interval
from persona_vectors.evaluation.served import Completion
from persona_vectors.model.blocks import decoder_layers, model_shape
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.prompts import decode, left_pad
from persona_vectors.vectors.controls import random_vector
from persona_vectors.vectors.uses import Use
from persona_vectors.vectors.vector import PersonaVector

DECODERS = [name for name in zoo.ARCHITECTURES if name not in ("t5", "bart", "t5gemma")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
CHECKPOINTING = {"none": None, "reentrant": {"use_reentrant": True}, "non-reentrant": {"use_reentrant": False}}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def block_output(model: nn.Module, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    """What a plain hook, set after ours, sees of block `layer`."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: object, output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def random_direction(model: nn.Module) -> PersonaVector:
    directions = torch.randn(model_shape(model), generator=torch.Generator().manual_seed(1))
    return PersonaVector(trait="t", model="m", directions=directions)


def use(purpose: str = "steer", layer: int = 1, **changes) -> Use:
    """A recommended use, made up."""
    fields = {"measure": "AUROC", "effect": Interval(0.7, 0.6, 0.8), "null": 0.55, "null_of": "the largest of 9"}
    fields |= {"evidence": True, "model": "m", "source": "pv.flag", "date": "2026-01-01"}
    return Use(purpose, layer, **{**fields, "coef": 2.0 if purpose == "steer" else None, **changes})


def save_tiny(folder: Path) -> Path:
    zoo.build("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def block_outputs(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """Every block's output for one row alone, [layer, token, hidden], from plain hooks."""
    blocks = next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == zoo.BLOCKS)
    states: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(states)[:, 0].float()


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Run the command line in this process; return what it wrote to standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    argv = [str(argument) for argument in arguments]
    with (
        mock.patch.object(sys, "argv", ["persona-vectors", *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        main()
    assert stop.value.code == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from persona_vectors.cli.main import main; main()", *map(str, arguments)]


def run_with_file_limit(arguments: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """Run a program for which the disk is full: no file that it writes can be longer than `size` bytes.

    Python would cut the bytecode that it keeps beside our modules too, silently, so it is told to keep none.
    """

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    environment = {**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(arguments, env=environment, preexec_fn=limit, capture_output=True, text=True, check=False)


def rows(count: int = 8, width: int = 6) -> list[dict[str, Tensor]]:
    """Training samples: random ids; the loss counts the tokens from the fourth on."""
    ids = torch.randint(3, zoo.VOCAB, (count, width), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    return [{"input_ids": i, "labels": label, "attention_mask": torch.ones_like(i)} for i, label in zip(ids, labels)]


def batch(padding: int = 0) -> dict[str, Tensor]:
    """Two samples, the second one with padding on its right."""
    pair = {name: torch.stack([row[name] for row in rows(2)]) for name in rows(1)[0]}
    if padding:
        pair["attention_mask"][1, -padding:] = 0
        pair["labels"][1, -padding:] = -100
    return pair


def lora(model, **options):
    """Wrap the model in LoRA with weights that are not zero, so that every part has a gradient."""
    from peft import LoraConfig, get_peft_model

    set_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return get_peft_model(model, config)


def make_trainer(model, folder: Path, callbacks=None, trainer=Trainer, **options):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 7,
    } | options
    set_seed(7)
    return trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows(),
        eval_dataset=rows(2),
        callbacks=callbacks or [],
    )


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def two_vectors(model: nn.Module) -> list[PersonaVector]:
    first = random_direction(model)
    return [first, random_vector(first, seed=3)]


def vectors_of_their_own(model: nn.Module) -> list[PersonaVector]:
    """Two vectors, "t" and "u", that no control of few seeds equals."""
    return [replace(random_vector(random_direction(model), seed=900 + i), trait="tu"[i]) for i in range(2)]


def generate(model: nn.Module, prompts: list[list[int]] = PROMPTS, **options):
    """Generate with the model's own method; at least and at most five tokens, unless told otherwise."""
    ids, mask = left_pad(prompts, 0, "cpu")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0, "do_sample": False} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model.generate(input_ids=ids, attention_mask=mask, **settings)


def logits_while_generating(model, ids: Tensor, mask: Tensor, **options) -> Tensor:
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **options,
    )
    return torch.stack(output.logits, dim=1)


def plain_logprob(model, prompt, answer) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(dim=-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer)) / len(answer)


def write(path: Path, records: list[dict]) -> Path:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), "utf-8")
    elif path.suffix == "":
        datasets.Dataset.from_list(records).save_to_disk(str(path))
    else:
        path.write_text("\n\n".join(map(json.dumps, records)), "utf-8")
    return path


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token a byte, 256 of them, and the six of SPECIALS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIALS + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def answered_elsewhere(model: nn.Module, tokenizer: PreTrainedTokenizerBase):
    """Return what gives the answers that the model itself gives, the last ones first, and counts them in `.rows`."""

    def elsewhere(prompts, seeds, max_new_tokens, temperature):
        for row in reversed(range(len(prompts))):
            options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": [seeds[row]]}
            [(ids, ended)] = generate_tokens(model, tokenizer, [prompts[row]], **options)
            elsewhere.rows += 1
            yield [Completion(row, decode(tokenizer, ids), ids, ended)]

    elsewhere.rows = 0
    return elsewhere
