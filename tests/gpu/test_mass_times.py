"""The measuring of tiles runs from end to end, shrunk to the interpreter, and compares with another version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kvbench.kernels import prefill
from kvbench.kernels.dispatch import kernels_forced
from kvbench.kernels.prefill import Tiles
from tests.gpu.mass_times import HEADER, TILES, measured, other_version, plain_chunk, rows_of

SHAPE = (1, 1, 2, 16, 40)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")
def test_every_tile_is_timed_beside_another_version_and_gives_the_same_mass(tmp_path: Path) -> None:
    copy = tmp_path / "prefill.py"
    copy.write_text(Path(prefill.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    tiles = {"small": Tiles(block_q=16, block_k=16, num_warps=4, num_stages=1), "none": None}
    with kernels_forced(True):
        arms = measured(plain_chunk(SHAPE, "cpu"), tiles, other_version(copy), rounds=2, repeats=1)  # type: ignore[arg-type]
    assert [arm.name for arm in arms] == ["mass as it stands", "mass of the other version", "small", "none"]
    for arm in arms[:-1]:
        assert arm.difference is not None
        assert arm.difference < 1e-6
        assert len(arm.times_ms) == 2
    assert "AttributeError" in arms[-1].error
    rows = rows_of("tiny", SHAPE, arms)
    assert {len(row) for row in rows} == {len(HEADER)}


def test_the_tiles_in_use_are_among_those_that_are_tried() -> None:
    for entries in (900, 32_768):
        query = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
        assert prefill.mass_tiles_for(query, entries, "mean") in TILES.values()
