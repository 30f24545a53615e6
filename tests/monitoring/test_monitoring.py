import pytest
import torch
import zoo
from helpers import DECODERS, PROMPTS, block_outputs, generate, hooks, random_direction, two_vectors
from torch import Tensor, nn
from transformers import DynamicCache

from persona_vectors.data.errors import InputError
from persona_vectors.model.prompts import left_pad
from persona_vectors.monitoring import trace as trace_module
from persona_vectors.monitoring.columns import Columns
from persona_vectors.monitoring.trace import Trace, monitor
from persona_vectors.steering.add import steer
from persona_vectors.vectors.directions import projections
from persona_vectors.vectors.vector import PersonaVector


def expected(model: nn.Module, vector: PersonaVector, layer: int, row: list[int]) -> Tensor:
    """One finished text's projections, from plain hooks over the row alone."""
    return vector.project(block_outputs(model, row)[layer], layer=layer)


def assert_equal_to_the_finished_text(model: nn.Module, trace: Trace, vectors: list[PersonaVector], sequences: Tensor):
    width, copies = sequences.shape[1] - 5, len(sequences) // len(PROMPTS)
    for index, sequence in enumerate(sequences.tolist()):
        padding = width - len(PROMPTS[index // copies])
        state = block_outputs(model, sequence[padding:-1])[1]  # the last token is never read
        for vector in vectors:
            values, found = vector.project(state, layer=1), trace[vector.trait][index]
            assert found[:padding].isnan().all()
            torch.testing.assert_close(found[padding:], values, rtol=2e-4, atol=2e-4)
            answer, last = values[width - padding :].mean(), values[width - padding - 1]
            torch.testing.assert_close(trace.mean[vector.trait][index], answer, rtol=2e-4, atol=2e-4)
            torch.testing.assert_close(trace.prompt_last[vector.trait][index], last, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_values_are_those_of_the_finished_text(name: str):
    model = zoo.build(name)
    vectors = two_vectors(model)
    for options in ({"do_sample": False}, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}):
        for use_cache in (True, False):
            with monitor(model, vectors, layer=1, stops=[]) as trace:
                sequences = generate(model, use_cache=use_cache, **options)
            assert_equal_to_the_finished_text(model, trace, vectors, sequences)
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["t5", "bart", "t5gemma"])
def test_the_decoder_of_an_encoder_decoder_is_read(name: str):
    model = zoo.build(name)
    vector = random_direction(model)
    ids, mask = left_pad([[5, 6, 7], [8, 9, 10]], 0, "cpu")
    with monitor(model, vector, layer=1, stops=[]) as trace:
        sequences = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    with monitor(model, vector, layer=1) as whole, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=sequences[:, :-1])
    torch.testing.assert_close(trace["t"], whole["t"], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "bloom", "llava"])
def test_it_is_the_hidden_state_that_transformers_returns(name: str):
    model = zoo.build(name)
    vector, inputs = random_direction(model), zoo.inputs(model)
    with monitor(model, vector, layer=[0, 1]) as trace, torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        torch.testing.assert_close(trace[f"t@{layer}"], vector.project(states[layer + 1], layer=layer))


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_next", "bloom"])
def test_beams_are_followed(name: str, use_cache: bool):
    """Rows move between beams; with generate's beam_indices the values are those of the sequences it returns."""
    model = zoo.build(name)
    vector = random_direction(model)
    with monitor(model, vector, layer=1, stops=[]) as trace:
        options = {"num_beams": 4, "num_return_sequences": 3, "min_new_tokens": 0, "return_dict_in_generate": True}
        output = generate(model, use_cache=use_cache, output_scores=True, **options)
    found = trace.last.follow_beams(output.beam_indices)
    moved = output.beam_indices.diff(dim=1) != 0
    assert moved.any()
    for index, sequence in enumerate(output.sequences.tolist()):
        padding = 5 - len(PROMPTS[index // 3])
        length = 5 + int((output.beam_indices[index] >= 0).sum()) - 1
        values = expected(model, vector, 1, sequence[padding:length])
        torch.testing.assert_close(found["t"][index, padding:length], values, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(found.tokens[index, :length], output.sequences[index, :length])
        assert found["t"][index, length:].isnan().all()
    with pytest.raises(InputError, match=r"names row \d+, and this call read 12 rows"):
        trace.last.follow_beams(output.beam_indices + 99)


def test_many_vectors_at_many_layers(model):
    vectors = two_vectors(model)
    inputs = zoo.inputs(model)
    states = torch.stack([block_outputs(model, row.tolist()) for row in inputs["input_ids"]])
    for layer in ("all", [0, 2]):
        with monitor(model, vectors, layer=layer) as trace, torch.no_grad():
            model(**inputs)
        for index in trace.layers:
            for vector in vectors:
                values = vector.project(states[:, index], layer=index)
                torch.testing.assert_close(trace[f"{vector.trait}@{index}"], values)
    assert trace.layers == [0, 2] and len(trace.prompt_last) == 4


def test_a_trace_is_a_row_a_token(model):
    with monitor(model, two_vectors(model), layer=[0, 2], stops=[]) as trace:
        generate(model, [[5, 6, 7], [8]], max_new_tokens=3, min_new_tokens=3)
        generate(model, [[9]], max_new_tokens=2, min_new_tokens=2)
    rows = trace.rows()
    assert len(rows) == (3 + 2) + (1 + 2) + (1 + 1)  # the last token sampled is never read
    own = [row for row in rows if (row["call"], row["row"]) == (0, 1)]
    assert [(row["position"], row["part"]) for row in own] == [(0, "prompt"), (1, "answer"), (2, "answer")]
    assert own[0]["token"] == 8
    found = torch.tensor([row["t@2"] for row in own])
    assert torch.equal(found, trace.calls[0]["t@2"][1, 2:])


def test_right_padding_has_no_values(model):
    vector = random_direction(model)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with monitor(model, vector, layer=1) as trace, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    assert trace["t"].isnan().tolist() == [[False] * 3, [False, False, True]]
    torch.testing.assert_close(trace.prompt_last["t"][1], trace["t"][1, 1])
    assert trace.mean["t"].isnan().all()


def test_the_end_token_and_what_follows_are_in_no_mean(model):
    vector = random_direction(model)
    with monitor(model, vector, layer=1, stops=[]) as trace:
        answers = generate(model, max_new_tokens=8, min_new_tokens=8)[:, 5:]
    stop = int(answers[0, 3])
    column = answers[0].tolist().index(stop)
    with monitor(model, vector, layer=1, stops=[stop]) as stopped:
        generate(model, max_new_tokens=8, min_new_tokens=8)
    torch.testing.assert_close(stopped["t"][0, : 5 + column + 1], trace["t"][0, : 5 + column + 1], equal_nan=True)
    assert stopped["t"][0, 5 + column + 1 :].isnan().all()
    if column:
        torch.testing.assert_close(stopped.mean["t"][0], trace["t"][0, 5 : 5 + column].mean())


def test_the_end_tokens_are_the_models_by_default(model):
    with monitor(model, random_direction(model), layer=1) as trace:
        generate(model)
    assert trace.stops == (2,)
    model.generation_config.eos_token_id = [2, 9]
    with monitor(model, random_direction(model), layer=1) as trace:
        generate(model)
    assert trace.stops == (2, 9)


def test_each_call_is_kept_by_itself(model):
    """Turns that continue one cache are calls that read only what is new."""
    vector = random_direction(model)
    turns = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    text, cache = torch.zeros(1, 0, dtype=torch.long), None
    with monitor(model, vector, layer=1, stops=[]) as trace:
        for turn in turns:
            text = torch.cat([text, torch.tensor([turn])], dim=1)
            output = model.generate(
                input_ids=text, cache=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                pad_token_id=0, return_dict_in_generate=True,
            )  # fmt: skip
            text, cache = output.sequences, output.cache
        generate(model)
    assert len(trace.calls) == 4 and trace["t"].shape == (3, 9)
    values = torch.cat([call["t"] for call in trace.calls[:3]], dim=1)
    torch.testing.assert_close(values[0], expected(model, vector, 1, text[0, :-1].tolist()), rtol=2e-4, atol=2e-4)


def test_memory_grows_with_the_text(model):
    """What is kept is one number a token, vector and layer, in few tensors, until it is read."""
    vectors = two_vectors(model)
    with monitor(model, vectors, layer=[0, 2]) as trace:
        for _ in range(3):
            generate(model, [[5]], max_new_tokens=8, min_new_tokens=8)
    assert sum(part.numel() for call in trace._calls for part in call.values.fresh) == 3 * 8 * 2 * 2

    column, parts = Columns(), torch.randn(1, 700, 2)
    for index in range(700):
        column.add(parts[:, index : index + 1])
    assert len(column.fresh) < 256
    torch.testing.assert_close(column.read(), parts)
    column.add(parts)
    torch.testing.assert_close(column.read(), torch.cat([parts, parts], dim=1))
    assert column.fresh == []


def test_steps_are_projected_together_or_when_they_are_read(model, monkeypatch):
    vectors, made, seen = two_vectors(model), [], []

    def counted(states: Tensor, units: Tensor) -> Tensor:
        made.append(states.shape)
        return projections(states, units)

    monkeypatch.setattr(trace_module, "projections", counted)
    options = {"max_new_tokens": 71, "min_new_tokens": 71}
    with monitor(model, vectors, layer=[0, 1], stops=[]) as together:
        text = generate(model, [[5, 6]], **options)
    assert len(made) == 2 + 3  # the prompt's layers, and two times 32 steps and six
    with monitor(model, vectors, layer=[0, 1], stops=[], callback=lambda t: seen.append(t["t@0"][0, -1])) as alone:
        generate(model, [[5, 6]], **options)
    assert len(made) == 5 + 2 + 70
    for key in together.keys:
        torch.testing.assert_close(together[key], alone[key])
    torch.testing.assert_close(torch.stack(seen), together["t@0"][0, 1:])
    found = torch.stack([together[f"{vector.trait}@1"][0] for vector in vectors])
    wanted = torch.stack([expected(model, vector, 1, text[0, :-1].tolist()) for vector in vectors])
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=2e-4)


def test_fifty_turns_on_one_cache_keep_one_number_a_token_and_vector(model):
    vectors, cache, text = two_vectors(model), DynamicCache(), []
    turns = torch.randint(6, zoo.VOCAB, (50, 9), generator=torch.Generator().manual_seed(0)).tolist()
    with monitor(model, vectors, layer=1, stops=[]) as trace, torch.no_grad():
        for turn in turns:  # each turn's new tokens in one pass, and one more as if it were generated
            for tokens in (turn[:-1], turn[-1:]):
                text += tokens
                model(torch.tensor([tokens]), past_key_values=cache, attention_mask=torch.ones(1, len(text)))
    assert len(trace.calls) == 50
    assert sum(call.values.read().numel() for call in trace._calls) == 50 * 9 * 2
    values = torch.cat([call["t"] for call in trace.calls], dim=1)
    torch.testing.assert_close(values[0], expected(model, vectors[0], 1, text), rtol=2e-4, atol=2e-4)


def test_a_monitor_inside_a_steer_reads_after_the_edit_and_outside_it_before(model):
    vector, inputs = random_direction(model), zoo.inputs(model)
    shift = 2 * vector.directions[1].norm()
    with torch.no_grad():
        with monitor(model, vector, layer=1) as outside:
            with steer(model, vector, layer=1, coef=2.0), monitor(model, vector, layer=1) as inside:
                model(**inputs)
        with monitor(model, vector, layer=1) as plain:
            model(**inputs)
        with steer(model, vector, layer=0, coef=2.0), monitor(model, vector, layer=1) as downstream:
            model(**inputs)
        with steer(model, vector, layer=2, coef=2.0), monitor(model, vector, layer=1) as upstream:
            model(**inputs)
        with monitor(model, vector, layer=1) as late, steer(model, vector, layer=0, coef=2.0):
            model(**inputs)
    torch.testing.assert_close(outside["t"], plain["t"])
    torch.testing.assert_close(inside["t"], plain["t"] + shift)
    torch.testing.assert_close(late["t"], downstream["t"])
    traces = [outside, inside, plain, downstream, upstream, late]
    saw = ["before the edit", "after the edit", "unedited", "after the edit", "before the edit", "after the edit"]
    assert [trace.last.saw[1] for trace in traces] == saw
    assert repr(inside).endswith("2 rows x 5 tokens, 5 of them the prompt's; after the edit)")


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_the_alarm_fires_at_the_right_token(model, use_cache: bool):
    vector = random_direction(model)
    with monitor(model, vector, layer=1, stops=[]) as trace:
        generate(model, max_new_tokens=12, min_new_tokens=12, use_cache=use_cache)
    values = trace["t"][:, 5:].amax(dim=0)
    limit = values[:6].max() + 1e-3 if values[6:].max() > values[:6].max() + 1e-2 else values[0] - 1e-3
    column = int((values > limit).nonzero()[0])

    class Alarm(Exception):
        pass

    def alarm(running: Trace) -> None:
        if (running["t"][:, 5:] > limit).any():
            raise Alarm

    with pytest.raises(Alarm), monitor(model, vector, layer=1, callback=alarm, stops=[]) as stopped:
        generate(model, max_new_tokens=12, min_new_tokens=12, use_cache=use_cache)
    assert stopped["t"].shape[1] == 5 + column + 1
    torch.testing.assert_close(stopped["t"], trace["t"][:, : 5 + column + 1], equal_nan=True)
    assert hooks(model) == 0


def test_the_callback_comes_every_k_tokens_and_alone_reads(model):
    vector, widths = random_direction(model), []
    with monitor(model, vector, layer=[0, 2], every=2, callback=lambda t: widths.append(t["t@0"].shape[1])) as trace:
        generate(model, max_new_tokens=6, min_new_tokens=6)
    assert widths == [5, 7, 9]
    with monitor(model, vector, layer=[0, 2]) as trace:
        generate(model)
        assert not trace._calls[-1].values.moved


def test_a_callback_may_run_the_model(model):
    """Its own passes are neither read nor steered."""
    vector, seen = random_direction(model), []

    def callback(_: Trace) -> None:
        with monitor(model, vector, layer=1) as inner, torch.no_grad():
            model(**zoo.inputs(model))
        seen.append(inner["t"])

    for use_cache in (True, False):
        with monitor(model, vector, layer=1) as plain:
            generate(model, use_cache=use_cache)
        with steer(model, vector, layer=1, coef=0.0):
            with monitor(model, vector, layer=1, every=2, callback=callback) as trace:
                generate(model, use_cache=use_cache)
        assert len(trace.calls) == 1 and seen
        torch.testing.assert_close(trace["t"], plain["t"], equal_nan=True)
    assert len(seen) == 6


def test_an_error_in_a_pass_leaves_no_hook_and_a_trace_that_can_be_read(model):
    vector, calls = random_direction(model), []

    def broken(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError

    with monitor(model, vector, layer=[0, 1, 2]) as whole:
        generate(model)
    handle = model.model.layers[1].register_forward_hook(broken)
    with pytest.raises(MemoryError), monitor(model, vector, layer=[0, 1, 2]) as trace:
        generate(model)
    handle.remove()
    assert hooks(model) == 0
    for layer in range(3):  # three whole passes: the prompt's and two tokens'
        torch.testing.assert_close(trace[f"t@{layer}"], whole[f"t@{layer}"][:, :7], equal_nan=True)


def test_an_error_in_the_first_pass_leaves_an_empty_trace(model):
    with pytest.raises(IndexError), monitor(model, random_direction(model), layer=1) as trace:
        model(input_ids=torch.tensor([[9999]]))
    assert "nothing read yet" in repr(trace) and trace.calls == []
    with pytest.raises(InputError, match=r"this trace is empty: call the model"):
        trace["t"]


def test_bf16_is_projected_in_float32_also_inside_autocast():
    model = zoo.build("llama", torch.bfloat16)
    vector, inputs = random_direction(model), zoo.inputs(model)
    state = torch.stack([block_outputs(model, row.tolist())[1] for row in inputs["input_ids"]])
    with monitor(model, vector, layer=1) as trace, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert trace["t"].dtype == torch.float32
    unit = vector.directions[1:2] / vector.directions[1].norm()
    with torch.autocast("cpu", torch.bfloat16):
        inside = projections(state, unit)
    torch.testing.assert_close(inside[..., 0], vector.project(state, layer=1))


def test_training_is_not_disturbed(model):
    vector = random_direction(model)
    with monitor(model, vector, layer=1) as trace:
        model(**zoo.inputs(model)).logits.sum().backward()
    assert not trace["t"].requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_embeddings_can_be_the_input(model):
    vector, inputs = random_direction(model), zoo.inputs(model)
    with torch.no_grad(), monitor(model, vector, layer=1) as trace:
        model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
        model(**inputs)
    torch.testing.assert_close(trace.calls[0]["t"], trace.calls[1]["t"])
    assert (trace.calls[0].tokens == -1).all()


def other(trait: str, **fields: object) -> PersonaVector:
    fields = {"model": "m", "directions": torch.ones(3, 32)} | fields
    return PersonaVector(trait=trait, **fields)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        ([other("a"), other("b", model="n")], {"layer": 1}, "are of different models"),
        ([other("a", directions=torch.ones(3, 16))], {"layer": 1}, "does not fit a model of 3 layers x 32"),
        ([other("a")], {"layer": 3}, r"layer 3 is out of range: .* has layers 0 to 2"),
        ([other("a")], {"layer": []}, "no layer: give a number"),
        ([other("a"), other("a")], {"layer": 1}, "two vectors are called 'a': rename one"),
        ([other("a", directions=torch.zeros(3, 32))], {"layer": 1}, "is zero at layer 1"),
        ([], {"layer": 1}, "no vectors: give one PersonaVector or more"),
        ([other("a")], {"layer": 1, "every": 0}, "every is 0: give the number of tokens"),
        ([other("a")], {"layer": 1}, "saw no forward pass: call this same model"),
    ],
)
def test_bad_input_is_one_line(model, vectors: list, options: dict, message: str):
    with pytest.raises(InputError, match=message) as error, monitor(model, vectors, **options):
        pass
    assert "\n" not in str(error.value)
    assert hooks(model) == 0


def test_a_missing_name_says_which_there_are(model):
    with monitor(model, random_direction(model), layer=1) as trace, torch.no_grad():
        model(**zoo.inputs(model))
    with pytest.raises(InputError, match="this trace has no 'evil': it has 't'"):
        trace["evil"]
