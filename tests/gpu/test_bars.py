"""The measuring script runs from end to end, shrunk to a CPU: every part gives its rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from kvbench.errors import ModelSupportError
from kvbench.models.spec import ModelSpec
from tests.gpu import bars
from tests.gpu.bars import Scale, markdown, measure
from tests.models.architectures import small_spec

NAMES = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b", "8b": "llama-3.1-8b"}


def small(name: str) -> ModelSpec:
    return small_spec(NAMES[name])


_OTHERS = ("h2o", "elastic", "snapkv", "streaming_llm")
LONG = ["h2o, 8b, 90 tokens"]
LONG += [f"{kind} of {label} over full, 8b, 90 tokens" for kind in ("TTFT", "TPOT") for label in _OTHERS]


@pytest.mark.long
def test_every_bar_is_measured_by_one_call() -> None:
    paper = [("7b", 2, 40, 4), ("13b", 1, 40, 4)]
    scale = Scale(
        device="cpu",
        engine="eager",
        prompt_tokens=60,
        long_prompt_tokens=200,
        long_new_tokens=4,
        batches=(1, 2),
        new_tokens=4,
        peer_tokens=4,
        compiler="eager",
        paper=paper,
        first={"7b": (2, 60, {"h2o": 9.0, "streaming_llm": 9.0}), "8b": (1, 90, {"elastic": 9.0})},
        spec=small,
    )
    rows = list(measure(scale))
    failed = [row for row in rows if row.value is None or not math.isfinite(row.value)]
    assert not failed
    bars = {row.bar for row in rows if not row.bar.startswith(">= ")}
    assert bars == {
        "<= 3 s",
        "<= 0.03",
        "<= 1.05",
        "<= 1.01",
        "<= 1.02",
        "<= 1.15",
        "< 1",
        "<= 9.0",
        "runs",
        "measured",
    }
    shares = {row.figure.removeprefix("roof share, "): row.value for row in rows if "roof share" in row.figure}
    assert {"full, 7b B1", "h2o, 13b B2", "full, 8b B1 90", "elastic, 8b B1 90", "streaming_llm, 7b B2 60"} <= set(
        shares
    )
    assert len({row.figure for row in rows}) == len(rows)
    assert markdown(rows).count("\n") == len(rows) + 2


@pytest.mark.long
def test_a_part_that_fails_is_a_row_and_the_rest_goes_on() -> None:
    scale = Scale(
        device="cpu", engine="eager", prompt_tokens=60, long_prompt_tokens=90, long_new_tokens=4, batches=(), spec=small
    )
    scale.paper = []
    rows = list(measure(scale, part_names=["prefill", "long"]))
    assert any(row.value is None and "prefill_rows" in row.figure for row in rows)
    (whole,) = [row for row in rows if row.bar == "runs"]
    assert whole.met


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_is_a_row_and_the_next_is_measured() -> None:
    def spec(name: str) -> ModelSpec:
        if name == "13b":
            raise ModelSupportError("no such model")
        return small(name)

    scale = Scale(device="cpu", engine="eager", prompt_tokens=60, long_prompt_tokens=90, long_new_tokens=4, spec=spec)
    rows = list(measure(scale, ["13b", "8b"], ["decode", "paper", "long"]))
    assert [row.figure for row in rows] == ["load, 13b", *LONG]
    assert rows[0].note == "ModelSupportError: no such model"


def test_the_command_takes_some_of_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Scale(device="cpu", engine="eager", prompt_tokens=60, long_prompt_tokens=90, long_new_tokens=4, spec=small)
    monkeypatch.setattr(bars, "Scale", lambda: scale)
    monkeypatch.setattr(
        "sys.argv", ["bars", "--out", str(tmp_path), "--models", "8b", "--parts", "long", "--batches", "2"]
    )
    bars.main()
    content = json.loads((tmp_path / "bars.json").read_text(encoding="utf-8"))
    assert [row["figure"] for row in content["rows"]] == LONG
    assert content["environment"]["device"] == "cpu"
    assert scale.batches == (2,)
