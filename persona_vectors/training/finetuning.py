"""Fine-tuning with the paper's settings, with or without steering, from a config: LoRA, loss on answers only."""

import json
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase, TrainerCallback

from persona_vectors.data.files import InputError
from persona_vectors.model.models import Model, chat_text, encode, encode_answer, load_model, model_name
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate
from persona_vectors.vectors.formats import import_vector
from persona_vectors.vectors.vector import PersonaVector

DEAD = {"finetuned_model_id", "load_in_4bit", "merge_before_push", "push_to_private", "lora_bias", "beta", "loss"}
DEAD |= {"train_on_responses_only", "is_peft", "test_file"}
"""Options of the official config that do nothing here."""


class Steering(BaseModel):
    """What is done to the activations while training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    steering_vector_path: Path
    """Our .safetensors, or the official .pt."""
    type: Literal["steer", "ablate"] = "steer"
    steering_coef: float = 1.0
    layer: int | tuple[int, ...] | Literal["all"] | None = None
    """Decoder blocks, from 0."""
    layers: tuple[int, ...] | None = None
    """The official form: rows of hidden_states, so that 20 is our 19."""
    positions: Literal["all", "labels"] = "all"

    @model_validator(mode="after")
    def _one(self) -> "Steering":
        if (self.layer is None) == (self.layers is None):
            raise ValueError("give either layer (blocks, from 0) or layers (the official count, from 1)")
        return self


class FinetuneConfig(BaseModel):
    """A training run. The names are the official training config's, the defaults the paper's (appendix D)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    training_file: str | tuple[str, ...]
    """JSONL, a conversation a line: {"messages": [{"role", "content"}, ...]}."""
    output_dir: str
    max_seq_length: int = 2048
    r: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.0
    use_rslora: bool = True
    target_modules: tuple[str, ...] | str = "all-linear"
    epochs: float = 1.0
    max_steps: int | None = None
    per_device_train_batch_size: int = Field(default=2, ge=1)
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    warmup_steps: int = 5
    learning_rate: float = 1e-5
    logging_steps: int = 1
    optim: str = "adamw_torch"
    weight_decay: float = 0.01
    lr_scheduler_type: str = "linear"
    seed: int = 0
    save_steps: int = 5000
    bf16: bool | None = None
    """Mixed precision; by default where there is a CUDA GPU."""
    report_to: tuple[str, ...] = ()
    steering_config: Steering | None = None


def load_config(path: str | Path) -> FinetuneConfig:
    """Read a training config: ours, or the official JSON. A warning names its options that do nothing here.

    Raises InputError, naming the field, where it is none.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}): a training config is one JSON object") from None
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> FinetuneConfig:
    """Return a config from a dictionary, as `load_config` does from a file."""
    if data.get("loss", "sft") != "sft":
        raise InputError(f"loss is {data['loss']!r}: only 'sft' is done here; for DPO use trl's DPOTrainer in pv.steer")
    dead, official = sorted(DEAD & set(data)), "enable_steering_during_training" in data
    kept = {key: value for key, value in data.items() if key not in DEAD and value is not None}
    if official and not kept.pop("enable_steering_during_training"):
        kept.pop("steering_config", None)
    if kept.get("optim", "").endswith("8bit"):
        kept["optim"] = "adamw_torch"
        dead.append(f"optim ({data['optim']}: adamw_torch is used)")
    if dead:
        warnings.warn(f"these options do nothing here, remove them: {', '.join(dead)}", stacklevel=3)
    try:
        config = FinetuneConfig.model_validate(kept)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise InputError(f"no training config: field {field}: {first['msg']}") from None
    if config.steering_config and config.steering_config.layers:
        ours = [layer - 1 for layer in config.steering_config.layers]
        warnings.warn(
            f"layers {list(config.steering_config.layers)} of the official config count from 1: decoder blocks {ours}, "
            "counted from 0, are edited; write layer instead of layers to count from 0",
            stacklevel=3,
        )
    return config


def training_rows(
    tokenizer: PreTrainedTokenizerBase, paths: Sequence[str | Path], *, max_length: int
) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `labels` of conversations in JSONL files; only the answers have labels.

    An answer's labels include the tokens that end its turn. Conversations are cut at `max_length` tokens; those whose
    answers lie behind it are left out, and a warning counts them.

    Raises InputError, with file and line, for a line that is no conversation.
    """
    rows, cut = [], 0
    for path in paths:
        with Path(path).open(encoding="utf-8") as file:  # not splitlines: JSON may hold U+2028 and U+0085 as they are
            for number, line in enumerate(file, start=1):
                if line.strip():
                    row = _row(tokenizer, line, f"{path}, line {number}")
                    row = {name: values[:max_length] for name, values in row.items()}
                    cut += all(label == -100 for label in row["labels"])
                    rows.append(row)
    rows = [row for row in rows if any(label != -100 for label in row["labels"])]
    if cut:
        warnings.warn(f"{cut} conversations have no answer within {max_length} tokens: left out", stacklevel=2)
    if not rows:
        raise InputError(f"nothing to train on in {', '.join(map(str, paths))}: give JSONL with messages")
    return rows


def _row(tokenizer: PreTrainedTokenizerBase, line: str, where: str) -> dict[str, list[int]]:
    try:
        messages = json.loads(line)["messages"]
        ends = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"]]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise InputError(f'{where} is no conversation: give {{"messages": [{{"role", "content"}}, ...]}}') from None
    if not ends or ends[0] == 0:
        raise InputError(f"{where} has no answer: give messages with role 'assistant' after a question")
    ids = encode(tokenizer, chat_text(tokenizer, messages))
    labels = [-100] * len(ids)
    for end in ends:
        prompt = chat_text(tokenizer, messages[:end], add_generation_prompt=True)
        upto = chat_text(tokenizer, messages[: end + 1])
        if not upto.startswith(prompt):
            raise InputError(f"{where}: the chat template's prompt {prompt!r} does not begin its text {upto!r}")
        before, answer = encode_answer(tokenizer, prompt, upto[len(prompt) :])
        if ids[: len(before) + len(answer)] != before + answer:
            raise InputError(f"{where}: the chat template rewrites earlier turns, so they cannot be trained together")
        labels[len(before) : len(before) + len(answer)] = answer
    return {"input_ids": ids, "labels": labels}


def finetune(
    config: FinetuneConfig,
    *,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> Any:
    """Train a LoRA adapter with trl's SFTTrainer and save it to the config's `output_dir`; returns the Trainer.

    `model` and `tokenizer` are loaded by the config's name unless given; a given model is wrapped in the adapter.
    `resume` goes on from the last checkpoint in `output_dir`.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if model is None or tokenizer is None:
        model, tokenizer = load_model(config.model)
    edit = _steering(model, config.steering_config)
    with ExitStack() as stack:
        opens = _OpensEdit(stack, edit)
        trainer = make_trainer(config, model, tokenizer, callbacks=[*callbacks, opens])
        trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir) if resume else None)
    trainer.save_model(config.output_dir)
    return trainer


class _OpensEdit(TrainerCallback):
    """Opens the steering at the first step: a run that has finished, and is resumed, takes none to steer."""

    def __init__(self, stack: ExitStack, edit: AbstractContextManager[None]) -> None:
        self.stack, self.edit = stack, edit
        self.opened = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.opened:
            self.stack.enter_context(self.edit)
            self.opened = True


def make_trainer(
    config: FinetuneConfig,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """Return the SFTTrainer of a config, the model wrapped in a new adapter; the config's steering is left to you."""
    try:
        from datasets import Dataset
        from peft import LoraConfig, get_peft_model
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install 'persona-vectors-toolkit[train]'") from None
    import torch
    from transformers import DataCollatorForSeq2Seq, set_seed

    paths = [config.training_file] if isinstance(config.training_file, str) else list(config.training_file)
    rows = training_rows(tokenizer, paths, max_length=config.max_seq_length)
    set_seed(config.seed)
    modules = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    adapter = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    arguments = SFTConfig(
        output_dir=config.output_dir,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        warmup_steps=config.warmup_steps,
        learning_rate=config.learning_rate,
        logging_steps=config.logging_steps,
        optim=config.optim,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.lr_scheduler_type,
        seed=config.seed,
        save_steps=config.save_steps,
        bf16=torch.cuda.is_available() if config.bf16 is None else config.bf16,
        use_cpu=model.device.type == "cpu",
        max_length=config.max_seq_length,
        report_to=list(config.report_to),
        gradient_checkpointing=False,
    )
    return SFTTrainer(
        model=get_peft_model(model, adapter),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=list(callbacks),
    )


def _steering(model: Model, steering: Steering | None) -> AbstractContextManager[None]:
    """Return the context manager that a config asks for, its vector loaded and checked."""
    if steering is None:
        return nullcontext()
    path = steering.steering_vector_path
    if path.suffix == ".safetensors":
        vector = PersonaVector.load(path)
    else:
        vector = import_vector(path, model=model_name(model), trait=path.stem)
    where: Any = steering.layer if steering.layer is not None else [k - 1 for k in steering.layers or ()]
    where = list(where) if isinstance(where, tuple) else where
    if steering.type == "ablate":
        return ablate(model, vector, layer=where, positions=steering.positions, during="training")
    options: dict[str, Any] = {"coef": steering.steering_coef, "positions": steering.positions, "during": "training"}
    return steer(model, vector, layer=where, **options)
