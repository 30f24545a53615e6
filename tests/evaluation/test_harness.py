import json
from dataclasses import replace

import pytest
from helpers import hooks, plain_logprob, random_direction

from persona_vectors.data.errors import InputError
from persona_vectors.evaluation.harness import side_effects
from persona_vectors.model.prompts import encode
from persona_vectors.steering.add import steer

pytestmark = pytest.mark.slow

ITEMS = [{"q": f"Is {word} good", "choices": ["yes it is", "no"], "gold": i % 2} for i, word in enumerate("abcdefgh")]
TASK = """\
task: tiny_offline
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_path(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(path=tmp_path / "items.jsonl"))
    return str(tmp_path / "tasks")


def accuracy(model, tokenizer) -> float:
    right = 0
    for item in ITEMS:
        prompt = encode(tokenizer, item["q"])
        options = [encode(tokenizer, f" {choice}") for choice in item["choices"]]
        scores = [plain_logprob(model, prompt, option) * len(option) for option in options]
        right += scores.index(max(scores)) == item["gold"]
    return right / len(ITEMS)


def test_the_table_is_the_plain_and_the_steered_model_s_accuracy(model, tokenizer, task_path):
    vector = replace(random_direction(model), trait="loud")
    expected = [accuracy(model, tokenizer)]
    with steer(model, vector, layer=1, coef=40.0):
        expected.append(accuracy(model, tokenizer))
    edit = steer(model, vector, layer=1, coef=40.0)
    (found,) = side_effects(model, tokenizer, edit, ["tiny_offline"], task_path=task_path)
    assert (found.task, found.metric) == ("tiny_offline", "acc")
    assert [found.before, found.after] == pytest.approx(expected)
    assert hooks(model) == 0


def test_an_unknown_task_is_named(model, tokenizer):
    with pytest.raises(InputError, match="lm-eval has no task 'no_such_task': give names such as 'mmlu'"):
        side_effects(model, tokenizer, steer(model, random_direction(model), layer=1, coef=1.0), ["no_such_task"])


@pytest.mark.parametrize("positions", ["prompt", "response"])
def test_positions_that_finished_text_does_not_tell_are_refused(positions, model, tokenizer, task_path):
    edit = steer(model, random_direction(model), layer=1, coef=1.0, positions=positions)
    with pytest.raises(InputError, match=f"positions='{positions}' is not known in a forward pass that reads finished"):
        side_effects(model, tokenizer, edit, ["tiny_offline"], task_path=task_path)
