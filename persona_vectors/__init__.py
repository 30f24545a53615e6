"""Persona vectors: extract them, steer and monitor with them, flag training data (arXiv 2507.21509)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time a name is imported when it is first asked for
    from persona_vectors.data.files import InputError
    from persona_vectors.data.samples import read_samples
    from persona_vectors.data.traits import Trait, list_traits, load_trait
    from persona_vectors.evaluation.answers import (
        Evaluation,
        correlation_interval,
        evaluate,
        mean_interval,
        steered_answers,
    )
    from persona_vectors.evaluation.contrast import contrast_effect, effect_matrix
    from persona_vectors.evaluation.controls import assistant_prompts, covariance_vectors, random_vectors
    from persona_vectors.evaluation.harness import side_effects
    from persona_vectors.evaluation.inventory import big_five
    from persona_vectors.evaluation.judge import ContrastJudge, LocalJudge, PerplexityJudge, SentimentJudge
    from persona_vectors.evaluation.judge_check import check_judge, load_labels, require_valid_judge
    from persona_vectors.evaluation.likelihood import likelihood_contrast, load_statements
    from persona_vectors.evaluation.openai_judge import OpenAIJudge
    from persona_vectors.evaluation.plots import (
        plot_cosines,
        plot_drift,
        plot_history,
        plot_scores,
        plot_separation,
        plot_shift,
        plot_sweep,
        plot_vector,
    )
    from persona_vectors.evaluation.sweeping import Sweep, sweep
    from persona_vectors.extraction.difference import extract, extract_from
    from persona_vectors.extraction.rollouts import Rollout, load_rollouts
    from persona_vectors.extraction.trait_writer import write_trait
    from persona_vectors.flagging.parts import Flags, load_flags
    from persona_vectors.flagging.report import write_report
    from persona_vectors.flagging.run import flag
    from persona_vectors.flagging.screening import add_scores, compare_datasets, split_dataset
    from persona_vectors.model.activations import pool, pool_while_generating
    from persona_vectors.model.hooks import edit_blocks
    from persona_vectors.model.models import chat_prompt, decoder_layers, fold_system_role, generate, load_model
    from persona_vectors.monitoring.calibration import Calibration, calibrate
    from persona_vectors.monitoring.conversation import Chat
    from persona_vectors.monitoring.heatmaps import heatmap, save_heatmaps
    from persona_vectors.monitoring.projection import project
    from persona_vectors.monitoring.trace import monitor
    from persona_vectors.steering.add import steer
    from persona_vectors.steering.backends import lens_hooks, nnsight_block, steer_trace
    from persona_vectors.steering.bounds import ablate, cap, floor, steer_where
    from persona_vectors.training.finetuning import FinetuneConfig, finetune
    from persona_vectors.training.sets import make_training_sets
    from persona_vectors.training.shifts import Shift, finetuning_shift
    from persona_vectors.training.watch import ProjectionCallback, penalize
    from persona_vectors.vectors.formats import export_vector, import_vector
    from persona_vectors.vectors.geometry import cosine_matrix, layer_cosines, logit_lens, separation_indices
    from persona_vectors.vectors.vector import PersonaVector, random_vector

_WHERE = {
    "model.activations": ["pool", "pool_while_generating"],
    "steering.backends": ["lens_hooks", "nnsight_block", "steer_trace"],
    "evaluation.controls": ["assistant_prompts", "covariance_vectors", "random_vectors"],
    "monitoring.calibration": ["Calibration", "calibrate"],
    "monitoring.conversation": ["Chat"],
    "evaluation.contrast": ["contrast_effect", "effect_matrix"],
    "steering.bounds": ["ablate", "cap", "floor", "steer_where"],
    "evaluation.answers": ["Evaluation", "correlation_interval", "evaluate", "mean_interval", "steered_answers"],
    "extraction.difference": ["extract", "extract_from"],
    "data.files": ["InputError"],
    "training.finetuning": ["FinetuneConfig", "finetune"],
    "flagging.parts": ["Flags", "load_flags"],
    "flagging.run": ["flag"],
    "vectors.geometry": ["cosine_matrix", "layer_cosines", "logit_lens", "separation_indices"],
    "monitoring.heatmaps": ["heatmap", "save_heatmaps"],
    "model.hooks": ["edit_blocks"],
    "vectors.formats": ["export_vector", "import_vector"],
    "evaluation.inventory": ["big_five"],
    "evaluation.judge": ["ContrastJudge", "LocalJudge", "PerplexityJudge", "SentimentJudge"],
    "evaluation.judge_check": ["check_judge", "load_labels", "require_valid_judge"],
    "evaluation.likelihood": ["likelihood_contrast", "load_statements"],
    "model.models": ["chat_prompt", "decoder_layers", "fold_system_role", "generate", "load_model"],
    "monitoring.trace": ["monitor"],
    "evaluation.openai_judge": ["OpenAIJudge"],
    "evaluation.plots": [
        "plot_cosines",
        "plot_drift",
        "plot_history",
        "plot_scores",
        "plot_separation",
        "plot_shift",
        "plot_sweep",
        "plot_vector",
    ],
    "monitoring.projection": ["project"],
    "flagging.report": ["write_report"],
    "extraction.rollouts": ["Rollout", "load_rollouts"],
    "evaluation.harness": ["side_effects"],
    "data.samples": ["read_samples"],
    "flagging.screening": ["add_scores", "compare_datasets", "split_dataset"],
    "training.shifts": ["Shift", "finetuning_shift"],
    "steering.add": ["steer"],
    "evaluation.sweeping": ["Sweep", "sweep"],
    "training.watch": ["ProjectionCallback", "penalize"],
    "training.sets": ["make_training_sets"],
    "extraction.trait_writer": ["write_trait"],
    "data.traits": ["Trait", "list_traits", "load_trait"],
    "vectors.vector": ["PersonaVector", "random_vector"],
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
