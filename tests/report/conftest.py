"""Results folders that the report tests read, and a browser that opens pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.chromium import Browser, find_chromium
from tests.report.synthetic import write_sweep


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what needs a browser a default run takes the tests marked `cover("all")`, of one page."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()) and item.get_closest_marker("cover") is None:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default sweep, 13 cells of 32 samples; tests must not write into it."""
    return write_sweep(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless Chromium for all tests of this process; they skip without one."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: none of its usual names is on PATH, and KVBENCH_CHROMIUM is not set")
    with Browser(program) as started:
        yield started
