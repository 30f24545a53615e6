"""Every way of running a model, with every verb: exactly what the plain reference says, or refused with words."""

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ways
from verbs import VERBS
from ways import Case

from persona_vectors.data.errors import InputError

WAYS: dict[str, Callable] = {
    "generate": ways.eager,
    "generate without a cache": ways.uncached,
    "static cache, compiled": ways.compiled_static,
    "forward compiled in place": ways.compiled_dynamic,
    "torch.compile(model)": ways.compiled_wrapper,
    "chunked prefill": ways.chunked_prefill,
    "assisted decoding": ways.assisted,
    "prompt lookup": ways.prompt_lookup,
    "early exit": ways.early_exit,
    "several samples of a prompt": ways.returned_sequences,
    "beam search": ways.beams,
    "continuous batching": ways.continuous,
    "finished text, padded": ways.finished_text,
    "packed, position_ids": ways.packed_positions,
    "packed, cu_seq_lens": ways.packed_bounds,
    "training": ways.training,
    "checkpointing, reentrant": ways.checkpointing_reentrant,
    "checkpointing": ways.checkpointing_plain,
    "DDP": ways.ddp,
    "FSDP2": ways.fsdp2,
    "two LoRA adapters": ways.adapters,
    "LoRA merged": ways.merged,
    "prompt tuning, text": ways.prompt_tuning,
    "prompt tuning, generate": ways.prompt_tuning_generation,
    "prefix tuning": ways.prefix_tuning,
    "bfloat16": ways.bfloat16,
    "int8 (torchao)": ways.int8,
    "offloaded to disk": ways.offloaded,
    "keys shared between blocks": ways.shared_keys,
    "two threads": ways.two_threads,
}
HEAD = """\
# Ways of running a model

Every way of running a model, with every verb, on tiny random models: "exact" means that logits, greedy tokens or values
equal those of each sequence read alone, edited by one plain hook; a letter is a refusal, whose words are below. Written
by `PYTHONPATH=tests:tests/conformance python tests/conformance/test_conformance.py`; the tests run all of it again.
"""
PAGE = Path(__file__).parents[2] / "notebooks" / "conformance.md"


REFUSALS = ("never ran", "went through the hooked decoder")


def outcomes(way: Callable, folder: Path) -> dict[str, str]:
    """Return each verb's end, in one and the same model: "exact", or the message of the refusal."""
    arguments = [folder / "weights"] if inspect.signature(way).parameters else []
    with warnings.catch_warnings(), way(*arguments) as case:
        warnings.simplefilter("ignore")
        return {name: outcome(verb, case) for name, verb in VERBS.items()}


def outcome(verb: Callable[[Case], None], case: Case) -> str:
    try:
        verb(case)
    except (InputError, RuntimeError) as error:
        if isinstance(error, InputError) or any(words in str(error) for words in REFUSALS):
            return re.sub(r"\[\d+, \d+\]", "[batch, token]", str(error))
        raise
    return "exact"


def table() -> dict[str, dict[str, str]]:
    """Return the committed table: for each way and verb "exact", or a letter of the refusals below it."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(heads[1:], row[1:])) for row in rows}


def refusals() -> dict[str, str]:
    """Return the page's refusals by letter."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return dict(line.removeprefix("- ").split(": ", 1) for line in lines if line.startswith("- "))


@pytest.mark.parametrize("way", WAYS)
def test_it_is_exact_or_refused_with_words(way: str, tmp_path: Path):
    if "torchao" in way:
        pytest.importorskip("torchao")
    found, letters = outcomes(WAYS[way], tmp_path), refusals()
    assert found == {verb: letters.get(cell, cell) for verb, cell in table()[way].items()}


def test_the_table_is_whole():
    found = table()
    assert list(found) == list(WAYS) and all(list(row) == list(VERBS) for row in found.values())
    assert len(WAYS) >= 18 and len(VERBS) >= 8
    assert {cell for row in found.values() for cell in row.values()} == {"exact", *refusals()}


def main() -> None:
    """Write the page anew, with torchao installed; HEAD has the command."""
    found = {}
    for way, run in WAYS.items():
        with TemporaryDirectory() as folder:
            found[way] = outcomes(run, Path(folder))
    messages = dict.fromkeys(cell for row in found.values() for cell in row.values() if cell != "exact")
    letters = {message: chr(ord("a") + i) for i, message in enumerate(messages)} | {"exact": "exact"}
    lines = [HEAD, "| way of running | " + " | ".join(VERBS) + " |", "|---" * (len(VERBS) + 1) + "|"]
    lines += [f"| {way} | " + " | ".join(letters[cell] for cell in row.values()) + " |" for way, row in found.items()]
    lines += ["", "Refused, with these words:", ""]
    lines += [f"- {letter}: {message}" for message, letter in letters.items() if message != "exact"]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
