"""Persona vectors: extract them, steer and monitor with them, flag training data (arXiv 2507.21509)."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

# tqdm's, in a notebook without ipywidgets, where its bars are text
warnings.filterwarnings("ignore", "IProgress not found")

if TYPE_CHECKING:  # for editors and type checkers; at run time a name is imported when it is first asked for
    from persona_vectors.data.errors import InputError
    from persona_vectors.data.intervals import Interval, bootstrap
    from persona_vectors.data.progress import show_progress
    from persona_vectors.data.samples import read_samples
    from persona_vectors.data.traits import Trait, list_traits, load_trait
    from persona_vectors.evaluation.answers import Evaluation, evaluate
    from persona_vectors.evaluation.check import check_judge
    from persona_vectors.evaluation.contrast import contrast_effect
    from persona_vectors.evaluation.cost import coef_at_kl
    from persona_vectors.evaluation.harness import side_effects
    from persona_vectors.evaluation.inspecting import inspect_model, inspect_scorer
    from persona_vectors.evaluation.inventory import big_five
    from persona_vectors.evaluation.judge import Answer
    from persona_vectors.evaluation.judges import ContrastJudge, LocalJudge, SentimentJudge
    from persona_vectors.evaluation.likelihood import Statements, likelihood_contrast, load_statements
    from persona_vectors.evaluation.openai_generator import OpenAIGenerator
    from persona_vectors.evaluation.openai_judge import OpenAIJudge
    from persona_vectors.evaluation.plots import plot_sweep
    from persona_vectors.evaluation.points import Sweep
    from persona_vectors.evaluation.served import Completion
    from persona_vectors.evaluation.sweeping import sweep
    from persona_vectors.evaluation.worker_generator import WorkerGenerator
    from persona_vectors.extraction.diagnosis import Diagnosis, diagnose
    from persona_vectors.extraction.difference import extract, extract_from, extract_poolings_from
    from persona_vectors.extraction.rollouts import load_rollouts
    from persona_vectors.extraction.trait_writer import write_trait
    from persona_vectors.flagging.compare import compare_datasets
    from persona_vectors.flagging.parts import Flags
    from persona_vectors.flagging.report import write_report
    from persona_vectors.flagging.run import flag
    from persona_vectors.flagging.split import split_dataset
    from persona_vectors.model.generation import generate
    from persona_vectors.model.hooks import edit_blocks
    from persona_vectors.model.loading import load_model
    from persona_vectors.model.pooling import pool
    from persona_vectors.model.prompts import break_special_tokens, chat_prompt, fold_system_role, with_template_options
    from persona_vectors.model.thoughts import Span
    from persona_vectors.monitoring.calibration import calibrate
    from persona_vectors.monitoring.heatmaps import heatmap
    from persona_vectors.monitoring.percentiles import Calibration
    from persona_vectors.monitoring.projection import project
    from persona_vectors.monitoring.trace import monitor
    from persona_vectors.serving.notebook import playground
    from persona_vectors.steering.add import RowEdit, steer, steer_rows
    from persona_vectors.steering.backends import lens_hooks, steer_trace
    from persona_vectors.steering.bounds import ablate, cap, floor, rotate, steer_where
    from persona_vectors.steering.nearest import nearest_coef
    from persona_vectors.training.config import FinetuneConfig, load_config
    from persona_vectors.training.finetuning import finetune
    from persona_vectors.training.sets import make_training_sets
    from persona_vectors.training.shifts import Shift, finetuning_shift
    from persona_vectors.training.watch import ProjectionCallback, penalize
    from persona_vectors.vectors.controls import random_vector
    from persona_vectors.vectors.exports import export_vector
    from persona_vectors.vectors.geometry import logit_lens, orthogonalize
    from persona_vectors.vectors.imports import import_vector
    from persona_vectors.vectors.moments import Moments, neutral_moments
    from persona_vectors.vectors.plots import plot_vector
    from persona_vectors.vectors.shipped import list_vectors, load_vector
    from persona_vectors.vectors.vector import PersonaVector

_WHERE = {
    "data.errors": ["InputError"],
    "data.intervals": ["Interval", "bootstrap"],
    "data.progress": ["show_progress"],
    "data.samples": ["read_samples"],
    "data.traits": ["Trait", "list_traits", "load_trait"],
    "evaluation.answers": ["Evaluation", "evaluate"],
    "evaluation.check": ["check_judge"],
    "evaluation.contrast": ["contrast_effect"],
    "evaluation.cost": ["coef_at_kl"],
    "evaluation.harness": ["side_effects"],
    "evaluation.inspecting": ["inspect_model", "inspect_scorer"],
    "evaluation.inventory": ["big_five"],
    "evaluation.judge": ["Answer"],
    "evaluation.judges": ["ContrastJudge", "LocalJudge", "SentimentJudge"],
    "evaluation.likelihood": ["Statements", "likelihood_contrast", "load_statements"],
    "evaluation.openai_generator": ["OpenAIGenerator"],
    "evaluation.worker_generator": ["WorkerGenerator"],
    "evaluation.openai_judge": ["OpenAIJudge"],
    "evaluation.plots": ["plot_sweep"],
    "evaluation.points": ["Sweep"],
    "evaluation.served": ["Completion"],
    "evaluation.sweeping": ["sweep"],
    "extraction.diagnosis": ["Diagnosis", "diagnose"],
    "extraction.difference": ["extract", "extract_from", "extract_poolings_from"],
    "extraction.rollouts": ["load_rollouts"],
    "extraction.trait_writer": ["write_trait"],
    "flagging.compare": ["compare_datasets"],
    "flagging.parts": ["Flags"],
    "flagging.report": ["write_report"],
    "flagging.run": ["flag"],
    "flagging.split": ["split_dataset"],
    "model.generation": ["generate"],
    "model.hooks": ["edit_blocks"],
    "model.loading": ["load_model"],
    "model.pooling": ["pool"],
    "model.prompts": ["break_special_tokens", "chat_prompt", "fold_system_role", "with_template_options"],
    "model.thoughts": ["Span"],
    "monitoring.calibration": ["calibrate"],
    "monitoring.heatmaps": ["heatmap"],
    "monitoring.percentiles": ["Calibration"],
    "monitoring.projection": ["project"],
    "monitoring.trace": ["monitor"],
    "serving.notebook": ["playground"],
    "steering.add": ["RowEdit", "steer", "steer_rows"],
    "steering.backends": ["lens_hooks", "steer_trace"],
    "steering.bounds": ["ablate", "cap", "floor", "rotate", "steer_where"],
    "steering.nearest": ["nearest_coef"],
    "training.config": ["FinetuneConfig", "load_config"],
    "training.finetuning": ["finetune"],
    "training.sets": ["make_training_sets"],
    "training.shifts": ["Shift", "finetuning_shift"],
    "training.watch": ["ProjectionCallback", "penalize"],
    "vectors.controls": ["random_vector"],
    "vectors.exports": ["export_vector"],
    "vectors.geometry": ["logit_lens", "orthogonalize"],
    "vectors.imports": ["import_vector"],
    "vectors.moments": ["Moments", "neutral_moments"],
    "vectors.plots": ["plot_vector"],
    "vectors.shipped": ["list_vectors", "load_vector"],
    "vectors.vector": ["PersonaVector"],
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that importing the package is fast."""
    if name == "__version__":
        return import_module("importlib.metadata").version("persona-vectors-toolkit")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'persona_vectors' has no attribute {name!r}")
    return getattr(import_module(f"persona_vectors.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
