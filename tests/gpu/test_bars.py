"""The measuring script runs from end to end, shrunk to a CPU: every part gives its rows."""

from __future__ import annotations

import math

from kvbench.models.spec import ModelSpec
from tests.gpu.bars import Scale, markdown, measure
from tests.models.architectures import small_spec

NAMES = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b", "8b": "llama-3.1-8b"}


def small(name: str) -> ModelSpec:
    return small_spec(NAMES[name])


def test_every_bar_is_measured_by_one_call() -> None:
    paper = [("7b", 2, 40, 4), ("13b", 1, 40, 4)]
    scale = Scale(
        device="cpu",
        engine="eager",
        prompt_tokens=60,
        long_prompt_tokens=200,
        batches=(1, 2),
        new_tokens=4,
        paper=paper,
        spec=small,
    )
    rows = list(measure(scale))
    failed = [row for row in rows if row.value is None or not math.isfinite(row.value)]
    assert not failed
    bars = {row.bar for row in rows}
    assert bars == {">= 0.80", "<= 3 s", "<= 0.03", "<= 1.05", "<= 1.03", "runs", "measured"}
    assert len({row.figure for row in rows}) == len(rows)
    assert markdown(rows).count("\n") == len(rows) + 2


def test_a_part_that_fails_is_a_row_and_the_rest_goes_on() -> None:
    scale = Scale(device="cpu", engine="eager", prompt_tokens=60, long_prompt_tokens=90, batches=(), spec=small)
    scale.paper = []
    rows = list(measure(scale))
    assert any(row.value is None and "prefill_rows" in row.figure for row in rows)
    assert rows[-1].bar == "runs"
    assert rows[-1].met
