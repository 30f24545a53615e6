"""Flagging: judge training data before training, by projection difference on persona vectors (paper, section 6)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from persona_vectors.data.files import writing
from persona_vectors.data.samples import Source
from persona_vectors.evaluation.served import Generate
from persona_vectors.flagging.job import Job
from persona_vectors.flagging.parts import Flags
from persona_vectors.model.actors import Elsewhere, here_or_elsewhere
from persona_vectors.model.blocks import Layer, Model
from persona_vectors.vectors.directions import layer_for, vector_list
from persona_vectors.vectors.vector import PersonaVector


def flag(
    model: Model | str | Path | Elsewhere,
    tokenizer: PreTrainedTokenizerBase,
    data: Source,
    vectors: PersonaVector | Sequence[PersonaVector],
    *,
    layer: Layer | None = None,
    out: str | Path,
    score: str = "projection",
    baseline: str = "generate",
    answers: Source | None = None,
    columns: tuple[str, str] | None = None,
    split: str = "train",
    turns: str = "last",
    on_error: str = "stop",
    max_length: int | None = None,
    max_new_tokens: int = 256,
    positions: str = "all",
    reference: Source | None = None,
    threshold: float | None = None,
    percentile: float | None = None,
    controls: int = 100,
    labels: str | None = None,
    cache: str | Path | None = None,
    batch_tokens: int | None = None,
    chunk: int = 256,
    workers: int = 1,
    gpus_per_worker: float | None = None,
    generate: Generate | None = None,
) -> Flags:
    """Score every sample of a dataset by its projection difference on each vector, into the Parquet file `out`.

    A score is the mean projection on v/|v| of the answer's tokens less its `baseline`: that of the model's own greedy
    answer ("generate", kept in the file `cache` by prompt; with `generate`, say an `OpenAIGenerator`, made there), of
    the prompt's last token ("prompt_last", the paper's shortcut), or "none"; or of the answer that `answers`, in any
    form of `read_samples`, gives to the prompt. `positions` is what of both is read: "all", "answer" or "reasoning".
    `score="gradient"` is the slope of the answer's log-probability along v/|v|, where training on it pulls at first.

    `data` is what `read_samples` takes, with `columns` and `split`; `turns="all"` gives every answer of a conversation
    a row, as training learns them all. What is no sample ends the run, or with `on_error="skip"` is counted. Samples
    longer than `max_length` (the context unless given) are cut and marked. Each row has each vector's `_projection`,
    `_baseline`, `_difference` and `_percentile`, among the differences of `reference` (neutral samples, or their flags)
    or else of the dataset. `flagged` is set from `threshold` on, a difference, or from `percentile` on, 95 where there
    is a `reference`. With several layers: `trait@layer`; without any, the one that the vectors' files recommend.

    `controls` random directions are read in the same passes: half isotropic, half with the covariance of the mean
    activations of `reference`, else of 16 answers on plain facts. The summary says how many the vector surpasses,
    with several layers also at their best ones. `labels` names a column with a truth value for each record, or null:
    how well each vector tells them apart (AUROC) then stands beside those directions, length and VADER's sentiment.

    A killed run goes on from `out`.parts, `chunk` samples at a time. `workers` > 1 are Ray actors with a model each,
    a copy; a Hub id or a folder each loads itself. Raises InputError for what does not fit, and another run's `out`.
    """
    asked: dict[str, Any] = {**locals(), "vectors": vector_list(vectors), "out": Path(out)}
    asked |= {"model": here_or_elsewhere(model, gpus_per_worker=gpus_per_worker)}
    asked |= {"layer": layer_for(asked["vectors"], layer, purpose="flag")}
    asked |= {"baseline": "none" if score == "gradient" else baseline}
    with writing(out):
        return Job(**asked).flags()
