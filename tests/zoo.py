"""Tiny random models, one for each architecture: three decoder blocks of width 32, built from a config, offline."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

BLOCKS, HIDDEN, VOCAB = 3, 32, 262

# The common names; each config's `attribute_map` turns them into its own (n_layer, d_model, ...).
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": HIDDEN // 4}  # where the default is not hidden_size / num_attention_heads
LOCAL = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SEQ2SEQ = {
    f"{side}_{name}": value
    for side, layers in (("encoder", 2), ("decoder", BLOCKS))
    for name, value in {"layers": layers, "attention_heads": 4, "ffn_dim": 64}.items()
}


def _vision(text: str, vision: str, vision_layers: int = 2, **overrides: Any) -> dict[str, Any]:
    """Overrides for a language model behind a vision tower, which has another number of layers than the decoder."""
    tower = {"num_hidden_layers": vision_layers, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return {
        "text_config": TEXT | {"model_type": text} | overrides,
        "vision_config": tower | {"model_type": vision, "image_size": 28, "patch_size": 14},
    }


# The class that builds it, then the model type and what it needs beyond TEXT.
_TABLES: dict[type, dict[str, dict[str, Any]]] = {
    AutoModelForCausalLM: {
        "llama": {},
        "qwen2": {},
        "qwen3": HEAD,
        "gemma2": HEAD,
        "gemma3_text": HEAD | LOCAL,
        "mistral": {},
        "phi": {},
        "phi3": {},
        "gpt2": {},
        "gpt_neox": {},
        "gptj": {"rotary_dim": 4},
        "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
        "gpt_bigcode": {},
        "codegen": {"rotary_dim": 4},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": HIDDEN},
        "bloom": {},
        "falcon": {},
        "mpt": {},
        "olmo2": {},
        "stablelm": {},
        "starcoder2": {},
        "cohere": {},
        "granite": {},
        "glm": HEAD,
        "smollm3": {},
        # mixtures of experts
        "mixtral": EXPERTS,
        "qwen2_moe": EXPERTS,
        "qwen3_moe": EXPERTS | HEAD,
        "olmoe": EXPERTS,
        "gpt_oss": EXPERTS | HEAD | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "deepseek_v3": EXPERTS | LATENT,
        "granitemoe": EXPERTS,
        "llama4_text": EXPERTS | HEAD | {"intermediate_size_mlp": 64},
        # state space and hybrid
        "mamba": {},
        "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
        "recurrent_gemma": {},
        "jamba": EXPERTS | {"attn_layer_period": 3, "attn_layer_offset": 1},
        "bamba": MAMBA2 | {"attn_layer_indices": [1]},
        "falcon_h1": MAMBA2,
        "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 32},
        "qwen3_next": EXPERTS | HEAD | LINEAR,
    },
    AutoModelForImageTextToText: {
        "llava": _vision("llama", "clip_vision_model"),
        "llava_next": _vision("mistral", "clip_vision_model", vision_layers=BLOCKS),  # as long as the decoder
        "gemma3": _vision("gemma3_text", "siglip_vision_model", **HEAD, **LOCAL),
        "idefics3": _vision("llama", "idefics3_vision"),
        "smolvlm": _vision("llama", "smolvlm_vision"),
        "mistral3": _vision("mistral", "pixtral"),
        "internvl": _vision("qwen2", "internvl_vision"),
        "qwen2_vl": {
            "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2},
        },
    },
    AutoModelForSeq2SeqLM: {
        # T5 counts its encoder as num_hidden_layers, and each decoder block holds a list of three.
        "t5": {"num_layers": 2, "num_decoder_layers": BLOCKS, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0},
        "bart": SEQ2SEQ,
        "t5gemma": {"encoder": TEXT | HEAD | {"num_hidden_layers": 2}, "decoder": TEXT | HEAD},
    },
}
ARCHITECTURES = {name: (auto, overrides) for auto, table in _TABLES.items() for name, overrides in table.items()}


def shared_keys() -> Any:
    """A model whose upper blocks share keys, and leave out the tokens that nobody asks the logits of (Gemma 4)."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        **TEXT, head_dim=8, global_head_dim=8, num_kv_shared_layers=2, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB, layer_types=["full_attention"] * BLOCKS,
    )  # fmt: skip
    torch.manual_seed(0)
    return Gemma4ForCausalLM(config).eval()


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the architecture `name` with random weights, the same at every call, in eval mode and without dropout."""
    auto, overrides = deepcopy(ARCHITECTURES[name])  # some configs write into the dicts they are given
    config = AutoConfig.for_model(name, **(overrides if "text_config" in overrides else TEXT | overrides))
    _remove_dropout(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config, dtype=dtype).eval()


def inputs(model: PreTrainedModel, batch: int = 2, tokens: int = 5) -> dict[str, Tensor]:
    """Return random token ids without special tokens, `[batch, tokens]`, as keyword arguments for `model`."""
    ids = torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {})


def _remove_dropout(config: PreTrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _remove_dropout(value)
        elif "drop" in key and value:
            setattr(config, key, 0.0)
