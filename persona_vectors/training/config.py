"""The config of a training run: ours, or the official JSON."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from persona_vectors.data.checks import first_fault
from persona_vectors.data.errors import InputError

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
    positions: Literal["all", "labels", "answer", "reasoning"] = "all"
    """Of what the loss counts, "answer" and "reasoning" are a thinking model's part alone: see `Span`."""

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
    """Conversations, in any format that `flag` reads: JSONL, JSON, CSV, Parquet, a dataset folder or a Hub id."""
    columns: tuple[str, str] | None = None
    """The prompt's column and the answer's, such as a side of preference data; see `read_samples`."""
    turns: Literal["last", "all"] = "all"
    """Which of a conversation's answers are trained on."""
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
        raise InputError(f"no training config: {first_fault(error)}") from None
    if config.steering_config and config.steering_config.layers:
        ours = [layer - 1 for layer in config.steering_config.layers]
        warnings.warn(
            f"layers {list(config.steering_config.layers)} of the official config count from 1: decoder blocks {ours}, "
            "counted from 0, are edited; write layer instead of layers to count from 0",
            stacklevel=3,
        )
    return config
