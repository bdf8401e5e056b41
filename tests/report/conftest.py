"""A browser that opens pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.report.chromium import Browser, find_chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what needs a browser a default run takes the tests marked `cover("all")`, of one page."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()) and item.get_closest_marker("cover") is None:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One headless Chromium for all tests of this process; they skip without one."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium: none of its usual names is on PATH, and KVBENCH_CHROMIUM is not set")
    with Browser(program) as started:
        yield started
