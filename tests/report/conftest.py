"""Results folders that the report tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.synthetic import write_sweep


@pytest.fixture(scope="session")
def sweep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default sweep, 13 cells of 32 samples; tests must not write into it."""
    return write_sweep(tmp_path_factory.mktemp("results"))
