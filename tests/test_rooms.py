"""The house: which room may import which, read from the code's own imports."""

import ast
from functools import cache
from pathlib import Path

import persona_vectors

PACKAGE = Path(persona_vectors.__file__).parent
# Lowest first: a room imports from itself and from those before it.
ROOMS = (
    "data",
    "model",
    "vectors",
    "steering",
    "monitoring",
    "evaluation",
    "extraction",
    "flagging",
    "training",
    "serving",
    "studies",
    "cli",
)


@cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the rooms by its dotted name."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def imported(tree: ast.Module) -> set[str]:
    """Return the modules of the package that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    names = {name.removeprefix("persona_vectors.") for name in found if str(name).startswith("persona_vectors.")}
    return names & set(modules())


def test_rooms_import_downwards_only():
    for name, tree in modules().items():
        room = name.partition(".")[0]
        for other in imported(tree):
            above = ROOMS.index(other.partition(".")[0]) > ROOMS.index(room)
            assert not above, f"{name} imports {other}, from a room above its own"


def test_nothing_stands_on_the_studies_but_the_command_that_runs_them():
    for name, tree in modules().items():
        if not name.startswith("studies."):
            found = {other for other in imported(tree) if other.startswith("studies.")}
            assert not found or name == "cli.studies", f"{name} imports {found}"


def test_no_circle_of_modules():
    arrows = {name: imported(tree) - {name} for name, tree in modules().items()}
    while arrows:
        free = [name for name, targets in arrows.items() if not targets & set(arrows)]
        assert free, f"these import each other in a circle: {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def test_the_rooms_are_the_folders_and_hold_nothing_but_a_docstring_at_their_door():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)
    for room in ROOMS:
        (only,) = ast.parse((PACKAGE / room / "__init__.py").read_text()).body
        assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)
    entries = {path.name for path in PACKAGE.iterdir()} - {"data", "__pycache__"}
    assert len(entries) <= 14, entries


def test_no_room_bears_a_public_name():
    assert not set(ROOMS) & set(persona_vectors.__all__)


def test_files_and_functions_stay_small():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") < 250, f"{path.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines < 60, f"{path.name}: {node.name} has {lines} lines"
