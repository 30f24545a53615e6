import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import persona_vectors

ROOT = Path(__file__).parent.parent


def test_the_wheel_brings_its_data_and_its_command(tmp_path):
    def run(*arguments: str, **options):
        return subprocess.run(
            [sys.executable, *arguments], check=True, capture_output=True, text=True, **options
        ).stdout

    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), cwd=ROOT)
    wheel = next(tmp_path.glob("*.whl"))
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel))
    elsewhere = {"env": {**os.environ, "PYTHONPATH": str(tmp_path / "site")}, "cwd": tmp_path}
    assert str(tmp_path) in run("-c", "import persona_vectors; print(persona_vectors.__file__)", **elsewhere)
    assert "optimistic" in run("-c", "from persona_vectors.cli.main import main; main()", "traits", **elsewhere)
    load = "import persona_vectors as pv; print(pv.list_vectors(), pv.load_vector('smollm2-135m/optimistic'))"
    shipped = run("-c", load, **elsewhere)
    assert shipped.count("smollm2-135m/") == 7 and "PersonaVector('optimistic', 30 layers x 576" in shipped
    assert (tmp_path / "site" / "persona_vectors" / "py.typed").exists()
    assert (tmp_path / "site" / "bin" / "persona-vectors").exists()
    assert not (tmp_path / "site" / "tests").exists()


def test_every_public_name_can_be_imported_and_is_known_to_type_checkers():
    tree = ast.parse((ROOT / "persona_vectors" / "__init__.py").read_text())
    typed = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"import_module", "TYPE_CHECKING", "Any"} == set(persona_vectors.__all__)
    for name in persona_vectors.__all__:
        assert getattr(persona_vectors, name).__doc__


def test_no_model_family_is_named_in_the_code():
    for path in (ROOT / "persona_vectors").rglob("*.py"):
        assert not re.search(r"\b(qwen|llama(?!\.cpp)|gemma|mistral)", path.read_text(), re.IGNORECASE), path


def test_no_module_hides_a_public_name():
    modules = {path.stem for path in (ROOT / "persona_vectors").rglob("*.py")}
    assert not modules & set(persona_vectors.__all__)
