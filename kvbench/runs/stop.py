"""Being told to stop: the first signal asks, a second one does not wait."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # the last is what SLURM is asked to send before its limit


class StopRequest:
    """Whether someone asked this process to stop."""

    def __init__(self) -> None:
        self.number: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells say it."""
        return 128 + (self.number or 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)  # workers die with this process
        self.number = number

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopRequest]:
        """Take the signals while the block runs, then give them back to whoever had them."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
