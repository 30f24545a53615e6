"""Persona vectors: extract them, steer and monitor with them, flag training data (arXiv 2507.21509)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time a name is imported when it is first asked for
    from persona_vectors.activations import pool, pool_while_generating
    from persona_vectors.backends import lens_hooks, nnsight_block, steer_trace
    from persona_vectors.baselines import assistant_prompts, covariance_vectors, random_vectors
    from persona_vectors.calibration import Calibration, calibrate
    from persona_vectors.chat import Chat
    from persona_vectors.contrast_table import contrast_effect, effect_matrix
    from persona_vectors.control import ablate, cap, floor, steer_where
    from persona_vectors.evaluation import Evaluation, correlation_interval, evaluate, mean_interval, steered_answers
    from persona_vectors.extraction import extract, extract_from
    from persona_vectors.files import InputError
    from persona_vectors.finetuning import FinetuneConfig, finetune
    from persona_vectors.flag_files import Flags, load_flags
    from persona_vectors.flagging import flag
    from persona_vectors.geometry import cosine_matrix, layer_cosines, logit_lens, separation_indices
    from persona_vectors.harness import side_effects
    from persona_vectors.heatmaps import heatmap, save_heatmaps
    from persona_vectors.hooks import edit_blocks
    from persona_vectors.interop import export_vector, import_vector
    from persona_vectors.inventory import big_five
    from persona_vectors.judge import ContrastJudge, LocalJudge, PerplexityJudge, SentimentJudge
    from persona_vectors.judge_check import check_judge, load_labels, require_valid_judge
    from persona_vectors.likelihood import likelihood_contrast, load_statements
    from persona_vectors.models import chat_prompt, decoder_layers, fold_system_role, generate, load_model
    from persona_vectors.monitoring import monitor
    from persona_vectors.openai_judge import OpenAIJudge
    from persona_vectors.plot import (
        plot_cosines,
        plot_drift,
        plot_history,
        plot_scores,
        plot_separation,
        plot_shift,
        plot_sweep,
        plot_vector,
    )
    from persona_vectors.projection import project
    from persona_vectors.report import write_report
    from persona_vectors.rollouts import Rollout, load_rollouts
    from persona_vectors.samples import read_samples
    from persona_vectors.screening import add_scores, compare_datasets, split_dataset
    from persona_vectors.shifts import Shift, finetuning_shift
    from persona_vectors.steering import steer
    from persona_vectors.sweeping import Sweep, sweep
    from persona_vectors.training import ProjectionCallback, penalize
    from persona_vectors.training_sets import make_training_sets
    from persona_vectors.trait_writer import write_trait
    from persona_vectors.traits import Trait, list_traits, load_trait
    from persona_vectors.vectors import PersonaVector, random_vector

_WHERE = {
    "activations": ["pool", "pool_while_generating"],
    "backends": ["lens_hooks", "nnsight_block", "steer_trace"],
    "baselines": ["assistant_prompts", "covariance_vectors", "random_vectors"],
    "calibration": ["Calibration", "calibrate"],
    "chat": ["Chat"],
    "contrast_table": ["contrast_effect", "effect_matrix"],
    "control": ["ablate", "cap", "floor", "steer_where"],
    "evaluation": ["Evaluation", "correlation_interval", "evaluate", "mean_interval", "steered_answers"],
    "extraction": ["extract", "extract_from"],
    "files": ["InputError"],
    "finetuning": ["FinetuneConfig", "finetune"],
    "flag_files": ["Flags", "load_flags"],
    "flagging": ["flag"],
    "geometry": ["cosine_matrix", "layer_cosines", "logit_lens", "separation_indices"],
    "heatmaps": ["heatmap", "save_heatmaps"],
    "hooks": ["edit_blocks"],
    "interop": ["export_vector", "import_vector"],
    "inventory": ["big_five"],
    "judge": ["ContrastJudge", "LocalJudge", "PerplexityJudge", "SentimentJudge"],
    "judge_check": ["check_judge", "load_labels", "require_valid_judge"],
    "likelihood": ["likelihood_contrast", "load_statements"],
    "models": ["chat_prompt", "decoder_layers", "fold_system_role", "generate", "load_model"],
    "monitoring": ["monitor"],
    "openai_judge": ["OpenAIJudge"],
    "plot": [
        "plot_cosines",
        "plot_drift",
        "plot_history",
        "plot_scores",
        "plot_separation",
        "plot_shift",
        "plot_sweep",
        "plot_vector",
    ],
    "projection": ["project"],
    "report": ["write_report"],
    "rollouts": ["Rollout", "load_rollouts"],
    "harness": ["side_effects"],
    "samples": ["read_samples"],
    "screening": ["add_scores", "compare_datasets", "split_dataset"],
    "shifts": ["Shift", "finetuning_shift"],
    "steering": ["steer"],
    "sweeping": ["Sweep", "sweep"],
    "training": ["ProjectionCallback", "penalize"],
    "training_sets": ["make_training_sets"],
    "trait_writer": ["write_trait"],
    "traits": ["Trait", "list_traits", "load_trait"],
    "vectors": ["PersonaVector", "random_vector"],
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package is fast."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'persona_vectors' has no attribute {name!r}")
    return getattr(import_module(f"persona_vectors.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
