"""Ways to run a model: each a context manager that yields a `Case`."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zoo
from helpers import random_direction
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch import distributed as dist
from transformers import CompileConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from persona_vectors.model.prompts import left_pad
from persona_vectors.steering.add import steer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14]]
TEXTS = [([5, 6, 7], [20, 21, 22, 23]), ([8, 9, 10, 11, 12], [24, 25]), ([13, 14], [26, 27, 28])]
NEW = 5


@dataclass
class Seen:
    """One sequence that the model read: its tokens, how many are the prompt's, and what came out.

    `logits` are those of every token; for an answer that was generated, its tokens are the greedy ones.
    """

    tokens: list[int]
    prompt: int
    row: int
    logits: Tensor | None = None
    total: float | None = None
    """In beam search, the answer's log-probability,"""
    beams: Tensor | None = None
    """and the rows that all answers' tokens came from."""


@dataclass
class Case:
    """A model, and one way to have it read or generate."""

    model: nn.Module
    run: Callable[[], list[Seen]]
    rows: int = len(PROMPTS)
    """How many rows the user would give values for."""
    trains: bool = False
    tolerance: float = 1e-4
    labels: Tensor | None = None
    mask_shape: tuple[int, int] | None = None
    place: Callable[[Seen], Tensor] = field(default=lambda seen: torch.arange(len(seen.tokens)))


def tiny(dtype: torch.dtype = torch.float32, name: str = "llama") -> nn.Module:
    model = zoo.build(name, dtype)
    model.generation_config.eos_token_id = None
    return model


def generating(model: nn.Module, *, padded: bool = True, copies: int = 1, **options: Any) -> Callable[[], list[Seen]]:
    """Greedy answers of one `generate` call."""

    def run() -> list[Seen]:
        prompts = PROMPTS if padded else PROMPTS[:1]
        ids, mask = left_pad(prompts, 0, "cpu")
        settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
        with torch.no_grad():
            rows = model.generate(input_ids=ids, attention_mask=mask, **settings)
        found = []
        for index, row in enumerate(rows.tolist()):
            prompt = prompts[index // copies]
            found.append(Seen(row[ids.shape[1] - len(prompt) :], len(prompt), index // copies))
        return found

    return run


def reading(model: nn.Module, *, grad: bool = False, pack: str = "") -> tuple[Callable[[], list[Seen]], Tensor]:
    """One pass over finished texts, right-padded or packed; returns how to run it, and its labels."""
    ids, mask = left_pad([[*p, *a][::-1] for p, a in TEXTS], 0, "cpu")
    ids, mask = ids.flip(1), mask.flip(1)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(TEXTS):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pack:
        real = mask.bool()
        lengths = torch.tensor([len(p) + len(a) for p, a in TEXTS])
        ends = lengths.cumsum(0)
        own = torch.cat([torch.arange(n) for n in lengths])
        labels = labels[real][None]
        ids, inputs = ids[real][None], {"input_ids": ids[real][None], "position_ids": own[None]}
        if pack == "bounds":
            bounds = torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()])
            longest = int(lengths.max())
            inputs |= {
                "cu_seq_lens_q": bounds,
                "cu_seq_lens_k": bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }

    def run() -> list[Seen]:
        with torch.set_grad_enabled(grad):
            logits = model(**inputs, labels=labels, use_cache=False).logits.detach()
        if pack:
            parts = logits[0].split([len(p) + len(a) for p, a in TEXTS])
        else:
            parts = [row[-len(ids[0]) :][: len(p) + len(a)] for row, (p, a) in zip(logits, TEXTS)]
        return [Seen([*p, *a], len(p), i, part) for i, ((p, a), part) in enumerate(zip(TEXTS, parts))]

    return run, labels


@contextmanager
def eager() -> Iterator[Case]:
    model = tiny()
    yield Case(model, generating(model))


@contextmanager
def uncached() -> Iterator[Case]:
    model = tiny()
    yield Case(model, generating(model, use_cache=False))


@contextmanager
def compiled_static() -> Iterator[Case]:
    """A static cache, whose decoding is compiled; it has generated before the hooks are set."""
    model, config = tiny(), CompileConfig(backend="eager", fullgraph=False)
    config._compile_all_devices = True
    run = generating(model, cache_implementation="static", compile_config=config)
    run()
    yield Case(model, run)
    torch._dynamo.reset()


@contextmanager
def compiled_dynamic() -> Iterator[Case]:
    """A forward method that was compiled in place, and has run."""
    model = tiny()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    run = generating(model)
    run()
    yield Case(model, run)
    torch._dynamo.reset()


@contextmanager
def compiled_wrapper() -> Iterator[Case]:
    """`torch.compile(model)`, given to the verbs and called as it is, after it has run."""
    model = torch.compile(tiny(), backend="eager")
    run, labels = reading(model)
    run()
    yield Case(model, run, labels=labels, mask_shape=tuple(labels.shape))
    torch._dynamo.reset()


@contextmanager
def chunked_prefill() -> Iterator[Case]:
    model = tiny()
    yield Case(model, generating(model, prefill_chunk_size=2))


@contextmanager
def assisted() -> Iterator[Case]:
    model, assistant = tiny(), tiny()
    assistant.lm_head.weight.data += 0.02 * torch.randn_like(assistant.lm_head.weight)
    yield Case(model, generating(model, padded=False, assistant_model=assistant), rows=1)


@contextmanager
def prompt_lookup() -> Iterator[Case]:
    model = tiny()
    yield Case(model, generating(model, padded=False, prompt_lookup_num_tokens=2), rows=1)


@contextmanager
def early_exit() -> Iterator[Case]:
    model = tiny()
    yield Case(model, generating(model, padded=False, assistant_early_exit=2), rows=1)


@contextmanager
def returned_sequences() -> Iterator[Case]:
    """Several rows of each prompt; nearly greedy, so that they can be told."""
    model = tiny()
    options = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2, "top_k": 0}
    yield Case(model, generating(model, copies=2, **options))


@contextmanager
def beams() -> Iterator[Case]:
    """Beam search: whatever it returns, each answer's log-probability is that of the edited model."""
    model = tiny()

    def run() -> list[Seen]:
        ids, mask = left_pad(PROMPTS, 0, "cpu")
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=NEW, num_beams=3, do_sample=False, pad_token_id=0,
                return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
            )  # fmt: skip
        found = []
        for index, row in enumerate(output.sequences.tolist()):
            tokens = row[ids.shape[1] - len(PROMPTS[index]) :]
            total = float(output.sequences_scores[index])
            found.append(Seen(tokens, len(PROMPTS[index]), index, total=total, beams=output.beam_indices))
        return found

    yield Case(model, run, tolerance=1e-3)


@contextmanager
def finished_text() -> Iterator[Case]:
    model = tiny()
    run, labels = reading(model)
    yield Case(model, run, labels=labels, mask_shape=tuple(labels.shape))


@contextmanager
def packed(pack: str) -> Iterator[Case]:
    model = tiny()
    run, labels = reading(model, pack=pack)
    yield Case(model, run, labels=labels, mask_shape=tuple(labels.shape), tolerance=1e-3)


def packed_positions() -> Any:
    return packed("positions")


def packed_bounds() -> Any:
    return packed("bounds")


@contextmanager
def training() -> Iterator[Case]:
    model = tiny().train()
    run, labels = reading(model, grad=True)
    yield Case(model, run, trains=True, labels=labels, mask_shape=tuple(labels.shape))


@contextmanager
def checkpointing(reentrant: bool) -> Iterator[Case]:
    model = tiny().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    run, labels = reading(model, grad=True)
    yield Case(model, run, trains=True, labels=labels, mask_shape=tuple(labels.shape))


def checkpointing_reentrant() -> Any:
    return checkpointing(True)


def checkpointing_plain() -> Any:
    return checkpointing(False)


@contextmanager
def _group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def ddp() -> Iterator[Case]:
    with _group():
        model = nn.parallel.DistributedDataParallel(tiny().train())
        run, labels = reading(model, grad=True)
        yield Case(model, run, trains=True, labels=labels, mask_shape=tuple(labels.shape))


@contextmanager
def fsdp2() -> Iterator[Case]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with _group():
        model, mesh = tiny().train(), init_device_mesh("cpu", (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        run, labels = reading(model, grad=True)
        yield Case(model, run, trains=True, labels=labels, mask_shape=tuple(labels.shape))


@contextmanager
def adapters() -> Iterator[Case]:
    """Two LoRA adapters, the second one active."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.set_adapter("second")
    model.eval()
    yield Case(model, generating(model))


@contextmanager
def merged() -> Iterator[Case]:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny(), config).merge_and_unload().eval()
    yield Case(model, generating(model))


@contextmanager
def prompt_tuning() -> Iterator[Case]:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny(), config).eval()
    run, _ = reading(model)
    yield Case(model, run, tolerance=1e-3)


@contextmanager
def prompt_tuning_generation() -> Iterator[Case]:
    """Without a cache: PEFT's own cached generation is not what its model says of the text."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny(), config).eval()
    yield Case(model, generating(model, padded=False, use_cache=False), rows=1, tolerance=1e-3)


@contextmanager
def prefix_tuning() -> Iterator[Case]:
    """Finished text: PEFT's own generation is not what its model says of the text."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny(), config).eval()
    run, labels = reading(model)
    yield Case(model, run, labels=labels, mask_shape=tuple(labels.shape), tolerance=1e-3)


@contextmanager
def bfloat16() -> Iterator[Case]:
    model = tiny(torch.bfloat16)
    yield Case(model, generating(model), tolerance=0.2)


@contextmanager
def int8() -> Iterator[Case]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny()
    quantize_(model, Int8WeightOnlyConfig())
    yield Case(model, generating(model), tolerance=1e-3)


@contextmanager
def offloaded(folder: Path) -> Iterator[Case]:
    """Every weight on the disk between passes."""
    from accelerate import disk_offload

    model = tiny()
    disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    yield Case(model, generating(model))


@contextmanager
def two_threads() -> Iterator[Case]:
    """While another thread steers and generates with the same model, over and over."""
    model, done = tiny(), threading.Event()
    vector = -random_direction(model)

    def others() -> int:
        count, run = 0, generating(model)
        while not done.is_set():
            with steer(model, vector, layer=1, coef=30.0):
                run()
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(others)
        try:
            yield Case(model, generating(model))
        finally:
            done.set()
        assert other.result() > 0


@contextmanager
def shared_keys() -> Iterator[Case]:
    """A model whose upper blocks share keys, and leave out what nobody asks the logits of (Gemma 4)."""
    model = zoo.shared_keys()
    model.generation_config.eos_token_id = None
    yield Case(model, generating(model), tolerance=1e-3)


@contextmanager
def continuous() -> Iterator[Case]:
    """transformers' continuous batching, which packs requests that come and go."""
    model = tiny()

    def run() -> list[Seen]:
        config = model.generation_config
        config.max_new_tokens, config.do_sample, config.eos_token_id = NEW, False, -1
        options = ContinuousBatchingConfig(use_cuda_graph=False, block_size=16, num_blocks=16, max_batch_tokens=64)
        with torch.no_grad():
            found = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=options)
        assert all(output.error is None for output in found.values())
        rows = [[*prompt, *output.generated_tokens] for prompt, output in zip(PROMPTS, found.values())]
        return [Seen(row, len(prompt), i) for i, (row, prompt) in enumerate(zip(rows, PROMPTS))]

    yield Case(model, run)
