"""What the pages name is there: links, anchors and images, commands, public names, and the files of the map."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

import persona_vectors as pv
from persona_vectors.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").rglob("*.md"))]
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return what a code host names a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_page
def test_every_relative_link_and_image_points_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        found = page.parent / path if path else page
        assert found.is_file(), f"{page.name} links {target}"
        assert not heading or heading in anchors(found), f"{page.name} links {target}"


@by_page
def test_every_command_and_public_name_of_a_page_exists(page):
    text, command = page.read_text(encoding="utf-8"), get_command(app)
    for name in re.findall(r"persona-vectors ([a-z][a-z-]*)", text):
        assert name in command.commands, f"{page.name}: persona-vectors {name}"
    for name in re.findall(r"\bpv\.([A-Za-z_]+)", text):
        assert name in pv.__all__, f"{page.name}: pv.{name}"


def test_the_readme_s_table_names_public_functions():
    rows = re.findall(r"^\| [^|]+ \| ([^|]*) \| [^|]* \| \[", prose(ROOT / "README.md"), flags=re.MULTILINE)
    names = {name for cell in rows for name in re.findall(r"`(\w+)", cell)}
    assert len(rows) > 10 and names <= set(pv.__all__), names - set(pv.__all__)


@by_page
def test_every_script_of_a_page_exists(page):
    for path in re.findall(r"\bscripts/[\w./]*\w", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_page_can_be_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        links = [
            page.parent / target for target in re.findall(r"\]\(([^)#\s]+\.md)", prose(page)) if "://" not in target
        ]
        waiting += {link.resolve() for link in links} - seen
    assert set(PAGES) <= seen


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_the_map_names_every_file_of_the_package():
    """A room's lines are those below its name, up to the next room's."""
    text = (ROOT / "notebooks" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^  (\w+)/ .*\n((?:    .*\n)+)", text, flags=re.MULTILINE)
    named = {f"{room}/{name}" for room, lines in rooms for name in re.findall(r"\b\w+\.py\b", lines)}
    package = Path(pv.__file__).parent
    there = {path.relative_to(package).as_posix() for path in package.glob("*/*.py") if path.name != "__init__.py"}
    assert named == there, f"not in the map: {sorted(there - named)}; not there: {sorted(named - there)}"
