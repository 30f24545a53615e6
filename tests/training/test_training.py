import sys
import warnings
from unittest import mock

import pytest
import torch
import zoo
from helpers import (
    CHECKPOINTING,
    batch,
    hooks,
    logged,
    lora,
    make_trainer,
    random_direction,
    rows,
    vectors_of_their_own,
)
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from persona_vectors.data.errors import InputError
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.steering.add import steer
from persona_vectors.training.watch import ProjectionCallback, penalize
from persona_vectors.vectors.moments import neutral_moments

PROMPTS = ["How?", "Why so?"]


def states(model, inputs: dict[str, Tensor], layer: int) -> Tensor:
    """Block outputs, [batch, token, hidden], by transformers' own means."""
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[layer + 1]


def probe(model, tokenizer, unit: Tensor) -> float:
    ids = [torch.tensor([encode(tokenizer, chat_prompt(tokenizer, prompt))]) for prompt in PROMPTS]
    return sum(float(states(model.eval(), {"input_ids": i}, 1)[0, -1] @ unit) for i in ids) / len(ids)


def watched(model, tokenizer, tmp_path, vector=None, *, watch=None, **options):
    """Return a trainer and its ProjectionCallback, which `watch` holds the arguments of."""
    trainer = make_trainer(model, tmp_path, **options)
    trainer.processing_class = trainer.callback_handler.processing_class = tokenizer
    callback = ProjectionCallback(trainer, vector, **watch) if watch else TrainerCallback()
    trainer.add_callback(callback)
    return trainer, callback


def test_probes_and_batches_are_logged_as_the_model_is(model, tokenizer, tmp_path):
    vector = random_direction(model)
    unit = vector.directions[1] / vector.directions[1].norm()
    first = probe(model, tokenizer, unit)
    before = hooks(model)  # transformers leaves some where hidden states were asked for
    watch = {"layer": 1, "questions": PROMPTS, "every": 2}
    still = {"learning_rate": 0.0, "per_device_train_batch_size": 8}
    trainer, callback = watched(model, tokenizer, tmp_path, vector, watch=watch, **still)
    with steer(model, vector, layer=1, coef=3.0):
        trainer.train()
    assert [row["step"] for row in callback.history] == [0, 2, 4]
    # the probes are the plain model's, the batch (here all samples) is read as it was steered
    everything = {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}
    read = states(model, {"input_ids": everything["input_ids"]}, 1)[everything["labels"] != -100]
    expected = float((read @ unit).mean() + 3.0 * vector.directions[1].norm())
    for row in callback.history:
        assert row["probe/t"] == pytest.approx(first, abs=1e-4)
    for row in callback.history[1:]:
        assert row["batch/t"] == pytest.approx(expected, abs=1e-3)
    assert logged(trainer, "probe/t") == [row["probe/t"] for row in callback.history]
    assert hooks(model) == before and model.training


def test_what_is_logged_reaches_where_the_trainer_reports(model, tokenizer, tmp_path, monkeypatch):
    """TensorBoard's callback, with a writer that notes what it is given; W&B's takes the same call and names."""
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.MagicMock())
    writer = mock.MagicMock()
    watch = {"layer": 1, "questions": PROMPTS, "every": 2}
    trainer, callback = watched(model, tokenizer, tmp_path, random_direction(model), watch=watch)
    trainer.add_callback(TensorBoardCallback(tb_writer=writer))
    trainer.train()
    written = [call.args for call in writer.add_scalar.call_args_list if call.args[0] == "train/probe/t"]
    assert written == [("train/probe/t", row["probe/t"], row["step"]) for row in callback.history]


def test_the_probe_moves_as_the_weights_do(model, tokenizer, tmp_path):
    vector = random_direction(model)
    watch = {"layer": [0, 1], "questions": PROMPTS, "every": 1}
    trainer, callback = watched(model, tokenizer, tmp_path, vector, watch=watch)
    trainer.train()
    unit = vector.directions[1] / vector.directions[1].norm()
    assert callback.history[-1]["probe/t@1"] == pytest.approx(probe(model, tokenizer, unit), abs=1e-4)
    assert abs(callback.history[-1]["probe/t@1"] - callback.history[0]["probe/t@1"]) > 1e-3


def test_random_directions_stand_beside_the_probes(model, tokenizer, tmp_path):
    """The shift since the first step of each of them, read by transformers' own means."""
    vector, states_at = vectors_of_their_own(model)[0], []
    reference = neutral_moments(model, tokenizer, layer=1)
    drawn = reference.random_vectors(vector, count=20)
    along = torch.stack([v.directions[1] / v.directions[1].norm() for v in [vector, *drawn]])
    questions = [*PROMPTS, "And when?"]
    ids = [torch.tensor([encode(tokenizer, chat_prompt(tokenizer, prompt))]) for prompt in questions]

    def read() -> Tensor:
        return torch.stack([states(model.eval(), {"input_ids": i}, 1)[0, -1] @ along.T for i in ids])

    states_at.append(read())
    watch = {"layer": 1, "questions": questions, "every": 4, "controls": 20}
    trainer, callback = watched(model, tokenizer, tmp_path, vector, watch=watch)
    trainer.train()
    moved = read() - states_at[0]
    effects = (moved.mean(dim=0) / moved.std(dim=0)).abs()
    first, last = callback.history
    assert "deviations/t" not in first and last["probe/t"] != first["probe/t"]
    assert abs(last["deviations/t"]) == pytest.approx(float(effects[0]), rel=1e-2)
    assert last["isotropic/t"] == pytest.approx(float((effects[1:11] < effects[0]).float().mean()))
    assert last["covariance/t"] == pytest.approx(float((effects[11:] < effects[0]).float().mean()))
    assert logged(trainer, "covariance/t") == [last["covariance/t"]]


def test_batches_alone_are_watched_without_a_tokenizer(model, tmp_path):
    trainer, callback = watched(model, None, tmp_path, random_direction(model), watch={"layer": 1, "every": 2})
    trainer.train()
    assert [list(row) for row in callback.history if row["step"]] == [["step", "batch/t"]] * 2


def test_the_callback_changes_no_weight(tokenizer, tmp_path):
    ends = []
    for watch in (False, True):
        model = zoo.build("llama")
        asked = {"layer": 1, "questions": PROMPTS, "every": 1, "controls": 20} if watch else None
        trainer, _ = watched(model, tokenizer, tmp_path, random_direction(model), watch=asked)
        trainer.train()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_threshold_warns_once_or_stops(model, tokenizer, tmp_path):
    vector, watch = random_direction(model), {"layer": 1, "questions": PROMPTS}
    trainer, _ = watched(model, tokenizer, tmp_path, vector, watch={**watch, "every": 1, "warn_at": 1e-4})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("a probe has moved by" in str(warning.message) for warning in caught) == 1
    trainer, _ = watched(model, tokenizer, tmp_path, vector, watch={**watch, "every": 2, "stop_at": 1e-4})
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_crash_in_the_forward_pass_leaves_no_hook(model, tokenizer, tmp_path, monkeypatch):
    trainer, _ = watched(model, tokenizer, tmp_path, random_direction(model), watch={"layer": 1, "every": 1})
    monkeypatch.setattr(model.model.layers[0], "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert hooks(model) == 0


def test_bad_options_say_what_is_allowed(model, tmp_path):
    vector, trainer = random_direction(model), make_trainer(model, tmp_path)
    with pytest.raises(InputError, match="every is 0"):
        ProjectionCallback(trainer, vector, layer=1, every=0)
    with pytest.raises(InputError, match="give questions="):
        ProjectionCallback(trainer, vector, layer=1, stop_at=1.0)
    with pytest.raises(InputError, match="over the probes: give two questions or more"):
        ProjectionCallback(trainer, vector, layer=1, questions=PROMPTS[:1], controls=20)
    trainer.add_callback(ProjectionCallback(trainer, vector, layer=1, questions=PROMPTS))
    with pytest.raises(InputError, match="no tokenizer to read the probe prompts with"):
        trainer.train()


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
def test_the_penalty_s_gradient_is_that_of_an_explicit_term(model, tmp_path, checkpointing: str):
    model, vector, inputs = lora(model), random_direction(model), batch()
    unit = vector.directions[1] / vector.directions[1].norm()
    trainer = make_trainer(model, tmp_path)
    output = model.train()(**inputs, output_hidden_states=True)
    read = output.hidden_states[2][inputs["labels"] != -100] @ unit
    expected = output.loss + 0.7 * ((read - 0.5) ** 2).mean()
    expected.backward()
    reference = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if CHECKPOINTING[checkpointing]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[checkpointing])
    trainer.current_gradient_accumulation_steps = 1
    before = hooks(model)
    with penalize(trainer, vector, layer=1, weight=0.7, target=0.5):
        loss = trainer.training_step(model, dict(inputs))
        assert trainer.compute_loss(model.eval(), dict(inputs)) == model(**inputs).loss  # evaluation is left alone
    torch.testing.assert_close(loss, expected.detach())
    for name, value in reference.items():
        torch.testing.assert_close(model.get_parameter(name).grad, value, rtol=1e-4, atol=1e-6)
    assert hooks(model) == before and "compute_loss" not in vars(trainer)


def test_the_penalty_brings_the_projection_to_its_target(model, tmp_path):
    vector = random_direction(model)
    unit = vector.directions[1] / vector.directions[1].norm()
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=2, max_steps=8)
    inputs = {"input_ids": batch()["input_ids"]}
    before = (states(model, inputs, 1) @ unit - 2.0).square().mean()
    with penalize(trainer, vector, layer=1, weight=20.0, target=2.0):
        trainer.train()
    assert (states(model.eval(), inputs, 1) @ unit - 2.0).square().mean() < 0.5 * before


def test_a_penalty_without_a_gradient_is_refused(model, tmp_path):
    trainer = make_trainer(model, tmp_path)
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="the penalty has no gradient here"):
        with penalize(trainer, random_direction(model), layer=1, weight=1.0):
            trainer.train()
    assert hooks(model) == 0 and "compute_loss" not in vars(trainer)
