"""Persona vectors: extract them, steer and monitor with them, flag training data (arXiv 2507.21509)."""

from importlib import import_module
from typing import Any

_WHERE = {
    "files": ["InputError"],
    "traits": ["Trait", "load_trait", "list_traits"],
    "models": ["load_model", "generate", "decoder_layers", "chat_prompt", "fold_system_role"],
    "hooks": ["edit_blocks"],
    "activations": ["pool", "pool_while_generating"],
    "rollouts": ["Rollout", "load_rollouts"],
    "judge": ["ContrastJudge", "SentimentJudge", "LocalJudge", "PerplexityJudge"],
    "openai_judge": ["OpenAIJudge"],
    "vectors": ["PersonaVector", "random_vector"],
    "extraction": ["extract", "extract_from"],
    "steering": ["steer"],
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package is fast."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'persona_vectors' has no attribute {name!r}")
    return getattr(import_module(f"persona_vectors.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
