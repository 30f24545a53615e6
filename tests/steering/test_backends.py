import pytest
import torch
import zoo
from helpers import make_tokenizer, random_direction
from torch import nn

from persona_vectors.data.errors import InputError
from persona_vectors.extraction.difference import extract, extract_from
from persona_vectors.model.generation import generate
from persona_vectors.model.wrappers import unwrap
from persona_vectors.monitoring.projection import project
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer
from persona_vectors.steering.backends import lens_hooks, nnsight_block, steer_trace


def fake(module: str, **fields: object) -> object:
    """An object whose class looks as if `module` had defined it, one subclass away."""
    base = type("Wrapper", (), {"__module__": module})
    wrapper = type("Mine", (base,), {"__module__": "user"})()
    vars(wrapper).update(fields)
    return wrapper


def test_other_models_stay_as_they_are(model):
    assert unwrap(model) is model


def test_wrappers_are_known_by_the_package_of_their_type(model):
    assert unwrap(fake("nnsight.modeling.language", _module=model)) is model
    bridge = {"original_model": model, "compatibility_mode": True, "_weights_processed": False}
    assert unwrap(fake("transformer_lens.model_bridge", **bridge)) is model
    with pytest.raises(InputError, match="has processed weights"):
        unwrap(fake("transformer_lens.model_bridge", **(bridge | {"_weights_processed": True})))
    with pytest.raises(InputError, match="give a TransformerBridge"):
        unwrap(fake("transformer_lens"))
    with pytest.raises(InputError, match=r"has not loaded its weights: call model.dispatch\(\)"):
        unwrap(fake("nnsight", _module=nn.Linear(2, 2, device="meta")))


def numbers(model, tokenizer, trait, vector) -> dict[str, torch.Tensor]:
    """What extract, monitor, project and generate under steer give: everything a wrapped model must give as well."""
    made = extract(model, tokenizer, trait, judge=None, samples=2, max_new_tokens=6, min_pairs=1)
    conversations = [("How?", "Just so."), ("Why so?", "No idea.")]
    with monitor(model, vector, layer=1) as trace, steer(model, vector, layer=0, coef=0.5):
        answer = generate(model, tokenizer, "Who?", max_new_tokens=5, temperature=0)
    return {
        "extract": made.directions,
        "project": project(model, tokenizer, conversations, vector, layer=1).values,
        "monitor": trace.last.values,
        "generate": torch.tensor(list(answer.encode())),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert torch.cosine_similarity(found["extract"], expected["extract"]).min() >= 0.99999
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.fixture
def steered(model) -> torch.Tensor:
    with steer(model, random_direction(model), layer=[0, 1], coef=2.0), torch.no_grad():
        return model(**zoo.inputs(model)).logits


def test_nnsight_gives_the_same_numbers(model, tokenizer, trait, steered):
    nnsight = pytest.importorskip("nnsight.modeling.transformers")
    vector, inputs = random_direction(model), zoo.inputs(model)
    expected = numbers(model, tokenizer, trait, vector)
    wrapped = nnsight.TransformersModel(model, tokenizer=tokenizer)
    assert_same(numbers(wrapped, tokenizer, trait, vector), expected)
    with steer(wrapped, vector, layer=[0, 1], coef=2.0), wrapped.trace(inputs["input_ids"]):
        hooked = wrapped.output.logits.save()
    torch.testing.assert_close(hooked, steered, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bloom"])  # blocks that return a tensor, and a tuple
def test_steering_inside_an_nnsight_trace(name: str):
    nnsight = pytest.importorskip("nnsight.modeling.transformers")
    model = zoo.build(name)
    vector, inputs = random_direction(model), zoo.inputs(model)
    with steer(model, vector, layer=[0, 1], coef=2.0), torch.no_grad():
        expected = model(**inputs).logits
    wrapped = nnsight.TransformersModel(model, tokenizer=make_tokenizer())
    with wrapped.trace(inputs["input_ids"]):
        steer_trace(wrapped, vector, layer=[0, 1], coef=2.0)
        logits = wrapped.output.logits.save()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="layer 9 is out of range"):
        nnsight_block(wrapped, 9)
    with pytest.raises(InputError, match="is no nnsight model"):
        nnsight_block(model, 0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_transformer_lens_gives_the_same_numbers(name: str, trait):
    lens = pytest.importorskip("transformer_lens.model_bridge")
    model, tokenizer = zoo.build(name), make_tokenizer()
    tokenizer.bos_token = None  # the bridge would load the tokenizer again from its name, and this one has none
    vector, inputs = random_direction(model), zoo.inputs(model)
    expected = numbers(model, tokenizer, trait, vector)
    with steer(model, vector, layer=[0, 1], coef=2.0), torch.no_grad():
        steered = model(**inputs).logits
    bridge = lens.TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer, device="cpu")
    assert_same(numbers(bridge, tokenizer, trait, vector), expected)
    assert_same(numbers(model, tokenizer, trait, vector), expected)  # the plain model still works
    with steer(bridge, vector, layer=[0, 1], coef=2.0), torch.no_grad():
        torch.testing.assert_close(bridge(inputs["input_ids"]), steered, rtol=1e-4, atol=1e-4)
    hooked = bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=lens_hooks(vector, layer=[0, 1], coef=2.0))
    torch.testing.assert_close(hooked, steered, rtol=1e-4, atol=1e-4)
    bridge.enable_compatibility_mode()
    with pytest.raises(InputError, match="has processed weights"):
        extract_from(bridge, tokenizer, trait, [], judge=None)
