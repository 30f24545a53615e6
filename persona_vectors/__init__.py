"""Persona vectors: extract them, steer and monitor with them, flag training data (arXiv 2507.21509)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time a name is imported when it is first asked for
    from persona_vectors.data.errors import InputError
    from persona_vectors.data.intervals import correlation_interval, mean_interval
    from persona_vectors.data.samples import read_samples
    from persona_vectors.data.texts import assistant_prompts
    from persona_vectors.data.traits import Trait, list_traits, load_trait
    from persona_vectors.evaluation.answers import Evaluation, evaluate, steered_answers
    from persona_vectors.evaluation.contrast import contrast_effect, effect_matrix
    from persona_vectors.evaluation.harness import side_effects
    from persona_vectors.evaluation.inventory import big_five
    from persona_vectors.evaluation.judge_check import check_judge, load_labels, require_valid_judge
    from persona_vectors.evaluation.judges import ContrastJudge, LocalJudge, PerplexityJudge, SentimentJudge
    from persona_vectors.evaluation.likelihood import likelihood_contrast, load_statements
    from persona_vectors.evaluation.openai_judge import OpenAIJudge
    from persona_vectors.evaluation.plots import plot_scores, plot_sweep
    from persona_vectors.evaluation.sweeping import Sweep, sweep
    from persona_vectors.extraction.difference import extract, extract_from
    from persona_vectors.extraction.rollouts import Rollout, load_rollouts
    from persona_vectors.extraction.trait_writer import write_trait
    from persona_vectors.flagging.compare import compare_datasets
    from persona_vectors.flagging.parts import Flags, load_flags
    from persona_vectors.flagging.report import write_report
    from persona_vectors.flagging.run import flag
    from persona_vectors.flagging.screening import add_scores
    from persona_vectors.flagging.split import split_dataset
    from persona_vectors.model.blocks import decoder_layers
    from persona_vectors.model.generation import generate
    from persona_vectors.model.hooks import edit_blocks
    from persona_vectors.model.loading import load_model
    from persona_vectors.model.pooling import pool, pool_while_generating
    from persona_vectors.model.prompts import chat_prompt, fold_system_role
    from persona_vectors.monitoring.calibration import Calibration, calibrate
    from persona_vectors.monitoring.conversation import Chat
    from persona_vectors.monitoring.heatmaps import heatmap, save_heatmaps
    from persona_vectors.monitoring.plots import plot_drift
    from persona_vectors.monitoring.projection import project
    from persona_vectors.monitoring.trace import monitor
    from persona_vectors.steering.add import steer
    from persona_vectors.steering.backends import lens_hooks, nnsight_block, steer_trace
    from persona_vectors.steering.bounds import ablate, cap, floor, steer_where
    from persona_vectors.training.config import FinetuneConfig
    from persona_vectors.training.finetuning import finetune
    from persona_vectors.training.plots import plot_history, plot_shift
    from persona_vectors.training.sets import make_training_sets
    from persona_vectors.training.shifts import Shift, finetuning_shift
    from persona_vectors.training.watch import ProjectionCallback, penalize
    from persona_vectors.vectors.controls import covariance_vectors, random_vector, random_vectors
    from persona_vectors.vectors.exports import export_vector
    from persona_vectors.vectors.geometry import cosine_matrix, layer_cosines, logit_lens, separation_indices
    from persona_vectors.vectors.imports import import_vector
    from persona_vectors.vectors.plots import plot_cosines, plot_separation, plot_vector
    from persona_vectors.vectors.vector import PersonaVector

_WHERE = {
    "data.errors": ["InputError"],
    "data.intervals": ["correlation_interval", "mean_interval"],
    "data.samples": ["read_samples"],
    "data.texts": ["assistant_prompts"],
    "data.traits": ["Trait", "list_traits", "load_trait"],
    "evaluation.answers": ["Evaluation", "evaluate", "steered_answers"],
    "evaluation.contrast": ["contrast_effect", "effect_matrix"],
    "evaluation.harness": ["side_effects"],
    "evaluation.inventory": ["big_five"],
    "evaluation.judge_check": ["check_judge", "load_labels", "require_valid_judge"],
    "evaluation.judges": ["ContrastJudge", "LocalJudge", "PerplexityJudge", "SentimentJudge"],
    "evaluation.likelihood": ["likelihood_contrast", "load_statements"],
    "evaluation.openai_judge": ["OpenAIJudge"],
    "evaluation.plots": ["plot_scores", "plot_sweep"],
    "evaluation.sweeping": ["Sweep", "sweep"],
    "extraction.difference": ["extract", "extract_from"],
    "extraction.rollouts": ["Rollout", "load_rollouts"],
    "extraction.trait_writer": ["write_trait"],
    "flagging.compare": ["compare_datasets"],
    "flagging.parts": ["Flags", "load_flags"],
    "flagging.report": ["write_report"],
    "flagging.run": ["flag"],
    "flagging.screening": ["add_scores"],
    "flagging.split": ["split_dataset"],
    "model.blocks": ["decoder_layers"],
    "model.generation": ["generate"],
    "model.hooks": ["edit_blocks"],
    "model.loading": ["load_model"],
    "model.pooling": ["pool", "pool_while_generating"],
    "model.prompts": ["chat_prompt", "fold_system_role"],
    "monitoring.calibration": ["Calibration", "calibrate"],
    "monitoring.conversation": ["Chat"],
    "monitoring.heatmaps": ["heatmap", "save_heatmaps"],
    "monitoring.plots": ["plot_drift"],
    "monitoring.projection": ["project"],
    "monitoring.trace": ["monitor"],
    "steering.add": ["steer"],
    "steering.backends": ["lens_hooks", "nnsight_block", "steer_trace"],
    "steering.bounds": ["ablate", "cap", "floor", "steer_where"],
    "training.config": ["FinetuneConfig"],
    "training.finetuning": ["finetune"],
    "training.plots": ["plot_history", "plot_shift"],
    "training.sets": ["make_training_sets"],
    "training.shifts": ["Shift", "finetuning_shift"],
    "training.watch": ["ProjectionCallback", "penalize"],
    "vectors.controls": ["covariance_vectors", "random_vector", "random_vectors"],
    "vectors.exports": ["export_vector"],
    "vectors.geometry": ["cosine_matrix", "layer_cosines", "logit_lens", "separation_indices"],
    "vectors.imports": ["import_vector"],
    "vectors.plots": ["plot_cosines", "plot_separation", "plot_vector"],
    "vectors.vector": ["PersonaVector"],
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
