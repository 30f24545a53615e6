"""Past one process: Ray Data maps the same work over parts, in actors that hold a model each."""

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.utils import output_capturing

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model
from persona_vectors.model.loading import load_model
from persona_vectors.model.wrappers import unwrap

STORE_LIMIT = 2 * 10**9
"""How many bytes a model that actors get through Ray's object store may have; larger ones they load themselves."""


class Elsewhere:
    """A model that Ray's actors load: its config and tokenizer are here, its weights are not."""

    def __init__(self, load: str | Path | Callable[[], tuple[Any, Any]], *, gpus_per_worker: float | None = None):
        """Take a Hub id, a folder, or a function that loads a model and its tokenizer, such as a partial `load_model`.

        An actor has `gpus_per_worker` GPUs: by default one where there is one, else none. A model on several of them
        is laid out by accelerate.
        """
        ray = _ray()
        there = ray.cluster_resources().get("GPU", 0) > 0
        self.gpus = float(there) if gpus_per_worker is None else gpus_per_worker
        placed = "auto" if self.gpus > 1 else None
        self.load = partial(load_model, load, device_map=placed) if isinstance(load, (str, Path)) else load
        self._actor: Any = None
        self.config, self.tokenizer, self.dtype = self._get("described")

    def ask(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Return function(model, ...), called in an actor that holds the model until `free`."""
        return self._get("ask", partial(_called, function, given, options))

    def _get(self, method: str, *given: Any) -> Any:
        ray = _ray()
        if self._actor is None:
            self._actor = ray.remote(num_cpus=1, num_gpus=self.gpus)(_Asked).remote(self.load)
        try:
            return ray.get(getattr(self._actor, method).remote(*given))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            raise

    def free(self) -> None:
        """Let the actor that was asked go, and with it the model and the GPU that it held."""
        if self._actor is not None:
            _ray().kill(self._actor)
            self._actor = None

    def get_decoder(self) -> "Elsewhere":
        """Return itself: nothing edits a model that is not here."""
        return self


def here_or_elsewhere(model: Model | str | Path | Elsewhere, *, gpus_per_worker: float | None) -> Model | Elsewhere:
    """Return a model that is in memory, without its wrapper; a Hub id or a folder as one that actors load."""
    return Elsewhere(model, gpus_per_worker=gpus_per_worker) if isinstance(model, (str, Path)) else unwrap(model)


def map_in_actors(
    model: Model | Elsewhere,
    work: Callable[[Model, str], str],
    parts: Sequence[str],
    *,
    workers: int,
    gpus_per_worker: float | None = None,
) -> Iterator[str]:
    """Yield work(model, part) of all parts as they are done, in one pool of `workers` actors.

    An actor has one CPU, and a GPU where the cluster has one for each. An `Elsewhere` is loaded by each; a model in
    memory goes through Ray's object store. Ray starts a lost actor anew and gives it the part again.
    """
    ray = _ray()
    if isinstance(model, Elsewhere):
        model.free()
        gpus, load, held = model.gpus, model.load, None
    else:
        _check_size(model)
        each = float(ray.cluster_resources().get("GPU", 0) >= workers)
        gpus, load, held = each if gpus_per_worker is None else gpus_per_worker, None, model
    there = ray.cluster_resources().get("GPU", 0)
    if gpus * workers > there:
        raise InputError(
            f"{workers} workers of {gpus:g} GPUs are more than the {there:g} there are: give fewer workers, or a "
            "smaller gpus_per_worker (with 0.5 two share one)"
        )
    shared = ray.put((held, work))
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
        _Worker,
        fn_constructor_args=([shared], load, gpus > 0),
        batch_size=1,
        concurrency=workers,
        num_cpus=1,
        num_gpus=gpus,
    )
    for batch in done.iter_batches(batch_size=1, prefetch_batches=0):
        yield str(batch["done"][0])


def _ray() -> Any:
    """Return the module, connected to a cluster, or to one that is started on this machine."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError("workers > 1 needs Ray: pip install 'persona-vectors-toolkit[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # a model that was once called with output_hidden_states keeps hooks on a variable that cannot be pickled
    kind = type(output_capturing._active_collector)
    ray.util.register_serializer(kind, serializer=lambda _: None, deserializer=_collector)
    return ray


def _collector(_: None) -> Any:
    return output_capturing._active_collector


def _check_size(model: Model) -> None:
    size = sum(weight.numel() * weight.element_size() for weight in chain(model.parameters(), model.buffers()))
    if size > STORE_LIMIT:
        raise InputError(
            f"the model has {size / 1e9:.1f} GB, and workers are given one in memory up to {STORE_LIMIT / 1e9:g} GB: "
            "give its Hub id or folder in its place, which each of them loads"
        )


def _called(function: Callable[..., Any], given: Any, options: Any, model: Model) -> Any:
    return function(model, *given, **options)


class _Asked:
    """Holds a model from the first question on."""

    def __init__(self, load: Callable[[], tuple[Any, Any]]) -> None:
        self.load = functools.cache(load)

    def described(self) -> tuple[Any, Any, Any]:
        model, tokenizer = self.load()
        return model.config, tokenizer, model.dtype

    def ask(self, function: Callable[[Model], Any]) -> Any:
        return function(self.load()[0])


class _Worker:
    """Holds a model, and does one part after another."""

    def __init__(self, shared: list[Any], load: Callable[[], tuple[Any, Any]] | None, gpu: bool) -> None:
        import ray

        held, self.work = ray.get(shared[0])
        self.model = held if load is None else load()[0]
        if load is None and gpu:
            self.model.to("cuda")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"done": [self.work(self.model, str(part)) for part in batch["part"]]}
