"""Policies that go wrong in every way a process can; a worker finds them by `_target_`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class Faulty(ScorePolicy):
    """Does `fault` when it scores; `only_once` names a file that stops it from doing so again."""

    fault: str
    only_once: str | None = None

    def score(self, view: View) -> Tensor:
        if self.only_once is None or not Path(self.only_once).exists():
            if self.only_once is not None:
                Path(self.only_once).touch()
            getattr(self, f"_{self.fault}")(view)
        return view.position.float()

    def _sigkill(self, view: View) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _sigterm(self, view: View) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _sys_exit(self, view: View) -> None:
        sys.exit(0)

    def _os_exit(self, view: View) -> None:
        os._exit(0)

    def _segfault(self, view: View) -> None:
        ctypes.string_at(0)

    def _oom(self, view: View) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def _not_finite(self, view: View) -> None:
        view.keys.numpy().fill(float("nan"))  # by torch's own operations it would be refused

    def _raises(self, view: View) -> None:
        raise ZeroDivisionError("on purpose")

    def _loops(self, view: View) -> Any:
        while True:
            time.sleep(0.01)
