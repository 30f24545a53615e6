"""Inside a training run: watch projections through the Trainer's own log, and penalise them in the loss."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, SupportsIndex

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Trainer, TrainerCallback

from persona_vectors.data.errors import InputError
from persona_vectors.model.blocks import Layer, one_layer
from persona_vectors.model.hooks import Edit, edit_blocks, pause_edits
from persona_vectors.model.prompts import chat_prompt, encode
from persona_vectors.model.thoughts import span_of
from persona_vectors.model.tokens import Tokens
from persona_vectors.monitoring.projection import token_projections
from persona_vectors.vectors.directions import projections, unit_directions, vector_keys, vector_list
from persona_vectors.vectors.moments import Moments
from persona_vectors.vectors.nulls import nulls_of, vectors_alone, with_nulls
from persona_vectors.vectors.vector import PersonaVector


class ProjectionCallback(TrainerCallback):
    """Log mean projections on v/|v| every few steps: of fixed probe prompts, and of the batch being trained on.

    `probe/TRAIT` is the mean over the prompts' last tokens, read without any steering (the paper's finetuning shift is
    its change); `batch/TRAIT` the mean over the tokens that the loss counts in the step's first micro-batch, read as
    the model trains on it, steered if it is. Both go through the Trainer's log, to wherever that reports, and into
    `history`. The probes are also read before the first step. `questions` are templated with the Trainer's tokenizer,
    which also tells the part of a thinking model's answers that `batch/TRAIT` is over: `positions` is "all", "answer"
    or "reasoning", and the name is then `batch/TRAIT/answer`.

    Training moves a model along most directions: `controls` random ones are read with the probes, half isotropic, half
    with the covariance of `reference`, by default `neutral_moments` of the model before the first step on plain facts.
    `deviations/TRAIT` is then how far the probes have moved since, in standard deviations over the questions, and
    `isotropic/TRAIT` and `covariance/TRAIT` are the shares of random directions that have moved less.

    Where a probe's mean has moved by `warn_at` from what it was before the first step, there is one warning; at
    `stop_at`, training stops. `plot` draws the probes in a notebook as they come.
    """

    def __init__(
        self,
        trainer: Trainer,
        vectors: PersonaVector | Sequence[PersonaVector],
        *,
        layer: Layer,
        questions: Sequence[str] = (),
        positions: str = "all",
        every: int = 10,
        warn_at: float | None = None,
        stop_at: float | None = None,
        controls: int = 0,
        reference: Moments | None = None,
        plot: bool = False,
    ) -> None:
        if every < 1:
            raise InputError(f"every is {every}: give a number of steps, 1 or more")
        if not questions and not (warn_at is None and stop_at is None):
            raise InputError("warn_at and stop_at look at the probes: give questions=")
        if controls and len(questions) < 2:
            raise InputError("controls compares shifts over the probes: give two questions or more")
        self.trainer = trainer  # a callback is given everything but its Trainer, and only that can log
        self.vectors = vector_list(vectors)
        self.layer, self.questions, self.every = layer, list(questions), every
        tokenizer: Any = getattr(trainer, "processing_class", None)  # an older Trainer has none of that name
        if positions != "all" and tokenizer is None:
            raise InputError("the Trainer has no tokenizer to tell reasoning by: give it processing_class=")
        self.span = None if positions == "all" else span_of(tokenizer, positions)
        self.warn_at, self.stop_at, self.plot = warn_at, stop_at, plot
        self.controls, self.reference = controls, reference
        self.history: list[dict[str, float]] = []
        """What was logged, with its `step`."""
        self._batch: dict[int, Tensor] = {}
        self._display: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        self.units = unit_directions(model, self.vectors, self.layer)
        keys = vector_keys([vector.trait for vector in self.vectors], list(self.units))
        self.names = keys
        self.history, self._warned = [], False
        tokenizer = given["processing_class"]
        self._rows = [(encode(tokenizer, text), ()) for text in self._texts(tokenizer)]
        if self._rows:  # a Trainer has a tokenizer then, which it need not have
            with _as_it_is(model):
                null: dict[str, Any] = {"controls": self.controls, "reference": self.reference}
                read, _ = with_nulls(model, tokenizer, self.vectors, layers=list(self.units), **null)
            self._probed = unit_directions(model, read, self.layer)
        self._before: Tensor | None = None
        self._log(state, self._probe(model))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if (state.global_step + 1) % self.every:
            return
        stack = ExitStack()
        stack.enter_context(edit_blocks(model, {layer: self._reader(layer) for layer in self.units}, during="training"))
        # the hooks end with the first pass, also where it fails: `on_step_end` would not be called then
        stack.callback(model.get_decoder().register_forward_hook(lambda *_: stack.close(), always_call=True).remove)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every:
            return
        values = torch.cat([self._batch[layer] for layer in self.units]).tolist()
        probes = self._probe(model)
        part = f"/{self.span.name}" if self.span else ""
        self._log(state, {f"batch/{name}{part}": value for name, value in zip(self.names, values)} | probes)
        first = self.history[0]
        drift = max((abs(probes[name] - first[name]) for name in first if name in probes), default=0.0)
        if self.warn_at is not None and drift >= self.warn_at and not self._warned:
            self._warned = True
            warnings.warn(
                f"a probe has moved by {drift:.3g} at step {state.global_step} (warn_at={self.warn_at:g}): "
                "look at the training data, or steer against it with pv.steer",
                stacklevel=2,
            )
        if self.stop_at is not None and drift >= self.stop_at:
            control.should_training_stop = True

    def _texts(self, tokenizer: Any) -> list[str]:
        if self.questions and tokenizer is None:
            raise InputError("the Trainer has no tokenizer to read the probe prompts with: give it processing_class=")
        return [chat_prompt(tokenizer, question) for question in self.questions]

    def _probe(self, model: Any) -> dict[str, float]:
        if not self._rows:
            return {}
        with _as_it_is(model):
            tokens = token_projections(model, self._rows, self._probed)
        last = torch.stack([row[-1] for row in tokens])
        size = {"vectors": len(self.vectors), "layers": len(self.units)}
        means = vectors_alone(last, **size).mean(dim=0).tolist()
        found = {f"probe/{name}": value for name, value in zip(self.names, means)}
        if self._before is None:
            self._before = last
        elif self.controls:
            found |= self._places(last - self._before)
        return found

    def _places(self, moved: Float[Tensor, "question column"]) -> dict[str, float]:
        traits, layers = [vector.trait for vector in self.vectors], list(self.units)
        nulls = nulls_of(moved[:, None], traits=traits, layers=layers, poolings=["prompt_last"], reference="")
        assert nulls is not None
        places = [nulls.place(t, layer=k, pooling="prompt_last") for k in layers for t in traits]
        names = ("deviations", "isotropic", "covariance")
        return {f"{what}/{key}": v for key, place in zip(self.names, places) for what, v in zip(names, place)}

    def _reader(self, layer: int) -> Edit:
        def read(hidden: Tensor, tokens: Tokens) -> None:
            values = projections(hidden.detach(), self.units[layer].to(hidden.device))
            where = counted(tokens, hidden)
            if self.span is not None:
                if tokens.input_ids is None:
                    raise InputError("a span is told from token ids, and this pass was given embeddings")
                where = self.span.within(tokens.input_ids, where)
            self._batch[layer] = values[where].mean(dim=0).cpu()

        return read

    def _log(self, state: Any, values: Mapping[str, float]) -> None:
        self.history.append({"step": state.global_step, **values})
        if values:
            Trainer.log(self.trainer, dict(values))  # a subclass's own would add its running means, and clear them
        if self.plot and state.is_world_process_zero:
            self._show()

    def _show(self) -> None:
        from IPython.display import display

        from persona_vectors.training.plots import plot_history

        figure = plot_history(self.history)
        if self._display is None:
            self._display = display(figure, display_id=True)
        else:
            self._display.update(figure)


@contextmanager
def _as_it_is(model: Any) -> Iterator[None]:
    """Read the model without dropout, and without the edits that training has."""
    was_training = model.training
    model.eval()
    try:
        with pause_edits(model):
            yield
    finally:
        model.train(was_training)


def counted(tokens: Tokens, hidden: Tensor) -> Bool[Tensor, "batch token"]:
    """Return the tokens that the loss counts; where the pass has no labels, all real ones."""
    where = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    if tokens.mask is not None:
        where &= tokens.mask.to(hidden.device)
    if tokens.labels is not None and tokens.labels.shape == where.shape:
        where &= tokens.labels.to(hidden.device) != -100
    return where


@contextmanager
def penalize(
    trainer: Trainer, vector: PersonaVector, *, layer: SupportsIndex, weight: float, target: float = 0.0
) -> Iterator[None]:
    """Add a penalty on the projection to the loss of every training step inside the `with`.

    loss + weight * mean((<h, v/|v|> - target)^2), over the tokens that the loss counts: one of the alternatives to
    preventative steering. Gradient accumulation averages it over the micro-batches. Reentrant checkpointing keeps no
    gradient for it and is refused.

    Raises InputError for a whitened vector, and for one or a layer that does not fit, and RuntimeError as `steer` does.
    """
    model = trainer.model
    vector.check_edits()
    place = one_layer(layer, len(vector.directions))
    unit = unit_directions(model, [vector], place)[place]
    terms: list[Tensor] = []

    def read(hidden: Tensor, tokens: Tokens) -> None:
        if not hidden.requires_grad:
            raise InputError(
                "the penalty has no gradient here: train a block at or below its layer, and with gradient "
                "checkpointing give gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        values = projections(hidden, unit.to(hidden.device))[..., 0]
        term = ((values - target)[counted(tokens, hidden)] ** 2).mean()
        if not terms:  # checkpointing runs the block again, in `backward`
            terms.append(term)

    compute_loss = trainer.compute_loss

    def penalized(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        terms.clear()
        given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        loss: Any = compute_loss(model, inputs, **given)
        if not terms:  # evaluation
            return loss
        scaled = trainer.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        term = weight * terms[0].to((loss[0] if return_outputs else loss).device) / scaled
        return (loss[0] + term, loss[1]) if return_outputs else loss + term

    with edit_blocks(model, {place: read}, during="training"):
        trainer.compute_loss = penalized  # type: ignore[method-assign]
        try:
            yield
        finally:
            del trainer.compute_loss
