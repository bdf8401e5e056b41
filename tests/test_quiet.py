from __future__ import annotations

import io

import pytest
from tqdm import tqdm

from kvbench.cli.sweep import quiet_libraries


def test_no_bar_starts_a_thread_that_wakes_up_beside_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar(tqdm):  # type: ignore[type-arg]
        """Has a monitor of its own, as others may have started one in this process."""

        monitor = None

    monkeypatch.setattr(tqdm, "monitor_interval", 10)
    quiet_libraries()
    with Bar(total=1, file=io.StringIO()):
        assert Bar.monitor is None
