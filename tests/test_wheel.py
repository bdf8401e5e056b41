"""The package list in pyproject.toml is explicit, so it must follow the tree; `make wheel-smoke` installs a wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[1]
SHARED = "hydra_plugins"  # where Hydra finds plugins of any distribution, so a package without __init__.py


def setuptools_table() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    return table


def test_every_folder_of_python_files_is_packaged() -> None:
    folders = {path.parent for path in (REPO / "kvbench").rglob("*.py")}
    folders |= {path.parent for path in (REPO / "policies").rglob("*.py")}
    names = {".".join(folder.relative_to(REPO).parts).replace("policies", "kvbench.policies") for folder in folders}
    assert set(setuptools_table()["packages"]) == names | {"kvbench.conf", SHARED}


def test_packages_are_regular_and_lie_where_the_table_says() -> None:
    places = setuptools_table()["package-dir"]
    assert places.pop(SHARED) == SHARED
    assert not (REPO / SHARED / "__init__.py").exists(), "other plugins of Hydra's would not be found beside ours"
    assert places == {"kvbench": "kvbench", "kvbench.policies": "policies", "kvbench.conf": "conf"}
    for name in set(setuptools_table()["packages"]) - {SHARED}:
        head = max((place for place in places if f"{name}.".startswith(f"{place}.")), key=len)
        folder = places[head] + name.removeprefix(head).replace(".", "/")
        assert (REPO / folder / "__init__.py").is_file(), f"{name} would not be installed as a package"


def test_every_file_that_is_not_python_is_packaged() -> None:
    data = setuptools_table()["package-data"]
    conf = {path for pattern in data["kvbench.conf"] for path in (REPO / "conf").glob(pattern)}
    assert conf == set((REPO / "conf").rglob("*.yaml"))
    package = REPO / "kvbench"
    folders = {name: REPO / name.replace(".", "/") for name in data if name != "kvbench.conf"}
    listed = {path for name, folder in folders.items() for pattern in data[name] for path in folder.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert listed == others
