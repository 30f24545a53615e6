"""The one hook primitive: edits of the decoder blocks' outputs, told which tokens they see."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Model, chosen_layers, decoder_layers
from persona_vectors.model.calls import no_calls
from persona_vectors.model.runs import Edit, EnoughRead, Run, active, without
from persona_vectors.model.stations import open_on
from persona_vectors.model.tokens import Tokens
from persona_vectors.model.wrappers import unwrap

__all__ = ["Edit", "EnoughRead", "edit_blocks", "edits_are_active", "pause_edits"]

DURING = ("auto", "training", "always")


def edits_are_active(model: Model) -> bool:
    """Say whether any edit of this model is active in this thread, paused ones left out."""
    return bool(_runs_on(model))


def _runs_on(model: Model) -> tuple[Run, ...]:
    decoder = unwrap(model).get_decoder()
    return tuple(run for run in active.get() if run.decoder is decoder)


@contextmanager
def pause_edits(model: Model | None = None) -> Iterator[None]:
    """Suspend this thread's edits, so that a judge reads the plain model inside a steered evaluation.

    Those of `model`, so that a judge's own model may be steered; of every model unless it is given.
    """
    paused = active.get() if model is None else _runs_on(model)
    decoders = [run.decoder for run in paused]
    with without(paused), no_calls(lambda model: model.get_decoder() in decoders):
        yield


@contextmanager
def edit_blocks(
    model: Model,
    edits: Mapping[int, Edit],
    *,
    during: str = "always",
) -> Iterator[Tokens]:
    """Run `edits[k]` on the raw output of decoder block k in every forward pass inside the `with`.

    An edit is given the hidden states [batch, token, hidden] and the pass's `Tokens`; it returns new hidden states, or
    None where it only reads. The hooks are gone afterwards, also after an error. Works the same for blocks that return
    tensors, tuples or lists, with and without a cache, in training with and without checkpointing, and when nested.

    The edits are this thread's: another thread's passes through the same model are left alone, and a thread that is
    to be edited is started inside the `with` by `contextvars.copy_context().run`. Compiled models run uncompiled
    inside the `with`, in every thread: a graph that was compiled without the hooks would not run them.

    `during`: "always"; "training", only passes in training mode and not those of `generate` or of a reference whose
    adapters are off; "auto", those alone as soon as there has been one, so that evaluation and generation inside a
    training run are left alone, and until then every pass.

    Raises InputError for a layer that the model lacks, and RuntimeError where a block did not run: at the end of a
    pass, of a `generate` that read more tokens than the blocks did, or of the `with`, and before an optimizer's step.
    """
    model = unwrap(model)
    if during not in DURING:
        raise InputError(f"during is {during!r}: give one of {', '.join(DURING)}")
    if edits:
        chosen_layers(edits, len(decoder_layers(model)))
    run = Run(model, dict(edits), during)
    with ExitStack() as stack:
        stack.enter_context(open_on(model, run))
        active.set((*active.get(), run))
        stack.callback(lambda: active.set(tuple(other for other in active.get() if other is not run)))
        yield run.tokens
        run.end()
