"""Fine-tuning with the paper's settings, with or without steering, from a config: LoRA, loss on answers only."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from persona_vectors.data.errors import InputError
from persona_vectors.data.progress import pulse
from persona_vectors.data.samples import Source, Talk, read_talks
from persona_vectors.model.blocks import Model, model_name
from persona_vectors.model.loading import load_model
from persona_vectors.model.prompts import chat_text, encode, encode_answer, finished_turn
from persona_vectors.model.thoughts import edit_positions
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate
from persona_vectors.training.config import FinetuneConfig, Steering
from persona_vectors.vectors.imports import import_vector
from persona_vectors.vectors.vector import PersonaVector

MakesCallback = Callable[[Trainer], TrainerCallback]


def training_rows(
    tokenizer: PreTrainedTokenizerBase,
    data: Source | Sequence[Source],
    *,
    max_length: int,
    turns: str = "all",
    columns: tuple[str, str] | None = None,
    split: str = "train",
) -> list[dict[str, list[int]]]:
    """Return `input_ids` and `labels` of conversations in one source, or several; only the answers have labels.

    Sources and records are those of `flag`. Every answer is trained on, or the last of each conversation with
    `turns="last"`; an answer's labels include the tokens that end its turn. Where the chat template rewrites earlier
    turns, as those do that drop old thoughts, each answer is a row of its own after the prompt that its model saw.
    Rows are cut at `max_length` tokens; those whose answers lie behind it are left out, and a warning counts them.

    Raises InputError, with file and line, for a record that is no conversation.
    """
    several = isinstance(data, (list, tuple)) and all(isinstance(each, (str, Path)) for each in data)
    given: Any = data
    sources: list[Any] = list(given) if several else [given]
    rows, cut = [], 0
    for source in sources:
        for talk in read_talks(source, columns=columns, split=split):
            if isinstance(talk, InputError):
                raise talk
            try:
                whole_rows = _rows(tokenizer, talk, talk.chosen(turns))
            except InputError as error:
                raise InputError(f"{talk.where}: {error}") from None
            for whole in whole_rows:
                row = {name: values[:max_length] for name, values in whole.items()}
                cut += all(label == -100 for label in row["labels"])
                rows.append(row)
    rows = [row for row in rows if any(label != -100 for label in row["labels"])]
    if cut:
        warnings.warn(f"{cut} conversations have no answer within {max_length} tokens: left out", stacklevel=2)
    if not rows:
        raise InputError(f"nothing to train on in {', '.join(map(str, sources))}: give conversations with answers")
    return rows


def _rows(tokenizer: PreTrainedTokenizerBase, talk: Talk, answers: Sequence[int]) -> list[dict[str, list[int]]]:
    """Return a conversation's row, or a row for each answer where its text does not begin with that of its turns."""
    ids = encode(tokenizer, chat_text(tokenizer, talk.messages))
    labels, alone = [-100] * len(ids), []
    for end in [end for end in answers if talk.messages[end]["content"] or talk.messages[end].get("tool_calls")]:
        upto = chat_text(tokenizer, talk.messages[: end + 1])
        prompt = finished_turn(tokenizer, talk.messages, end)[0]
        before, answer = encode_answer(tokenizer, prompt, upto[len(prompt) :])
        alone.append({"input_ids": before + answer, "labels": [-100] * len(before) + answer})
        labels[len(before) : len(before) + len(answer)] = answer
    together = all(row["input_ids"] == ids[: len(row["input_ids"])] for row in alone)
    return [{"input_ids": ids, "labels": labels}] if together and alone else alone


@contextmanager
def _as_named_today() -> Iterator[None]:
    """Leave out transformers' warnings of a name that trl and peft still use: nobody here can act on them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)
        yield


@_as_named_today()
def finetune(
    config: FinetuneConfig,
    *,
    model: Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[TrainerCallback | MakesCallback] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Any:
    """Train a LoRA adapter with trl's SFTTrainer and save it to the config's `output_dir`; returns the Trainer.

    `model` and `tokenizer` are loaded by the config's name unless both are given; a given model is wrapped in the
    adapter. A callback that needs the Trainer is given as a function of it:
    `callbacks=[lambda trainer: pv.ProjectionCallback(trainer, vector, layer=20, questions=questions)]`.
    `resume` goes on from the last checkpoint in `output_dir`, `overwrite` starts anew over what is there.

    Raises InputError where `output_dir` holds something, and neither is asked for.
    """
    from transformers.trainer_utils import get_last_checkpoint

    folder = Path(config.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not resume and not overwrite:
        raise InputError(f"{folder} is not empty: resume (--resume) what is there, or overwrite (--overwrite) it")
    if (model is None) != (tokenizer is None):
        raise InputError("model and tokenizer belong together: give both, or neither to load the config's")
    if model is None or tokenizer is None:
        model, tokenizer = load_model(config.model)
    edit = steering_of(model, tokenizer, config.steering_config)
    with ExitStack() as stack:
        opens = _OpensEdit(stack, edit)
        trainer = make_trainer(config, model, tokenizer)
        for callback in [*callbacks, opens, _Substeps]:
            trainer.add_callback(callback if isinstance(callback, TrainerCallback) else callback(trainer))
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


class _Substeps(TrainerCallback):
    """Says on the Trainer's bar, which moves by steps, how many of a step's batches are done."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.done = trainer, 0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.done = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done += 1
        for callback in self.trainer.callback_handler.callbacks:
            if getattr(callback, "training_bar", None) is not None:
                pulse(f"batch {self.done} of {args.gradient_accumulation_steps}", on=callback.training_bar)


@_as_named_today()
def make_trainer(config: FinetuneConfig, model: Model, tokenizer: PreTrainedTokenizerBase) -> Any:
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
    reading: dict[str, Any] = {"turns": config.turns, "columns": config.columns}
    rows = training_rows(tokenizer, paths, max_length=config.max_seq_length, **reading)
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
    )


def steering_of(
    model: Model, tokenizer: PreTrainedTokenizerBase, steering: Steering | None
) -> AbstractContextManager[None]:
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
    options: dict[str, Any] = {"positions": edit_positions(tokenizer, steering.positions), "during": "training"}
    if steering.type == "ablate":
        return ablate(model, vector, layer=where, **options)
    return steer(model, vector, layer=where, coef=steering.steering_coef, **options)
