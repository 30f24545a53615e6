import contextlib
import json
import time

import helpers
import pytest
import torch
import zoo
from bench import extraction, flagging, generation, gpu, gpu_checks, inputs, measuring, peers, savings, training
from transformers import GenerationConfig

from persona_vectors.model import generation as generation_module
from persona_vectors.model import passes
from persona_vectors.model.blocks import decoder_layers
from persona_vectors.model.generation import Generated
from persona_vectors.model.pooling import POOLINGS, pool

ROWS = inputs.make_rows([[5, 6, 7], [8, 9, 10, 11, 12]], samples=3, answer_tokens=8, vocabulary=zoo.VOCAB)


def test_every_method_has_its_row(model, capsys):
    methods = extraction.extraction_methods(model, ROWS, batch_tokens=64)
    measuring.run_rounds(methods, 2, model.device)
    table = extraction.report_extraction(methods)
    names = [line["method"] for line in table]
    ours = ["bare forward", "ours", "ours, nothing shared", "official procedure"]
    assert names == [*ours, "repeng 0.4.0", "steering-vectors 0.12.2"]
    printed = capsys.readouterr().out
    for line in table:
        assert line["method"] in printed
        if "not installed" in line[""]:
            assert line["tokens/s"] is None and "pip install" in line[""]
        else:
            assert "failed" not in line[""]
            assert len(line["seconds"]) == 2 and line["tokens/s"] > 0
    assert table[0]["x bare"] == table[3]["x official"] == 1


def test_the_official_baseline_equals_ours_at_every_layer_but_the_last(model):
    theirs = peers.official(model, ROWS)
    means = torch.stack([torch.stack([torch.cat(layer) for layer in theirs[name]], dim=1) for name in POOLINGS], dim=1)
    found = pool(model, ROWS, poolings=POOLINGS).means
    torch.testing.assert_close(found[:, :, :-1], means[:, :, 1:-1], rtol=2e-4, atol=2e-5)
    assert not torch.allclose(found[:, :, -1], means[:, :, -1], atol=1e-2)  # theirs is taken after the final norm


def test_every_method_reads_as_many_tokens(model):
    rows, total = extraction.extraction_methods(model, ROWS, batch_tokens=64), sum(len(p) + len(a) for p, a in ROWS)
    assert all(abs(method.tokens - total) <= len(ROWS) / 2 for method in rows)
    assert len({len(prompt) for prompt, _ in inputs.even(ROWS)}) == 1
    assert len({tuple(prompt) for prompt, _ in inputs.unshared(ROWS)}) == len(ROWS)


def test_generation_is_measured_with_and_without_reading(model, tokenizer, capsys):
    methods = extraction.reading_methods(model, tokenizer, [[5, 6, 7], [8, 9]], new_tokens=3)
    measuring.run_rounds(methods, 1, model.device)
    table = extraction.report_generation(methods, methods[:2])
    assert [line["method"] for line in table] == ["generate", "one token more", "generate + reading"]
    assert table[2]["time x one token more"] > 0


def test_generation_is_measured_under_monitors_and_edits_step_by_step(model, capsys):
    block, parameters = model.model.layers[1], [id(p) for p in model.parameters()]
    twin = generation.twin_of(model)
    assert [id(p) for p in twin.parameters()] == parameters and twin.model.layers[1] is not block
    methods = generation.edited_generations(model)
    for method in methods:
        generation.time_steps((model, twin), [[5, 6, 7], [8, 9]], 3, 2, method)
    assert all(len(method.plain) == len(method.edited) == 6 for method in methods if not method.theirs)
    assert all(len(method.plain) == 6 or "No module named" in method.does for method in methods if method.theirs)
    table = generation.report_steps(methods)
    assert all(line["from"] <= line["overhead %"] <= line["to"] for line in table[:4])
    assert model.model.layers[1] is block and [id(p) for p in model.parameters()] == parameters
    assert not any(layer._forward_hooks for m in (model, twin) for layer in m.model.layers)


def test_the_measured_generation_is_that_of_generate(model):
    asked, plain = [], [[5, 6, 7], [8, 9, 10]]
    model.register_forward_pre_hook(lambda _, args, kwargs: asked.append(kwargs["input_ids"]), with_kwargs=True)
    list(generation.greedy_steps(model, plain, 4, contextlib.nullcontext()))
    read = torch.cat(asked, dim=1)
    ids = torch.tensor(plain)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(read, model.generate(input_ids=ids, generation_config=config)[:, :-1])


def test_flagging_is_measured_beside_the_bare_pass_and_the_official_projection(model, tokenizer):
    methods = flagging.flagging_methods(model, tokenizer, ROWS, new_tokens=3, batch_tokens=64, layer=1)
    measuring.run_rounds(methods, 1, model.device)
    assert [method.name for method in methods][1:3] == ["prompt_last", "official projection"]
    assert all(len(method.seconds) == 1 for method in methods)
    blocks, ran = decoder_layers(model), []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    methods[0].run(methods[0].rows)
    assert set(ran) == {0, 1} and decoder_layers(model) is blocks
    for handle in handles:
        handle.remove()


def test_an_error_in_other_peoples_code_is_their_result_and_in_ours_it_is_raised(model):
    def broken(_: object) -> None:
        raise RuntimeError("no such layer")

    theirs = measuring.Method("theirs", "", ROWS, broken, theirs=True)
    measuring.run_rounds([theirs], 1, model.device)
    assert theirs.does == "failed: RuntimeError: no such layer" and not theirs.seconds
    with pytest.raises(RuntimeError, match="no such layer"):
        measuring.run_rounds([measuring.Method("ours", "", ROWS, broken)], 1, model.device)


def test_training_is_measured_in_pairs_and_leaves_the_model_alone(model, capsys):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = training.training_steps(model, batch=2, tokens=6, steps=3)
    assert {name: len(values) for name, values in steps.items()} == {"plain": 3, "steered": 3}
    found = training.report_training(steps, training.probe_seconds(model, 6))
    assert found["callback every 10 steps"] > 0 and "median of 3 pairs" in capsys.readouterr().out
    training.training_steps(model, batch=1, tokens=4, steps=1, checkpointing=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not helpers.hooks(model) and not model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
def test_the_gpu_script_runs_every_section_at_a_tiny_shape(tmp_path, capsys):
    sizes = {"widths": "2,3", "new_tokens": 3, "pairs": 4, "answers": 10, "steps": 1, "rounds": 1}
    gpu.gpu(shape="tiny", device="cpu", only=",".join(gpu.SECONDS), minutes=30, out=tmp_path / "gpu.json", **sizes)
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "gpu.json").read_text())
    assert "failed" not in printed and "WRONG" not in printed
    assert all(found[name] for name in gpu.SECONDS)
    assert len(found["checks"]) == 9 and all(check["ok"] for check in found["checks"])
    assert [(line["method"], line["rows"]) for line in found["rollouts"][2:4]] == [("transformers", 2), ("ours", 3)]
    assert [len(line["edited"]) for line in found["hooks"]] == [4] * 6
    assert found["extraction"][-1]["least cosine"] > 0.99
    assert [line["method"] for line in found["training"]] == ["steered", "watched"]


def test_a_section_of_the_gpu_script_that_fails_or_takes_too_long_leaves_what_it_found(capsys):
    def slow(lines: list) -> None:
        lines.append({"first": 1})
        with contextlib.suppress(Exception):  # what other people's code may do
            time.sleep(60)

    def broken(_: list) -> None:
        raise ValueError("no\nsuch thing")

    assert gpu.run_section("slow", slow, 0.1) == [{"first": 1}, {"failed": "OutOfTime: cut off after 0 s"}]
    assert gpu.run_section("broken", broken, 5) == [{"failed": "ValueError: no"}]
    assert gpu.run_section("late", slow, -1.0) == [{"failed": "OutOfTime: no time left"}]
    assert "failed: ValueError: no\n" in capsys.readouterr().out


def test_the_gpu_checks_tell_an_edit_that_decoding_missed(model, capsys):
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    steered, plain = gpu_checks.Steered(model, prompts), gpu_checks.said(model, prompts, 4)
    with steered():
        edited = gpu_checks.said(model, prompts, 4)
    half = gpu_checks.Said(edited.tokens, torch.cat([edited.logits[:, :1], plain.logits[:, 1:]], dim=1))
    lines: list = []
    verdicts = gpu_checks.Verdicts(lines)
    verdicts.most("edited in the prompt alone", gpu_checks.apart(half, edited))
    verdicts.most("the same", gpu_checks.apart(edited, edited))
    verdicts.most("nothing to compare", float("nan"))
    assert [line["ok"] for line in lines] == [False, True, False]
    assert capsys.readouterr().out.startswith("WRONG edited in the prompt alone")


def test_each_saving_is_measured_with_and_without_on_the_same_answers(model, tokenizer, trait, monkeypatch):
    monkeypatch.setattr(passes, "WORTH", 2)
    ways = savings.sharing(model, tokenizer, trait, 2, [1, 3], 4)
    ways += savings.of_many_rows(model, tokenizer, trait, 2, 2, 9)
    assert [way.count for way in ways] == [2, 2, 2, 4, 4, 4]
    for way in ways:
        having = way.run()
        with way.without():
            without = way.run()
        if "judged" in way.work:
            assert without == pytest.approx(having, abs=1e-3)
        else:
            assert of_each_row(without) == of_each_row(having)
    assert passes.WORTH == 2
    line = savings.timed(ways[1], model, 2)
    assert line["a minute"] > 0 and line["from"] <= line["x"] <= line["to"]


def of_each_row(batches: list[Generated]) -> dict[int, tuple[list[int], bool]]:
    return {row: answer for batch in batches for row, answer in zip(batch.rows, batch.answers)}


def test_a_saving_is_left_out_where_it_would_be(model, tokenizer, trait):
    """Of many rows: no cache with room, no hook that takes rows out, and batches of a quarter."""
    place, leave, wide = savings.of_many_rows(model, tokenizer, trait, 2, 2, 3)
    for way, name in ((place, "room_in_cache"), (leave, "ended_rows_leave")):
        before = getattr(generation_module, name)
        with way.without():
            assert getattr(generation_module, name) is not before
        assert getattr(generation_module, name) is before
    assert len(wide.run()) == 1
    with wide.without():
        assert len(wide.run()) == 4
