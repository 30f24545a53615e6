import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from helpers import DECODERS, block_output, hooks, logits_while_generating, random_direction
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from persona_vectors.data.errors import InputError
from persona_vectors.model.devices import constant
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.prompts import chat_prompt, encode, left_pad
from persona_vectors.model.sampling import row_seed
from persona_vectors.monitoring.calibration import calibrate
from persona_vectors.monitoring.percentiles import Calibration
from persona_vectors.monitoring.trace import Trace, monitor
from persona_vectors.steering.add import steer
from persona_vectors.steering.bounds import ablate, cap, floor, steer_where
from persona_vectors.vectors.vector import PersonaVector


def before(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Random inputs, the plain output of block 1 for them, and its projections."""
    inputs = zoo.inputs(model, batch=3, tokens=7)
    plain = block_output(model, 1, inputs)
    return inputs, plain, random_direction(model).project(plain, layer=1)


def between(projection: Tensor) -> float:
    """A limit with half of the tokens on either side, and none on it."""
    ordered = projection.flatten().sort().values
    return float(ordered[9:11].mean())


@pytest.mark.parametrize("name", DECODERS)
def test_a_cap_and_a_floor_bound_every_token_and_leave_the_others_bit_identical(name: str):
    model = zoo.build(name)
    inputs, plain, projection = before(model)
    vector, limit = random_direction(model), between(projection)
    for verb, inside in ((cap, projection <= limit), (floor, projection >= limit)):
        with verb(model, vector, layer=1, limit=limit):
            edited = block_output(model, 1, inputs)
        found = vector.project(edited, layer=1)
        assert inside.any() and not inside.all()
        assert torch.equal(edited[inside], plain[inside])
        scale = 1e-5 * plain.norm(dim=-1).max()
        assert ((found - limit) * (1 if verb is cap else -1)).max() <= scale
        torch.testing.assert_close(found[~inside], torch.full_like(found[~inside], limit), rtol=0, atol=float(scale))
        unit = vector.directions[1] / vector.directions[1].norm()
        rest, kept = edited - found[..., None] * unit, plain - projection[..., None] * unit
        torch.testing.assert_close(rest, kept, rtol=1e-4, atol=float(scale))  # nothing else has moved
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma3"])
def test_caps_and_floors_in_bfloat16(name: str):
    model = zoo.build(name, torch.bfloat16)
    inputs, plain, projection = before(model)
    vector, limit = random_direction(model), between(projection)
    tolerance = 2 * torch.finfo(torch.bfloat16).eps * float(plain.float().norm(dim=-1).max())
    for verb, sign, inside in ((cap, 1, projection <= limit), (floor, -1, projection >= limit)):
        with verb(model, vector, layer=1, limit=limit):
            edited = block_output(model, 1, inputs)
        assert edited.dtype == plain.dtype and torch.equal(edited[inside], plain[inside])
        assert (sign * (vector.project(edited, layer=1) - limit)).max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "bloom", "mixtral", "mamba", "gemma3"])
def test_ablation_leaves_a_projection_of_zero(name: str, dtype: torch.dtype):
    model = zoo.build(name, dtype)
    inputs, plain, projection = before(model)
    vector = random_direction(model)
    with ablate(model, vector, layer=1):
        edited = block_output(model, 1, inputs)
    tolerance = torch.finfo(plain.dtype).eps * plain.float().norm(dim=-1).max()
    assert edited.dtype == plain.dtype  # some keep their residual stream in float32
    assert vector.project(edited, layer=1).abs().max() <= tolerance < projection.abs().max()


def test_each_row_and_each_layer_can_have_its_own_limit(model):
    inputs, _, projection = before(model)
    vector = random_direction(model)
    limits = projection.amin(dim=1) + 0.1
    with cap(model, vector, layer=1, limit=limits):
        rows = vector.project(block_output(model, 1, inputs), layer=1)
    torch.testing.assert_close(rows, projection.minimum(limits[:, None]), rtol=1e-4, atol=1e-4)
    with cap(model, vector, layer=[0, 2], limit={0: 0.0, 2: -0.5}):
        first, last = (vector.project(block_output(model, k, inputs), layer=k) for k in (0, 2))
    assert first.max() < 1e-4 and last.max() < -0.5 + 1e-4


def test_every_layer_can_be_ablated(model):
    inputs, vector = zoo.inputs(model), random_direction(model)
    with ablate(model, vector, layer="all"):
        for layer in range(3):
            assert vector.project(block_output(model, layer, inputs), layer=layer).abs().max() < 1e-4


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_the_cache_and_the_rest_of_the_batch_change_nothing(name: str, positions: str):
    model = zoo.build(name)
    vector, prompts = random_direction(model), [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    ids, mask = left_pad(prompts, 0, "cpu")
    with floor(model, vector, layer=1, limit=3.0, positions=positions):
        cached = logits_while_generating(model, ids, mask, use_cache=True)
        uncached = logits_while_generating(model, ids, mask, use_cache=False)
        alone = [logits_while_generating(model, *left_pad([prompt], 0, "cpu")) for prompt in prompts]
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cached, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (cached - logits_while_generating(model, ids, mask)).abs().max() > 1e-3


def test_a_mask_chooses_tokens(model):
    inputs, plain, _ = before(model)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 2] = True
    with ablate(model, random_direction(model), layer=1, positions=mask):
        moved = (block_output(model, 1, inputs) != plain).any(dim=-1)
    assert torch.equal(moved, mask)


def test_gradients_flow_through_the_projection_out(model):
    vector = random_direction(model)
    with ablate(model, vector, layer=1):
        model(**zoo.inputs(model)).logits.sum().backward()
    grad = model.model.layers[1].mlp.down_proj.weight.grad
    assert grad.abs().sum() > 0
    assert (vector.directions[1] / vector.directions[1].norm() @ grad).abs().max() < 1e-3 * grad.abs().max()


def test_edits_nest_and_a_monitor_inside_sees_their_result(model):
    inputs, _, projection = before(model)
    vector = random_direction(model)
    with torch.no_grad(), steer(model, vector, layer=1, coef=1.0), cap(model, vector, layer=1, limit=2.0):
        with monitor(model, vector, layer=1) as trace:
            model(**inputs)
    expected = (projection + vector.directions[1].norm()).clamp(max=2.0)
    torch.testing.assert_close(trace["t"], expected, rtol=1e-4, atol=1e-4)
    assert trace.last.saw == {1: "after the edit"}


def test_steering_where_a_projection_crosses_a_threshold(model):
    inputs, plain, projection = before(model)
    vector, limit = random_direction(model), between(projection)
    with steer_where(model, vector, layer=1, coef=-2.0, when=lambda p: p > limit):
        edited = block_output(model, 1, inputs)
    where = projection > limit
    assert torch.equal(edited[~where], plain[~where])
    torch.testing.assert_close(edited[where], plain[where] - 2 * vector.directions[1])
    other = PersonaVector(trait="o", model="m", directions=-vector.directions)
    with steer_where(model, vector, layer=1, coef=-2.0, watch=other, when=lambda p: p > -limit):
        watched = block_output(model, 1, inputs)
    assert torch.equal((watched != plain).any(dim=-1), projection < limit)
    with pytest.raises(InputError, match=r"when= returned torch.float32 \[3, 7\]: return a bool for each"):
        with steer_where(model, vector, layer=1, coef=-2.0, when=lambda p: p):
            model(**inputs)


def test_calibration_is_the_percentiles_of_the_answers_tokens(model, tokenizer, tmp_path):
    vector, prompts = random_direction(model), ["How?", "Tell me more.", "Why"]
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 4}
    found = calibrate(model, tokenizer, vector, prompts, layer=[0, 1], percentiles=[95, 5, 50], **options)
    order = [1, 0, 2]  # the longest first, as in the batch
    encoded = [encode(tokenizer, chat_prompt(tokenizer, prompts[i])) for i in order]
    with monitor(model, vector, layer=[0, 1], stops=[2]) as trace:
        answers = generate_tokens(model, tokenizer, encoded, max_new_tokens=13, seed=[row_seed(4, i) for i in order])
    tokens = sum(min(len(ids), 12) for ids, _ in answers)
    assert (found.tokens, found.prompts, found.percentiles) == (tokens, 3, (5.0, 50.0, 95.0))
    for layer in (0, 1):
        values = trace[f"t@{layer}"][trace.last.answer]
        wanted = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95])).tolist()
        assert [found.at(p)[layer] for p in (5, 50, 95)] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    path = tmp_path / "t.calibration.json"
    found.save(path)
    assert Calibration.load(path) == found
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with cap(model, vector, layer=[0, 1], limit=found.at(50)), monitor(model, vector, layer=[0, 1]) as capped:
        generate_tokens(model, tokenizer, encoded, max_new_tokens=5)
    values = capped["t@1"]
    assert values[~values.isnan()].max() <= found.at(50)[1] + 1e-4


def test_a_calibrated_alarm(model, tokenizer):
    vector = random_direction(model)
    limit = calibrate(model, tokenizer, vector, ["How?"], layer=1, max_new_tokens=8).at(50)[1]
    alarms: list[int] = []

    def alarm(trace: Trace) -> None:
        if trace["t"][:, -1].max() > limit:
            alarms.append(trace["t"].shape[1])

    with monitor(model, vector, layer=1, callback=alarm, stops=[]) as trace:
        generate_tokens(model, tokenizer, [encode(tokenizer, "How?")], max_new_tokens=8)
    over = (trace["t"][0, 3:] > limit).nonzero()[:, 0]
    assert alarms == (over + 4).tolist()


@pytest.mark.parametrize("verb", [cap, floor])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 1}, r"needs limit=: a projection, or a calibration's, calibrate\(...\).at\(95\)"),
        ({"layer": 3, "limit": 1.0}, "layer 3 is out of range"),
        ({"layer": [0, 1], "limit": {1: 2.0}}, "limit has no value for layer 0: it has 1"),
        ({"layer": 1, "limit": float("nan")}, "is nan at layer 1"),
        ({"layer": 1, "limit": 1.0, "positions": "answer"}, "give one of all, prompt, response"),
    ],
)
def test_bad_input_is_one_line(model, verb, options: dict, message: str):
    with pytest.raises(InputError, match=message) as error, verb(model, random_direction(model), **options):
        pass
    assert "\n" not in str(error.value)
    assert hooks(model) == 0


def test_a_vector_of_another_size_does_not_fit(model):
    with pytest.raises(InputError, match="does not fit a model of 3 layers x 32"):
        with ablate(model, PersonaVector(trait="t", model="m", directions=torch.ones(3, 16)), layer=1):
            pass


def test_bad_calibrations_say_what_to_do(model, tokenizer, tmp_path):
    vector, path = random_direction(model), tmp_path / "t.json"
    for prompts, percentiles in (([], [50]), (["a"], []), (["a"], [101])):
        with pytest.raises(InputError, match="needs one question or more, and percentiles from 0 to 100"):
            calibrate(model, tokenizer, vector, prompts, layer=1, percentiles=percentiles)
    with pytest.raises(InputError, match=r"no calibration file .*: make one with calibrate"):
        Calibration.load(path)
    good = Calibration("t", "m", (1,), (50.0,), ((1.5,),), 1, 3, 8, 1.0, 0)
    with pytest.raises(InputError, match="percentile 95 was not calibrated: this file has 50"):
        good.at(95)
    good.save(path)
    fields = json.loads(path.read_text())
    for broken in ("", "[]", "{}", json.dumps(fields | {"values": [[1.0, 2.0]]}), json.dumps(fields | {"layers": 4})):
        path.write_text(broken)
        with pytest.raises(InputError, match="calibrate again"):
            Calibration.load(path)


EDITS = {
    "cap": lambda model, v: cap(model, v, layer=1, limit=0.1),
    "cap by row": lambda model, v: cap(model, v, layer=[0, 1], limit=torch.tensor([0.1, 0.2])),
    "floor by layer": lambda model, v: floor(model, v, layer=[0, 1], limit={0: 0.1, 1: 0.2}),
    "ablate": lambda model, v: ablate(model, v, layer=1),
    "steer": lambda model, v: steer(model, v, layer="all", coef=2.0, positions="response"),
    "steer by row": lambda model, v: steer(model, v, layer=1, coef=torch.tensor([0.5, 1.0])),
    "steer on a schedule": lambda model, v: steer(model, v, layer=1, coef=lambda: 2.0),
    "steer_where": lambda model, v: steer_where(model, v, layer=1, coef=2.0, when=lambda p: p > 0.0),
}


class FromHost(TorchDispatchMode):
    """Counts what is taken from the host to a model on the meta device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        from_host = any(isinstance(a, Tensor) and a.device.type == "cpu" for a in args)
        self.count += from_host and isinstance(made, Tensor) and made.device.type == "meta"
        return made


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_nothing_is_copied_from_the_host_after_the_first_pass(model, edit: Callable, monkeypatch):
    vector = random_direction(model)
    model.to("meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no meta device
    one = torch.zeros(2, 1, dtype=torch.long, device="meta")
    counts = []
    with edit(model, vector), torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(input_ids=one, cache=cache)
        for _ in range(2):
            with FromHost() as host:
                model(input_ids=one, cache=cache)
            counts.append(host.count)
    assert counts == [0, 0]
    with edit(model, vector), torch.inference_mode(), FromHost() as host:  # the count can be other than zero
        model(input_ids=one, cache=DynamicCache(config=model.config))
    assert host.count > 0


def test_a_constant_is_as_asked_for_and_serves_a_training_step_after_a_generation():
    values = torch.randn(4)
    on = constant(values)
    with torch.inference_mode():
        half = on(values.device, torch.bfloat16)
    assert not half.is_inference() and torch.equal(half, values.bfloat16())
    assert on(values.device, torch.bfloat16) is half
    assert torch.equal(on(values.device), values)
    assert on(torch.device("meta")).device.type == "meta"
