"""The transformers model inside nnsight's and TransformerLens's wrappers; neither library is imported."""

from typing import Any

from torch.nn.parallel import DataParallel, DistributedDataParallel

from persona_vectors.data.errors import InputError


def unwrap(model: Any) -> Any:
    """Return the transformers model inside an nnsight model or a TransformerBridge; any other model as it is.

    Hooks on it act in the wrapper's own calls too, for both libraries run this very module.

    Also the model that was compiled or spread over processes: `torch.compile` and DistributedDataParallel wrap it.

    Raises InputError for DataParallel, whose threads run copies; for a bridge with processed weights (folded norms,
    centred writes), whose residual stream has another basis than the plain model's vectors; and for an nnsight model
    that has not loaded its weights.
    """
    if isinstance(model, DataParallel):
        raise InputError(
            "DataParallel runs copies of the model in threads: give the model inside, or use one process a GPU"
        )
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    if "_orig_mod" in getattr(model, "_modules", ()):  # torch.compile's wrapper, whose module is slow to import
        return unwrap(model._orig_mod)
    library = next((m for m in map(_package, type(model).__mro__) if m in ("nnsight", "transformer_lens")), None)
    if library == "transformer_lens":
        if not hasattr(model, "original_model"):
            raise InputError(f"TransformerLens's {type(model).__name__} is not supported: give a TransformerBridge")
        if getattr(model, "_weights_processed", model.compatibility_mode):
            raise InputError(
                "this TransformerBridge has processed weights (compatibility mode), so its residual stream has another "
                "basis than the plain model's vectors: boot it again, at most with "
                "enable_compatibility_mode(no_processing=True)"
            )
        return model.original_model
    if library == "nnsight":
        inner = model._module
        if any(parameter.is_meta for parameter in inner.parameters()):
            raise InputError(
                "this nnsight model has not loaded its weights: call model.dispatch(), or make it with dispatch=True"
            )
        return inner
    return model


def keeps_cache(model: Any) -> bool:
    """Say whether the model obeys a KV cache: one whose attention TransformerLens has replaced silently drops it.

    TransformerLens 4.3 looks for the cache under the name that it had before transformers 5.24, so that each generated
    token sees itself alone. Such a model is read and generates without a cache.
    """
    return not any(_package(type(module)) == "transformer_lens" for module in unwrap(model).modules())


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
