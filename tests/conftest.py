"""A byte tokenizer and tiny random models, built in code: the unit tests need no network and no files."""

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from persona_vectors.data.traits import Trait

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<system>", "<user>", "<assistant>"]


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """Return a tokenizer with one token a byte, 256 of them, and the six of SPECIALS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIALS + letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


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
    from persona_vectors.model.models import load_model

    return load_model("smollm2-135m", device="cpu")
