from dataclasses import replace

import pytest
from helpers import random_direction, use

from persona_vectors.studies.frame import run_study


@pytest.fixture
def vectors(model):
    """Two vectors of the tiny model, whose files recommend a layer and coefficient."""
    one, other = random_direction(model), -1 * random_direction(model)
    return [replace(v, trait=name).with_use(use()) for v, name in ((one, "optimistic"), (other, "humorous"))]


@pytest.fixture
def study(model, tokenizer, vectors, tmp_path):
    """Run a study on the tiny model: `study(name)`, in a folder that the next run of it goes on with."""
    return lambda name, **options: run_study(name, model, tokenizer, vectors, out=tmp_path, **{"size": 1, **options})
