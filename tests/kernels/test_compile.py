"""Every kernel compiles for the chip it is written for, with no more shared memory than that has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SHARED_BYTES = 227 * 1024  # per block on compute capability 9.0


@pytest.mark.long
def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.compile_all"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    names = {name for name, _ in lines}
    assert {
        "attend_part",
        "join_parts",
        "hand_out",
        "write_token",
        "free_victim",
        "project",
        "gate_up",
        "_column_mass",
        "norm_row",
        "rotate_head",
        "angles_of_row",
    } <= names
    most = max(lines, key=lambda line: int(line[1]))
    assert int(most[1]) <= SHARED_BYTES, most
