"""What an edit costs: lm-eval's tasks on the plain and the edited model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model


class SideEffect(NamedTuple):
    """One task's score before and after an edit."""

    task: str
    metric: str
    before: float
    after: float
    stderr: float
    """Of the score before."""


def side_effects(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    edit: AbstractContextManager,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    task_path: str | None = None,
) -> list[SideEffect]:
    """Run lm-eval tasks on the model as it is, and again inside `edit`, such as `pv.steer(...)`.

    `limit` takes only the first items of each task; `task_path` is a folder with task files of your own. An edit with
    `positions="all"` also edits the questions, since lm-eval reads finished text.

    Raises InputError where lm-eval is missing or knows no such task.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("side_effects needs lm-eval: pip install 'persona-vectors-toolkit[lm-eval]'") from None
    manager = TaskManager(include_path=task_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown or not tasks:
        raise InputError(
            f"lm-eval has no task {', '.join(map(repr, unknown)) or '(none was given)'}: give names such as 'mmlu', or "
            "task_path= with the folder of your own"
        )
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def run() -> dict[str, dict[str, Any]]:
        done = lm_eval.simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0)
        return done["results"]

    before = run()
    with edit:
        after = run()
    found = []
    for task, metrics in before.items():
        for metric, value in metrics.items():
            name, _, filter_name = metric.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = metrics.get(f"{name}_stderr,{filter_name}")
            spread = float(error) if isinstance(error, (int, float)) else float("nan")
            found.append(SideEffect(task, name, float(value), float(after[task][metric]), spread))
    return found
