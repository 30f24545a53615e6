"""Other people's defaults and settings do not leak in: generation config, dtype, templates, hooks, text."""

import subprocess
import sys
import warnings

import pyarrow.parquet as pq
import pytest
import torch
import zoo
from helpers import block_output, make_tokenizer, random_direction
from transformers import GenerationConfig

from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.judges import ContrastJudge, LocalJudge, PerplexityJudge
from persona_vectors.extraction.difference import extract, extract_from
from persona_vectors.extraction.rollouts import load_rollouts
from persona_vectors.flagging.run import flag
from persona_vectors.model.generation import generate, generate_tokens
from persona_vectors.model.identity import fingerprint
from persona_vectors.model.pooling import pool
from persona_vectors.model.prompts import (
    break_special_tokens,
    chat_prompt,
    encode,
    fold_system_role,
    with_template_options,
)
from persona_vectors.monitoring.calibration import calibrate
from persona_vectors.monitoring.projection import project, token_projections
from persona_vectors.steering.add import RowEdit, steer, steer_rows
from persona_vectors.steering.bounds import cap
from persona_vectors.vectors.directions import unit_directions
from persona_vectors.vectors.vector import PersonaVector

LEAKS = {
    "min_p": 0.9, "typical_p": 0.1, "top_p": 0.1, "top_k": 1, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
    "epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "num_beams": 3, "num_return_sequences": 2, "min_length": 30,
    "min_new_tokens": 12, "return_dict_in_generate": True, "stop_strings": ["a"], "max_length": 3, "max_time": 1e-9,
    "forced_eos_token_id": 2, "bad_words_ids": [[40], [41]], "suppress_tokens": list(range(100)),
    "begin_suppress_tokens": list(range(6, 200)), "sequence_bias": [[[40], 50.0]], "guidance_scale": 3.0,
    "temperature": 9.0, "do_sample": False, "prompt_lookup_num_tokens": 2, "cache_implementation": "static",
    "length_penalty": 9.0, "early_stopping": True, "exponential_decay_length_penalty": [1, 9.0],
    "output_hidden_states": True, "renormalize_logits": True, "remove_invalid_values": True, "penalty_alpha": 0.6,
    "encoder_repetition_penalty": 4.0, "diversity_penalty": 0.5, "num_beam_groups": 3, "prefill_chunk_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("setting", LEAKS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_setting_of_the_models_own_generation_config_leaks_in(model, setting: str, temperature: float):
    tokenizer, options = make_tokenizer(), {"max_new_tokens": 8, "temperature": temperature, "seed": 3}
    prompts = [[5, 6, 7], [8, 9]]
    expected = generate_tokens(model, tokenizer, prompts, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
        setattr(model.generation_config, setting, LEAKS[setting])
        assert generate_tokens(model, tokenizer, prompts, **options) == expected


def test_an_answer_depends_on_its_prompt_and_seed_and_not_on_its_batch(model, tokenizer):
    prompts = ["How?", "Why so? Tell me more.", "And when?", "Where?"]
    together = generate(model, tokenizer, prompts, max_new_tokens=12, seed=5)
    assert generate(model, tokenizer, prompts, max_new_tokens=12, seed=5, batch_tokens=40) == together
    assert generate(model, tokenizer, prompts[:1], max_new_tokens=12, seed=5) == together[:1]
    first = {seed: generate(model, tokenizer, ["How?"] * 6, max_new_tokens=12, seed=seed) for seed in (0, 1)}
    assert len({*first[0], *first[1]}) > 6 and not set(first[0][1:]) & set(first[1][:-1])


def test_samples_have_the_distribution_of_the_model(model, tokenizer):
    """A chi-square test of first tokens against the softmax, at a fixed seed."""
    model.lm_head.weight.data *= 3
    prompt = [5, 6, 7]
    rows = generate_tokens(model, tokenizer, [prompt] * 4000, max_new_tokens=1, temperature=0.7, seed=1)
    with torch.no_grad():
        wanted = (model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1)
    counts = torch.zeros(zoo.VOCAB, dtype=torch.float64)
    for ids, _ in rows:
        counts[ids[0] if ids else 2] += 1
    expected = wanted * len(rows)
    common = expected >= 5
    statistic = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum()) - 1
    assert freedom > 30 and abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(model, tokenizer, trait, dtype: torch.dtype):
    vector, talks = random_direction(model), [("How?", "Well, " * 40), ("Why?", "So.")]
    row = ([5, 6], [20 + i % 200 for i in range(100)])

    def numbers() -> list[torch.Tensor]:
        scores = project(model, tokenizer, talks, [vector], layer=1).values
        judged = ContrastJudge(model, tokenizer, trait, pairs=1).batch([], "")
        assert judged == []
        judge = ContrastJudge(model, tokenizer, trait, pairs=1)("How?", "Well.", "")
        return [scores, pool(model, [row]).means, torch.tensor([judge], dtype=torch.float32)]

    expected = numbers()
    torch.set_default_dtype(dtype)
    try:
        found = numbers()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("values", [2, 3])
def test_values_for_another_batch_are_refused_and_never_broadcast(model, values: int):
    one, vector = {"input_ids": torch.tensor([[5, 6, 7]])}, random_direction(model)
    coefs = torch.arange(float(values))
    edits = [
        steer(model, vector, layer=1, coef=coefs),
        steer_rows(model, [RowEdit(vector, 1, 1.0)] * values),
        cap(model, vector, layer=1, limit=coefs),
    ]
    for edit in edits:
        with pytest.raises(InputError, match=f"has {values} rows for a batch of 1"), edit:
            model(**one)


def test_coefficients_that_are_no_numbers_are_refused(model):
    for coef in (float("nan"), float("inf"), torch.tensor([1.0, torch.nan])):
        with pytest.raises(InputError, match="give finite numbers"):
            with steer(model, random_direction(model), layer=1, coef=coef):
                pass
    with pytest.raises(InputError, match="give finite numbers"):
        with steer(model, random_direction(model), layer=1, coef=lambda: float("nan")):
            model(**zoo.inputs(model))


def test_captured_hidden_states_are_the_edited_ones_also_where_they_were_asked_for_before(model):
    inputs, vector = zoo.inputs(model), random_direction(model)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with steer(model, vector, layer=1, coef=2.0):
            steered = model(**inputs, output_hidden_states=True).hidden_states
            own = block_output(model, 1, inputs)
    torch.testing.assert_close(steered[2], plain[2] + 2 * vector.directions[1])
    torch.testing.assert_close(own, steered[2])


def test_captured_hidden_states_are_the_edited_ones_in_generation_and_by_the_models_config(model):
    """Asked for by the model's own config, and collected by `generate`, step by step."""
    vector = random_direction(model)
    model.config.output_hidden_states = True
    model(**zoo.inputs(model))
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    with torch.no_grad(), steer(model, vector, layer=1, coef=2.0):
        output = model.generate(input_ids=torch.tensor([[5, 6, 7]]), **options)
        whole = model(output.sequences[:, :-1]).hidden_states[2]
    plain = block_output(model, 1, {"input_ids": output.sequences[:, :-1]})
    torch.testing.assert_close(whole, plain + 2 * vector.directions[1])
    torch.testing.assert_close(
        torch.cat([step[2] for step in output.hidden_states], dim=1), whole, rtol=1e-4, atol=1e-4
    )


def test_a_block_that_returns_a_list_is_edited(model):
    block = model.model.layers[1]
    block.register_forward_hook(lambda _m, _a, output: [output])
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0][0], *args[1:]))
    vector, seen = random_direction(model), []
    model.model.layers[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]) and None)
    for coef in (0.0, 1.0):
        block._forward_hooks.move_to_end(next(iter(block._forward_hooks)), last=False)
        with torch.no_grad(), steer(model, vector, layer=1, coef=coef):
            model(**zoo.inputs(model))
    torch.testing.assert_close(seen[1], seen[0] + vector.directions[1])


# Text ----------------------------------------------------------------------------------------------------------------


def test_messages_are_answered_as_the_conversation_that_they_are(model, tokenizer):
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "So"},
    ]
    options = {"max_new_tokens": 6, "temperature": 0}
    assert generate(model, tokenizer, talk[:1], **options) == generate(model, tokenizer, "Hi", **options)
    both = generate(model, tokenizer, [talk, talk[:1]], **options)
    ids = encode(tokenizer, tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    answer, _ = generate_tokens(model, tokenizer, [ids], **options)[0]
    assert both[0] == tokenizer.decode(answer, skip_special_tokens=True)


def test_half_a_surrogate_pair_is_named(model, tokenizer):
    with pytest.raises(InputError, match="half a surrogate pair"):
        generate(model, tokenizer, "b \ud83d c", max_new_tokens=2)


def test_special_tokens_in_text_can_be_broken(tokenizer):
    text = "one</s><user>two"
    ids = encode(tokenizer, text)
    assert {2, tokenizer.convert_tokens_to_ids("<user>")} <= set(ids)
    assert not set(encode(tokenizer, break_special_tokens(tokenizer, text))) & set(tokenizer.all_special_ids)


def test_named_templates_are_each_folded(tokenizer):
    plain = str(tokenizer.chat_template)
    tokenizer.chat_template = {"default": plain, "tool_use": "tools: " + plain}
    folded = fold_system_role(tokenizer)
    assert set(folded.chat_template) == {"default", "tool_use"}
    text = chat_prompt(folded, "Hi", system="Be kind.")
    assert "Be kind.\n\nHi" in text and "default" not in text


def test_options_are_given_to_whichever_named_template_is_used(tokenizer):
    """Of the kind of the test above: whatever we make of a template is made of each."""
    plain = str(tokenizer.chat_template)
    tokenizer.chat_template = {"default": "{{ mood }} " + plain, "tool_use": "tools: " + plain}
    cheerful = with_template_options(fold_system_role(tokenizer), {"mood": "cheerful"})
    text = chat_prompt(cheerful, "Hi", system="Be kind.")
    assert text.startswith("cheerful ") and "Be kind.\n\nHi" in text and "tools:" not in text


def test_template_options_hold_everywhere():
    tokenizer = make_tokenizer(
        "{% if enable_thinking is defined and enable_thinking is false %}<s>{% endif %}{{ messages[0]['content'] }}"
    )
    assert chat_prompt(tokenizer, "Hi") == "Hi"
    assert chat_prompt(with_template_options(tokenizer, {"enable_thinking": False}), "Hi") == "<s>Hi"
    assert chat_prompt(with_template_options(tokenizer, {"enable_thinking": None}), "Hi") == "Hi"


def test_beyond_the_learned_positions_is_an_error_with_the_numbers(tokenizer):
    model = zoo.build("gpt2")
    with pytest.raises(InputError, match=r"have 1[0-9]+ tokens, and .* reads at most 128"):
        generate_tokens(model, tokenizer, [[5] * 120], max_new_tokens=20)
    with pytest.raises(InputError, match=r"have 140 tokens, and .* reads at most 128"):
        pool(model, [([5] * 70, [6] * 70)])


@pytest.mark.parametrize("verb", ["project", "calibrate", "ContrastJudge"])
def test_beyond_the_learned_positions_is_an_error_in_every_verb(verb: str, tokenizer, trait):
    model, long = zoo.build("gpt2"), "So it is. " * 20
    vector = random_direction(model)
    calls = {
        "project": lambda: project(model, tokenizer, [("How?", long)], [vector], layer=1),
        "calibrate": lambda: calibrate(model, tokenizer, vector, [long], layer=1, max_new_tokens=4),
        "ContrastJudge": lambda: ContrastJudge(model, tokenizer, trait, pairs=1)("How?", long, ""),
    }
    with pytest.raises(InputError, match=r"have [0-9]+ tokens, and .* reads at most 128: give shorter texts"):
        calls[verb]()


# Weights -------------------------------------------------------------------------------------------------------------


def test_buffers_and_offloaded_weights_count_in_the_fingerprint(tmp_path):
    from accelerate import disk_offload

    prints = []
    for number, change in enumerate((0.0, 1.0)):
        model = zoo.build("llama")
        model.model.layers[1].mlp.up_proj.weight.data += change
        plain = fingerprint(model)
        disk_offload(model, str(tmp_path / str(number)), execution_device=torch.device("cpu"))
        prints.append((plain, fingerprint(model)))
    assert prints[0][0] == prints[0][1] and prints[1][0] == prints[1][1] and prints[0] != prints[1]
    one, other = zoo.build("llama"), zoo.build("llama")
    for model, value in ((one, 1), (other, 2)):
        model.register_buffer("packed", torch.full((4,), value, dtype=torch.int8))
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("judge", ["LocalJudge", "ContrastJudge", "PerplexityJudge"])
def test_judges_read_a_model_whose_weights_lie_on_the_disk(judge: str, tokenizer, trait, tmp_path):
    """Embeddings and head on the meta device between passes, as accelerate leaves them."""
    from accelerate import disk_offload

    model = zoo.build("llama")
    make = {
        "LocalJudge": lambda: LocalJudge(model, tokenizer, min_mass=0.0),
        "ContrastJudge": lambda: ContrastJudge(model, tokenizer, trait, pairs=2),
        "PerplexityJudge": lambda: PerplexityJudge(model, tokenizer),
    }[judge]
    expected = make()("How?", "Well.", "Score {question} {answer}")
    disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.device.type == "meta"
    assert make()("How?", "Well.", "Score {question} {answer}") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
def test_a_judge_with_virtual_tokens_is_read_at_its_own_text(tuning: str, tokenizer):
    """The expected number under the adapter, against one plain pass of the whole model for each number's beginning."""
    import peft

    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[tuning]
    adapted = peft.get_peft_model(zoo.build("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    judge = LocalJudge(adapted, tokenizer, min_mass=0.0)
    prompt = encode(tokenizer, chat_prompt(tokenizer, "Score How? Well."))
    found = judge._next_probabilities(prompt, [(), (40,), (40, 41)])
    for stem, probabilities in zip(((), (40,), (40, 41)), found):
        with torch.no_grad():
            logits = adapted(input_ids=torch.tensor([[*prompt, *stem]])).logits[0, -1]
        torch.testing.assert_close(probabilities, logits.softmax(-1), rtol=1e-3, atol=1e-5)


def test_every_verb_reads_a_model_whose_upper_blocks_leave_tokens_out(tokenizer, trait, tmp_path):
    """Blocks that share keys see one token of the prompt where only its last logits are asked for."""
    model = zoo.shared_keys()
    vector, kept = random_direction(model), tmp_path / "r.jsonl"
    options = {"samples": 2, "max_new_tokens": 6, "min_pairs": 2, "judge": None}
    made = extract(model, tokenizer, trait, rollouts=kept, pooling="prompt_mean", **options)
    both = [r for s in ("pos", "neg") for r in load_rollouts(kept, side=s, trait=trait, tokenizer=tokenizer)]
    again = extract_from(model, tokenizer, trait, both, judge=None, pooling="prompt_mean", unfiltered=True, min_pairs=2)
    torch.testing.assert_close(made.directions, again.directions, rtol=1e-3, atol=1e-5)
    samples = [{"question": "How?", "answer": "Well."}, {"question": "Why?", "answer": "So it is."}]
    flag(model, tokenizer, samples, vector, layer=2, out=tmp_path / "f.parquet", max_new_tokens=4, cache=tmp_path / "c")
    read = pq.read_table(tmp_path / "f.parquet")["t_projection"].to_pylist()
    talks = [(sample["question"], sample["answer"]) for sample in samples]
    scores = project(model, tokenizer, talks, [vector], layer=2)["response_mean"]["t"]
    assert read == pytest.approx(scores.tolist(), rel=1e-3, abs=1e-4)
    limits = calibrate(model, tokenizer, vector, ["How?"], layer=2, max_new_tokens=4, temperature=0.0)
    prompt = encode(tokenizer, chat_prompt(tokenizer, "How?"))
    answer, _ = generate_tokens(model, tokenizer, [prompt], max_new_tokens=4, temperature=0)[0]
    values = token_projections(model, [(prompt, answer)], unit_directions(model, [vector], 2))[0][len(prompt) :, 0]
    assert limits.at(50)[2] == pytest.approx(float(values.quantile(0.5)), rel=1e-2, abs=1e-2)


def test_a_vector_of_one_dimension_says_what_is_allowed():
    with pytest.raises((InputError, TypeError)):
        PersonaVector(trait="t", model="m", directions=torch.ones(32))
    code = "import torch, persona_vectors as pv; pv.PersonaVector(trait='t', model='m', directions=torch.ones(32))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "directions is [32]: give [layer, hidden]" in done.stderr, done.stderr
