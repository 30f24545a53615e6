"""Flagging past one process: Ray Data maps the same work over parts, in actors that hold a model each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.utils import output_capturing

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model


def run_in_actors(
    model: Model,
    work: Callable[[Model, int], None],
    numbers: list[int],
    path: Callable[[int], Path],
    workers: int,
    progress: Callable[[int], object],
) -> None:
    """Run `work(model, number)`, which writes `path(number)`, for every number, in `workers` actors.

    An actor takes a GPU where the cluster has one for each, and one CPU. Ray starts a lost actor anew and gives it the
    part again; parts are written whole or not at all, so none is lost or doubled.
    """
    try:
        import ray
    except ImportError:
        raise InputError("workers > 1 needs Ray: pip install 'persona-vectors-toolkit[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # a model that was once called with output_hidden_states keeps hooks on a variable that cannot be pickled
    kind = type(output_capturing._active_collector)
    ray.util.register_serializer(kind, serializer=lambda _: None, deserializer=_collector)
    gpus = int(ray.cluster_resources().get("GPU", 0) >= workers)
    shared = ray.put((model, work))
    ray.data.DataContext.get_current().enable_progress_bars = False
    parts = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    done = parts.map_batches(
        _Actor,
        fn_constructor_args=([shared], bool(gpus)),
        batch_size=1,
        concurrency=workers,
        num_cpus=1,
        num_gpus=gpus,
    )
    for _ in done.iter_batches(batch_size=1):
        progress(1)
    missing = [number for number in numbers if not path(number).exists()]
    if missing:
        raise InputError(f"part {path(missing[0])} was not written here: put `out` on a disk that all workers share")


def _collector(_: None) -> Any:
    return output_capturing._active_collector


class _Actor:
    """Holds a model, and does one part after another."""

    def __init__(self, shared: list[Any], gpu: bool) -> None:
        import ray

        self.model, self.work = ray.get(shared[0])
        if gpu:
            self.model.to("cuda")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["number"]:
            self.work(self.model, int(number))
        return batch
