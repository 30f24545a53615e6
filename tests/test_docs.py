"""README, guide and notebooks run as they stand."""

import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import execute_notebooks
import nbformat
import pytest
from helpers import ENVIRONMENT, command

from persona_vectors.model.loading import load_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.real


@pytest.mark.parametrize("page", ["README.md", "notebooks/guide.md"])
def test_a_page_s_python_blocks_run_in_order(monkeypatch, tmp_path, page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, block in enumerate(blocks):
        path = tmp_path / f"block_{number}.py"  # nnsight reads the source of a trace from its file
        path.write_text(block, encoding="utf-8")
        exec(compile(block, str(path), "exec"), namespace)


PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
asked = [{"role": "user", "content": "How was your day?"}]
ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0]))
"""


def seconds_and_output(words: list[str]) -> tuple[float, str]:
    """Run a command; return the processor's seconds, as this machine may have others' work to do, and what it says."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout


def test_the_readme_s_first_lines_end_in_a_steered_answer_about_as_soon_as_transformers_in_a_plain_one():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[0].splitlines()
    assert len(lines) == 3
    words = shlex.split(lines[-1])
    assert words[0] == "persona-vectors"
    folder = load_model("smollm2-135m")[0].name_or_path
    plain, _ = seconds_and_output([sys.executable, "-c", PLAIN, folder])
    ours, said = seconds_and_output(command(*words[1:]))
    assert said.startswith("layer 13, coef +2 | How was your day?\n") and len(said) > 80
    assert ours < 1.5 * plain


NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def outputs(cell: nbformat.NotebookNode) -> tuple[list[set[str]], str]:
    """Return what kinds of output a cell has, and its text; objects' addresses are left out."""
    kinds = [set(output.get("data", {output.output_type: ""})) for output in cell.outputs]
    texts = [output.get("text", output.get("data", {}).get("text/plain", "")) for output in cell.outputs]
    return kinds, re.sub(r"0x[0-9a-f]+", "", "".join(texts))


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_s_outputs_are_those_of_the_code(path: Path):
    """Figures, tables and words are there; numbers agree to 5 %, but where answers hang on the processor's rounding."""
    committed, fresh = nbformat.read(path, as_version=4), execute_notebooks.executed(path)
    cells = [pair for pair in zip(committed.cells, fresh.cells) if pair[0].cell_type == "code"]
    assert any("image/png" in kinds for before, _ in cells for kinds in outputs(before)[0])
    for before, after in cells:
        (kinds, text), (new_kinds, new_text) = outputs(before), outputs(after)
        assert kinds == new_kinds, before.source
        if "sampled" not in before.metadata.get("tags", []):
            assert NUMBER.sub("#", text) == NUMBER.sub("#", new_text), before.source
            numbers, new_numbers = (list(map(float, NUMBER.findall(found))) for found in (text, new_text))
            assert new_numbers == pytest.approx(numbers, rel=0.05, abs=0.05), before.source
