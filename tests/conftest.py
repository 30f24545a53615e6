"""A byte tokenizer and tiny random models, built in code: the unit tests need no network and no files."""

import marshal
import os
import shutil
import sys
from pathlib import Path

from helpers import make_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import zoo
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_vectors.data.traits import Trait

ROOT = Path(__file__).parents[1]
NOT_OURS = {".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"}
BEFORE, FAULTS = pytest.StashKey[set[str]](), pytest.StashKey[list[str]]()


def checkout_files() -> set[str]:
    """Return the names of the checkout's files, without those that tools keep for themselves."""
    found = set()
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        found |= {os.path.relpath(os.path.join(folder, name), ROOT) for name in names if name not in NOT_OURS}
    return found


def broken_bytecode() -> list[str]:
    """Return the .pyc files beside our modules that Python would fail to load in every later process."""
    broken = []
    for path in [path for room in ("persona_vectors", "tests") for path in (ROOT / room).rglob("*.pyc")]:
        try:
            if sys.implementation.cache_tag in path.name:  # another Python's are not ours to read
                marshal.loads(path.read_bytes()[16:])
        except (EOFError, ValueError, TypeError):
            broken.append(str(path.relative_to(ROOT)))
        except FileNotFoundError:  # written anew by somebody else, under another name first
            continue
    return broken


def pytest_sessionstart(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # xdist's workers come and go; the controller sees them all end
        session.config.stash[BEFORE] = checkout_files()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run where it leaves something behind: files in the checkout, or bytecode that is cut short."""
    if BEFORE not in session.config.stash:
        return
    before, after = session.config.stash[BEFORE], checkout_files()
    faults = [f"{name}: left in the checkout; write it to tmp_path" for name in sorted(after - before)]
    faults += [f"{name}: gone from the checkout; work on a copy" for name in sorted(before - after)]
    advice = "remove it, and run the test's program with helpers.run_with_file_limit"
    faults += [f"{name}: bytecode that cannot be loaded; {advice}" for name in broken_bytecode()]
    session.config.stash[FAULTS] = faults
    if faults and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    faults = terminalreporter.config.stash.get(FAULTS, [])
    if faults:
        terminalreporter.section("what the run left behind", red=True, bold=True)
        for fault in faults:
            terminalreporter.line(f"FAILED {fault}", red=True)


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
