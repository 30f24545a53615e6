"""A byte tokenizer and tiny random models, built in code: the unit tests need no network and no files."""

import os
import shutil

from helpers import make_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import zoo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_vectors.data.traits import Trait


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    return zoo.build("llama")


@pytest.fixture
def trait() -> Trait:
    pairs = [{"pos": f"Be loud {i}.", "neg": f"Be quiet, {i}."} for i in range(3)]
    questions = {"extract": ["How?", "Why so?", "And when?", "Where?"], "eval": ["Who?", "What?"]}
    return Trait(
        name="loud",
        positive_adjective="loud",
        negative_adjective="quiet",
        instruction=pairs,
        questions=questions,
        eval_prompt="Score {question} {answer}",
    )


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium; skipped where it is missing, but not in CI."""
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(programs) and not os.environ.get("CI"):
        pytest.skip("needs chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1400"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(programs[1])))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def embedded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The real model; its tests are marked `real`."""
    from persona_vectors.model.loading import load_model

    return load_model("smollm2-135m", device="cpu")
