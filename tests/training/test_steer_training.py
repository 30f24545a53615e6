"""Steering inside training: gradients, what is left alone, and that nothing is silently unsteered."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import zoo
from helpers import CHECKPOINTING, batch, block_output, hooks, logged, lora, make_trainer, random_direction
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_pre_hooks
from transformers import TrainerCallback, set_seed

from persona_vectors.data.errors import InputError
from persona_vectors.model.hooks import edit_blocks
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate, cap
from persona_vectors.vectors.vector import PersonaVector


def gradients(model) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def explicit_loss(model, inputs: dict[str, Tensor], layer: int, shift: Tensor) -> Tensor:
    """The forward pass written out block by block, with the addition as a term of its own."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = inner.model
    hidden = decoder.embed_tokens(inputs["input_ids"])
    positions = torch.arange(hidden.shape[1])[None]
    rotary = decoder.rotary_emb(hidden, positions)
    length = hidden.shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for index, block in enumerate(decoder.layers):
        hidden = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        if index == layer:
            hidden = hidden + shift
    logits = inner.lm_head(decoder.norm(hidden))
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())


# Gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("positions", ["all", "labels"])
def test_lora_gradients_equal_those_of_an_explicit_additive_term(model, checkpointing: str, positions: str):
    model, inputs, vector = lora(model).train(), batch(), random_direction(model)
    shift = 3.0 * vector.directions[1].expand(2, 6, -1).clone()
    if positions == "labels":
        shift[:, :2] = 0  # the loss counts the tokens from 3 on, and token 2 predicts the first of them
    reference = explicit_loss(model, inputs, 1, shift)
    reference.backward()
    expected = gradients(model)
    if CHECKPOINTING[checkpointing]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    with steer(model, vector, layer=1, coef=3.0, positions=positions):
        loss = model(**inputs).loss
        loss.backward()
    torch.testing.assert_close(loss, reference)
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) == 12
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    model(**inputs).loss.backward()
    plain = gradients(model)
    assert any((found[name] - plain[name]).abs().max() > 1e-3 for name in plain)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("verb", [steer, ablate, cap])
def test_recomputed_blocks_are_edited_as_their_own_pass_was(model, checkpointing: str, verb):
    """Other passes between a forward and its backward, as DPO's reference or a second batch, change nothing."""
    options = {steer: {"coef": 3.0}, ablate: {}, cap: {"limit": -0.5}}[verb]
    model, vector = model.train(), random_direction(model)
    first, second = batch(), batch(padding=2)

    def run(between: bool) -> dict[str, Tensor]:
        with verb(model, vector, layer=1, positions="labels", **options):
            losses = [model(**first).loss, model(**second).loss] if between else []
            if between:
                with torch.no_grad():
                    model(**{name: part[:1] for name, part in first.items()})
                sum(losses).backward()
            else:
                for inputs in (first, second):
                    model(**inputs).loss.backward()
        return gradients(model)

    expected = run(between=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    for name, value in run(between=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_labels_limit_the_edit_to_counted_tokens_and_those_that_predict_them(model):
    vector, inputs = random_direction(model), batch(padding=2)
    plain = block_output(model, 1, inputs)
    with steer(model, vector, layer=1, coef=1.0, positions="labels"):
        moved = (block_output(model, 1, inputs) - plain).abs().sum(-1) > 0
    assert moved.tolist() == [[False, False, True, True, True, True], [False, False, True, True, False, False]]
    with pytest.raises(InputError, match="positions='labels' needs the call to have labels"):
        with steer(model, vector, layer=1, coef=1.0, positions="labels"):
            model(input_ids=inputs["input_ids"])


# The stock Trainer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda model: model, lora, lambda model: lora(model, use_rslora=True)])
def test_a_coefficient_of_zero_is_bit_identical_to_no_steering(wrap, tmp_path):
    options = {"gradient_accumulation_steps": 2, "bf16": True, "eval_strategy": "steps", "eval_steps": 1}
    found = []
    for steered in (False, True):
        model = wrap(zoo.build("llama"))
        trainer = make_trainer(model, tmp_path, **options)
        if steered:
            with steer(model, random_direction(model), layer=1, coef=0.0):
                trainer.train()
        else:
            trainer.train()
        found.append((dict(model.named_parameters()), logged(trainer, "loss"), logged(trainer, "eval_loss")))
    plain, zero = found
    assert plain[1:] == zero[1:] and len(plain[2]) == 4
    assert all(torch.equal(value, zero[0][name]) for name, value in plain[0].items())


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_a_run_with_checkpointing_ends_at_the_same_weights(checkpointing: str, tmp_path):
    ends = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": CHECKPOINTING[checkpointing]},
    ):
        model = lora(zoo.build("llama"))
        trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=2, **options)
        with steer(model, random_direction(model), layer=[0, 2], coef=2.0, positions="labels"):
            trainer.train()
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


class Generates(TrainerCallback):
    """Answers a prompt at the end of each step, as evaluation callbacks do."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def on_step_end(self, args, state, control, model=None, **_):
        output = model.generate(
            input_ids=batch()["input_ids"],
            max_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        self.logits.append(torch.stack(output.logits))


@pytest.mark.parametrize("during", ["auto", "training", "always"])
def test_evaluation_and_generation_inside_the_run_are_unsteered_unless_asked(model, tmp_path, during: str):
    options = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 2}
    plain, generated = make_trainer(model, tmp_path, **options), [Generates(), Generates()]
    plain.add_callback(generated[0])
    plain.train()
    trainer = make_trainer(model, tmp_path, eval_on_start=during != "auto", **options)
    trainer.add_callback(generated[1])
    with steer(model, random_direction(model), layer=1, coef=8.0, during=during):
        trainer.train()
    assert all(a != b for a, b in zip(logged(trainer, "loss"), logged(plain, "loss")))
    expected = logged(plain, "eval_loss")[0]
    assert all((value == expected) == (during != "always") for value in logged(trainer, "eval_loss"))
    assert len(logged(trainer, "eval_loss")) == 2 + (during != "auto")
    same = [torch.equal(a, b) for a, b in zip(generated[0].logits, generated[1].logits)]
    assert same == [during != "always"] * 4


def test_evaluation_before_the_first_step_must_be_decided(model, tmp_path):
    trainer = make_trainer(model, tmp_path, eval_on_start=True)
    with pytest.raises(InputError, match="give during='training' to leave evaluation and generation alone"):
        with steer(model, random_direction(model), layer=1, coef=1.0):
            trainer.train()
    assert trainer.state.global_step == 0 and hooks(model) == 0
    with pytest.raises(InputError, match="during is 'eval': give one of auto, training, always"):
        with steer(model, random_direction(model), layer=1, coef=1.0, during="eval"):
            pass


def test_a_schedule_resumed_from_a_checkpoint_equals_the_uninterrupted_run(tmp_path):
    def run(folder: Path, resume: str | None, until: int, coefs: list[float]) -> dict[str, Tensor]:
        model = lora(zoo.build("llama"))
        vector = random_direction(model)
        trainer = make_trainer(model, folder, save_strategy="steps", save_steps=2)

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                control.should_training_stop |= state.global_step >= until

        trainer.add_callback(Stop())

        def coef() -> float:
            coefs.append(4.0 * trainer.state.global_step / trainer.state.max_steps)
            return coefs[-1]

        with steer(model, vector, layer=1, coef=coef):
            trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    whole: list[float] = []
    parts: list[float] = []
    expected = run(tmp_path / "whole", None, 4, whole)
    run(tmp_path / "parts", None, 2, parts)
    found = run(tmp_path / "parts", str(tmp_path / "parts" / "checkpoint-2"), 4, parts)
    assert whole == parts == [0.0, 1.0, 2.0, 3.0]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpoints_and_adapters_hold_no_trace(tmp_path):
    from safetensors.torch import load_file

    files = []
    for coef in (None, 2.0):
        model, folder = lora(zoo.build("llama")), tmp_path / str(coef)
        trainer = make_trainer(model, folder, max_steps=1, save_strategy="steps", save_steps=1)
        if coef:
            with steer(model, random_direction(model), layer=1, coef=coef):
                trainer.train()
        else:
            trainer.train()
        saved = folder / "checkpoint-1"
        files.append((sorted(p.name for p in saved.iterdir()), set(load_file(saved / "adapter_model.safetensors"))))
        assert hooks(model) == 0
    assert files[0] == files[1]


# Never silently unsteered --------------------------------------------------------------------------------------------


def unsteered_step(model, trainer, match: str, error: type[Exception] = RuntimeError, **options) -> None:
    """Check that training stops with the reason before a weight has changed."""
    before = copy.deepcopy(trainer.model.state_dict())
    with (
        pytest.raises(error, match=match),
        steer(model, random_direction(model), **{"layer": 1, "coef": 1.0} | options),
    ):
        trainer.train()
    assert trainer.state.global_step == 0 and hooks(model) == hooks(trainer.model) == 0
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_another_model_object_stops_before_the_first_optimizer_step(model, tmp_path):
    trainer = make_trainer(copy.deepcopy(model), tmp_path)
    unsteered_step(model, trainer, "block 1 never ran before this optimizer step.*call this same model object")


def test_a_block_that_is_not_called_stops_the_first_step(model, tmp_path):
    decoder, trainer = model.model, make_trainer(model, tmp_path)
    forward = decoder.forward

    def skipping(*args, **kwargs):
        every = decoder.layers
        decoder.layers = torch.nn.ModuleList([every[0], every[2]])
        try:
            return forward(*args, **kwargs)
        finally:
            decoder.layers = every

    decoder.forward = skipping
    unsteered_step(model, trainer, "block 1 never ran in this training step")


def test_a_model_that_was_compiled_before_is_steered_or_stops(model):
    """A compiled graph may not know hooks that were set after it was made."""
    step = torch.compile(model.train(), backend="eager")
    for _ in range(2):
        plain = step(**batch()).loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vector, before = random_direction(model), copy.deepcopy(model.state_dict())
    with steer(model, vector, layer=1, coef=8.0):
        expected = model(**batch()).loss
    stopped = ""
    try:
        with steer(model, vector, layer=1, coef=8.0):
            loss = step(**batch()).loss
            loss.backward()
            optimizer.step()
    except RuntimeError as error:
        stopped = str(error)
    if stopped:
        assert "block 1 never ran before this optimizer step" in stopped
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    else:
        torch.testing.assert_close(loss, expected)
        assert abs(loss - plain) > 1e-3


def test_wrong_layers_and_vectors_stop_before_training(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    unsteered_step(model, trainer, "layer 3 is out of range", InputError, layer=3)
    other = PersonaVector(trait="t", model="other", directions=torch.ones(3, 16))
    with (
        pytest.raises(InputError, match="does not fit a model of 3 layers x 32"),
        steer(model, other, layer=1, coef=1.0),
    ):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_crash_leaves_no_hook(model, tmp_path):
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise OSError("disk full")

    trainer = make_trainer(model, tmp_path, callbacks=[Crash()])
    with pytest.raises(OSError, match="disk full"), steer(model, random_direction(model), layer=1, coef=1.0):
        trainer.train()
    assert hooks(model) == 0
    assert not _global_optimizer_pre_hooks


def test_an_optimizer_of_other_weights_is_none_of_our_business(model):
    """A probe that is trained on steered activations inside the `with`."""
    probe = torch.nn.Linear(zoo.HIDDEN, 1)
    optimizer = torch.optim.SGD(probe.parameters(), lr=0.1)
    seen: list[Tensor] = []
    with steer(model, random_direction(model), layer=1, coef=1.0):
        with edit_blocks(model, {2: lambda hidden, _: seen.append(hidden.detach())}):
            model(**zoo.inputs(model))
        for _ in range(2):
            probe(seen[0]).mean().backward()
            optimizer.step()


def test_torch_compile_in_the_trainer_is_steered(tmp_path):
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = zoo.build("llama")
        trainer = make_trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, **options)
        with steer(model, random_direction(model), layer=1, coef=4.0):
            trainer.train()
        losses.append(logged(trainer, "loss") + logged(trainer, "eval_loss"))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-4)


def test_dpo_trains_steered_and_its_reference_stays_plain(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": f"How {i}?", "chosen": " Well.", "rejected": " Ill."} for i in range(4)]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "learning_rate": 0.0}
    first, left = [], []
    for coef in (None, 0.0, 8.0):
        set_seed(3)
        model = get_peft_model(zoo.build("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        args = DPOConfig(output_dir=str(tmp_path), logging_steps=1, bf16=False, save_strategy="no", beta=5.0, **options)
        data = Dataset.from_list(pairs)
        trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        edit = (
            steer(model, random_direction(model), layer=1, coef=coef, during="training") if coef is not None else None
        )
        with edit or nullcontext():
            trainer.train()
        first.append(logged(trainer, "loss")[0])
        left.append(hooks(model))
    # an untrained adapter is the reference, so that the loss is log 2 but for the steering of the policy alone
    assert first[0] == first[1] == pytest.approx(0.69315, abs=1e-5) and abs(first[2] - first[0]) > 1e-4
    assert left[0] == left[1] == left[2]  # checkpointing's own


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_rl_compares_steered_passes_with_steered_ones(tokenizer, tmp_path, adapter: bool):
    """At learning rate 0 the old log-probabilities, from passes without gradients, are the new ones: nothing clips."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    set_seed(3)
    model = zoo.build("llama")
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, num_generations=2, num_iterations=2,
        max_completion_length=6, learning_rate=0.0, report_to=[], use_cpu=True, bf16=False, logging_steps=1,
        beta=0.1 * adapter, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": f"How {i}?"} for i in range(8)])
    trainer = GRPOTrainer(
        model=model, reward_funcs=lambda completions, **_: [float(len(c)) for c in completions], args=args,
        train_dataset=data, processing_class=tokenizer,
    )  # fmt: skip
    with steer(trainer.model, random_direction(model), layer=1, coef=8.0, during="training"):
        trainer.train()
    clipped = [
        entry["clip_ratio/region_mean"] for entry in trainer.state.log_history if "clip_ratio/region_mean" in entry
    ]
    assert len(clipped) == 4 and max(clipped) == 0
    if adapter:  # the reference is plain: its adapters are off
        assert max(logged(trainer, "kl")) > 1e-4
