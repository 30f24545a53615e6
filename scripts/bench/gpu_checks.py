"""Whether hooks are right on this device: against plain references, in two threads, and with compiled static caches."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.inputs import any_vector, endless
from bench.measuring import synchronize
from persona_vectors.model.blocks import Model, decoder_layers, model_shape
from persona_vectors.model.generation import generate_tokens
from persona_vectors.model.pooling import pool, pool_while_generating
from persona_vectors.model.prompts import left_pad
from persona_vectors.monitoring.trace import monitor
from persona_vectors.steering.add import steer
from persona_vectors.vectors.directions import unit_directions

SAME, MOVED = 0.06, 0.2
"""Relative differences: what bfloat16's rounding reaches at most, and what an edit does at least."""


class Said(NamedTuple):
    """What greedy generation said."""

    tokens: Int[Tensor, "row step"]
    logits: Float[Tensor, "row step vocabulary"]


def said(model: Model, prompts: Sequence[list[int]], steps: int, **options: Any) -> Said:
    """Generate greedily with the model's own `generate`."""
    ids, mask = left_pad(prompts, 0, model.device)
    greedy = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    config = GenerationConfig(**greedy, output_logits=True, return_dict_in_generate=True, **options)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return Said(output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1))


def apart(one: Said, other: Said, *, begin: int = 1) -> float:
    """Return the relative difference of the logits from step `begin` on, where all tokens before are the same.

    Step 0 is the prompt's own pass, which decoding step by step does not change. Infinite where no step is left.
    """
    same = (one.tokens == other.tokens).long().cumprod(dim=1)
    alike = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1).bool()
    alike[:, :begin] = False
    return relative(one.logits[alike], other.logits[alike]) if alike.any() else float("inf")


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@dataclass(frozen=True)
class Verdicts:
    """Checks that were made, printed as they come."""

    lines: list[dict[str, Any]]

    def most(self, name: str, value: float, limit: float = SAME) -> None:
        self._add(name, value, value <= limit, f"at most {limit:g}")

    def least(self, name: str, value: float, limit: float = MOVED) -> None:
        self._add(name, value, value >= limit, f"at least {limit:g}")

    def _add(self, name: str, value: float, right: bool, bound: str) -> None:  # nan is wrong
        print(f"{'ok   ' if right else 'WRONG'} {name}: {value:.3g} ({bound})", flush=True)
        self.lines.append({"check": name, "value": value, "ok": right})


class Steered:
    """A random vector in the middle block, as long as the residual stream there."""

    def __init__(self, model: Model, prompts: Sequence[list[int]]) -> None:
        self.model, self.layer, self.vector = model, model_shape(model)[0] // 2, any_vector(model)
        ids, mask = left_pad(prompts, 0, model.device)
        with torch.inference_mode():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        norm = states[self.layer + 1][mask.bool()].float().norm(dim=-1).mean()
        self.coef = float(norm) / float(self.vector.direction(self.layer).norm())

    def __call__(self, sign: int = 1) -> contextlib.AbstractContextManager[None]:
        return steer(self.model, self.vector, layer=self.layer, coef=sign * self.coef)

    @contextlib.contextmanager
    def by_hand(self) -> Iterator[None]:
        """Add the same with a plain hook of torch's, before the next block."""
        shift = (self.coef * self.vector.direction(self.layer)).to(self.model.device, self.model.dtype)

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (args[0] + shift, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + shift}

        block = decoder_layers(self.model)[self.layer + 1]
        handle = block.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def check_hooks(model: Model, prompts: Sequence[list[int]], steps: int, lines: list[dict[str, Any]]) -> None:
    """Check steering, monitoring, pooling and two threads against what needs no hook of ours."""
    verdicts, steered = Verdicts(lines), Steered(model, prompts)
    ids, mask = left_pad(prompts, 0, model.device)

    def logits() -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]

    plain = logits()
    with steered.by_hand():
        by_hand = logits()
    with steered():
        ours = logits()
    verdicts.most("steered logits against a plain hook's", relative(ours, by_hand), 0.01)
    verdicts.least("steered logits against plain ones", relative(ours, plain))
    verdicts.most("plain logits after the edit against before", relative(logits(), plain), 0.01)
    _check_readings(model, prompts, steps, steered, verdicts)
    _check_threads(model, prompts, steps, steered, verdicts)


def _check_readings(
    model: Model, prompts: Sequence[list[int]], steps: int, steered: Steered, verdicts: Verdicts
) -> None:
    """Check what is read while generating against a pass over the finished answers that gives all hidden states."""
    with (
        monitor(model, steered.vector, layer=steered.layer) as trace,
        pool_while_generating(model, stops=()) as pooled,
    ):
        answers = generate_tokens(model, endless(), prompts, max_new_tokens=steps, temperature=0, reading=True)
    rows = [(prompt, answer) for prompt, (answer, _) in zip(prompts, answers)]
    ids, mask = left_pad([[*prompt, *answer] for prompt, answer in rows], 0, model.device)
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[steered.layer + 1]
    unit = unit_directions(model, [steered.vector], steered.layer)[steered.layer][0].to(model.device)
    real = mask.bool().cpu()
    seen = trace.last.tokens
    verdicts.least("monitor saw every token", float(seen.shape == ids.shape and (seen == ids.cpu())[real].all()), 1)
    values = trace[steered.vector.trait][real]
    verdicts.most("monitored projections", relative(values, (states.float() @ unit).cpu()[real]))
    verdicts.most("means pooled while generating", relative(pooled().means, pool(model, rows).means), 0.02)


def _check_threads(
    model: Model, prompts: Sequence[list[int]], steps: int, steered: Steered, verdicts: Verdicts
) -> None:
    """Check that two threads which steer two ways at once say what each says alone."""

    def say(sign: int) -> Said:
        with steered(sign):
            return said(model, prompts, steps)

    alone = [say(sign) for sign in (1, -1)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(say, (1, -1)))
    for way, one, other in zip(("one way", "the other way"), together, alone):
        verdicts.most(f"steered {way} while another thread steers against it", apart(one, other, begin=0))
    verdicts.least("the two ways", apart(*alone, begin=0))


def check_static(model: Model, prompts: Sequence[list[int]], steps: int, lines: list[dict[str, Any]]) -> None:
    """Check that a compiled static cache is steered as a dynamic one is, also once a plain graph has been compiled."""
    verdicts, steered = Verdicts(lines), Steered(model, prompts)

    def static() -> Said:
        return said(model, prompts, steps, cache_implementation="static")

    plain = said(model, prompts, steps)
    with steered():
        dynamic = said(model, prompts, steps)
    compiled = _timed("static, compiling", static, lines)
    verdicts.most("static against dynamic, plain", apart(compiled, plain))
    compiled = _timed("static, compiled", static, lines)
    with steered():
        edited = _timed("static, steered", static, lines)
    verdicts.most("static against dynamic, steered", apart(edited, dynamic))
    same = float((edited.tokens == dynamic.tokens).float().mean())
    verdicts.least("share of the steered tokens that are the same", same, 0.2)
    verdicts.least("static, steered against plain", apart(edited, compiled, begin=0))
    again = _timed("static, after the edit", static, lines)
    verdicts.most("static after the edit against before", apart(again, compiled))


def check_continuous(model: Model, prompts: Sequence[list[int]], steps: int, lines: list[dict[str, Any]]) -> None:
    """Check that continuous batching is steered: its first tokens are those of `generate`, steered."""
    verdicts, steered = Verdicts(lines), Steered(model, prompts)
    config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=-1)
    plain = said(model, prompts, steps).tokens
    with steered():
        alone = said(model, prompts, steps).tokens
        answers = answer_paged(model, prompts, config, graphs=False)
    tokens = torch.tensor(answers, device=alone.device)
    first = [float((tokens == other)[:, :2].float().mean()) for other in (alone, plain)]
    verdicts.least("continuous, steered: share of the first two tokens that are generate's, steered", first[0], 0.5)
    verdicts.most("continuous, steered: share of the first two tokens that are generate's, plain", first[1], 0.3)


def answer_paged(
    model: Model, prompts: Sequence[list[int]], config: GenerationConfig, graphs: bool | None
) -> list[list[int]]:
    """Return the answers of continuous batching, with memory for all prompts at once."""
    pages = sum(1 + (len(prompt) + config.max_new_tokens) // 256 for prompt in prompts)
    paged = ContinuousBatchingConfig(num_blocks=pages + 8, use_cuda_graph=graphs)
    answers = [answer.generated_tokens for answer in model.generate_batch(prompts, config, paged).values()]
    if len(answers) < len(prompts):  # what fails in its thread is only logged
        raise RuntimeError(f"continuous batching answered {len(answers)} of {len(prompts)} prompts: see its log")
    return answers


def _timed(name: str, say: Callable[[], Said], lines: list[dict[str, Any]]) -> Said:
    start = time.perf_counter()
    found = say()
    synchronize(found.tokens.device)
    seconds = time.perf_counter() - start
    speed = found.tokens.numel() / seconds
    print(f"      {name}: {seconds:.2f} s, {speed:,.0f} tokens/s", flush=True)
    lines.append({"static": name, "seconds": seconds, "tokens/s": speed})
    return found
