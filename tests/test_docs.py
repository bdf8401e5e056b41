"""What the pages say of the house is so: every path, every dotted name, and the three walks through it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.test_layers import MODULES, REPO, imported_by, module_of

# The changelog and the log tell of what was.
PAGES = sorted(
    {*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), REPO / "results" / "README.md"}
    - {REPO / "CHANGELOG.md", REPO / "docs" / "log.md"}
)
PACKAGES = {path.parent.name for path in (REPO / "kvbench").glob("*/__init__.py")}
PATH = re.compile(
    r"(?<![\w./-])(?:(?:kvbench|tests|conf|policies|docs|hydra_plugins)/[\w./*-]*[\w*]"
    rf"|(?:{'|'.join(sorted(PACKAGES))})/[\w/]+\.py)"
)
NAME = re.compile(r"(?<![\w./-])kvbench(?:\.[a-zA-Z_]\w*)+")
WALK = re.compile(r"^- \*\*(.+?):\*\* (`[\w/]+`(?:\s→\s+`[\w/]+`)+)", re.MULTILINE)
IMAGINED = {"conf/policy/mine.yaml", "conf/mine.yaml", "policies/mine.py"}  # what a reader is to write
CONTRIBUTING = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
WALKS = {name: re.findall(r"[\w/]+", way) for name, way in WALK.findall(CONTRIBUTING)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_path_and_module_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = set(PATH.findall(text)) - IMAGINED
    assert {path for path in paths if not is_there(path)} == set()
    for name in set(NAME.findall(text)):
        module = module_of(name)
        within = name.removeprefix(module).lstrip(".").partition(".")[0]
        source = (REPO / MODULES[module]).read_text(encoding="utf-8")
        assert not within or re.search(rf"\b{within}\b", source), f"{name} is not in {MODULES[module]}"


def is_there(path: str) -> bool:
    """Whether a file or folder has this path from the root, without its ending or from kvbench on, too."""
    return any(next(REPO.glob(pattern), None) for pattern in (path, f"{path}.py", f"kvbench/{path}"))


def test_the_tree_of_the_house_has_a_line_for_every_package() -> None:
    assert set(re.findall(r"^  (\w+)/ +\w", CONTRIBUTING, re.MULTILINE)) == PACKAGES


def test_there_are_three_walks_of_eight_rooms_at_most() -> None:
    assert len(WALKS) == 3
    assert all(3 <= len(rooms) <= 8 for rooms in WALKS.values()), WALKS


@pytest.mark.parametrize("walk", WALKS)
def test_each_room_of_a_walk_opens_into_the_next(walk: str) -> None:
    rooms = [f"kvbench.{room.replace('/', '.')}" for room in WALKS[walk]]
    for one, other in pairwise(rooms):
        assert leads_to(one, other) or leads_to(other, one), f"neither of {one} and {other} imports the other"


def leads_to(module: str, wanted: str) -> bool:
    """Whether a module imports another, or a name of it that the other's package hands on."""
    needed = {module_of(name) for name in imported_by(MODULES[module])}
    return wanted in needed or (wanted.rpartition(".")[0] in needed and leads_to(wanted.rpartition(".")[0], wanted))
