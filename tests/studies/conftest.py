from dataclasses import replace

import pytest
from helpers import two_vectors, use

from persona_vectors.studies.frame import run_study


@pytest.fixture
def model(model):
    """The tiny model with an output matrix of trained models' size: as built, it gives all tokens nearly the same."""
    model.get_output_embeddings().weight.data *= 30
    return model


@pytest.fixture
def vectors(model):
    """Two vectors of the tiny model, whose files recommend a layer and coefficient."""
    return [replace(v, trait=n).with_use(use()) for v, n in zip(two_vectors(model), ("optimistic", "humorous"))]


@pytest.fixture
def study(model, tokenizer, vectors, tmp_path):
    """Run a study on the tiny model: `study(name)`, in a folder that the next run of it goes on with."""
    return lambda name, **options: run_study(name, model, tokenizer, vectors, out=tmp_path, **{"size": 1, **options})
