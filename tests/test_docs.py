"""README and notebooks run as they stand."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.real


def test_the_readme_s_python_blocks_run_in_order(monkeypatch, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vectors").symlink_to(ROOT / "vectors")
    namespace: dict = {}
    for number, block in enumerate(blocks):
        path = tmp_path / f"block_{number}.py"  # nnsight reads the source of a trace from its file
        path.write_text(block, encoding="utf-8")
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
