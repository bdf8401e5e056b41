"""What of the autopsies is on the page: the same samples under every policy, in an order that a reader expects."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvbench.autopsy.page import asked_of, autopsy_section
from kvbench.autopsy.replay import GLANCE_PIXELS, glances
from kvbench.datasets.scenes import Scenes
from kvbench.report.load import load_results
from kvbench.report.samples import sample_browser
from kvbench.results.record import write_autopsy
from tests.autopsy.autopsies import PROMPT, STEPS, add_autopsies, autopsy_body, merged_array, patterns
from tests.report.synthetic import body, embedded, write_cell

IDS = ("scenes/test/2", "scenes/test/10", "scenes/test/1")


def write(folder: Path, *cells: tuple[str, float | int], ids: tuple[str, ...] = IDS, **fields: Any) -> Path:
    """Write a cell with an autopsy of `ids` for every policy and budget, a share or a number of tokens."""
    for policy, size in cells:
        labels = {"budget": f"{size} tokens", "budget_fraction": None, "budget_tokens": size} if size > 1 else {}
        record = body(policy=policy, budget=size, num_samples=1)
        record["labels"] |= labels
        path = write_cell(folder, record)
        write_autopsy(path.with_name("autopsy.json"), autopsy_body(record["key"], ids=ids, **fields))
    return folder


def section_of(folder: Path) -> str:
    return autopsy_section(load_results(folder))


def data_of(drawn: str) -> Any:
    return embedded(drawn, "autopsy-data")[0]


def views_of(data: Any) -> list[list[str]]:
    return [list(cell["views"]) for cell in data["cells"]]


def test_where_room_ends_a_sample_is_left_out_under_every_policy_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = section_of(write(tmp_path, ("h2o", 0.1), ("random", 0.1), ("elastic", 0.2)))
    data = data_of(drawn)
    assert data["ids"] == sorted(IDS, key=lambda name: int(name.rpartition("/")[2]))
    assert "no room" not in drawn
    whole = sum(
        len(text) for cell in data["cells"] for view in cell["views"].values() for text in view["freed"]["patterns"]
    )
    monkeypatch.setattr("kvbench.autopsy.page.MOST_BYTES", whole // 2)
    drawn = section_of(tmp_path)
    assert views_of(data_of(drawn)) == [["scenes/test/1"]] * 3
    assert "2 of 3 samples are in the numbers below but not in the drawings" in drawn
    assert "no room: scenes/test/2, scenes/test/10." in drawn
    monkeypatch.setattr("kvbench.autopsy.page.MOST_BYTES", 0)
    drawn = section_of(tmp_path)
    assert "ap-step" not in drawn
    assert "3 of 3 samples are in the numbers below" in drawn
    assert "mean over 3 samples" in drawn


def test_patterns_of_merging_take_room_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ("elastic", 0.1), ids=IDS[:1], merged=patterns(merged_array(1)))
    (cell,) = data_of(section_of(tmp_path))["cells"]
    freed = sum(map(len, cell["views"][IDS[0]]["freed"]["patterns"]))
    monkeypatch.setattr("kvbench.autopsy.page.MOST_BYTES", freed)
    assert "1 of 1 samples" in section_of(tmp_path)


def test_budgets_stand_by_size_whichever_policy_has_them(tmp_path: Path) -> None:
    drawn = section_of(write(tmp_path, ("elastic", 0.5), ("h2o", 0.2), ("random", 0.1), ("random", 0.5), ("h2o", 0.1)))
    assert data_of(drawn)["budgets"] == ["10 % tokens kept", "20 % tokens kept", "50 % tokens kept"]
    assert [text[:2] for text in re.findall(r"<caption>At (\d+)", drawn)] == ["10", "50"]
    tokens = section_of(write(tmp_path / "tokens", *(("h2o", size) for size in (32, 1024, 64, 128))))
    assert data_of(tokens)["budgets"] == ["32 tokens", "64 tokens", "128 tokens", "1024 tokens"]
    assert "aria-sort=none data-kind=number><button type=button>budget" in tokens


def test_different_samples_under_different_policies_are_called_so(tmp_path: Path) -> None:
    write(tmp_path, ("h2o", 0.1), ids=IDS[:1])
    assert "A few samples, the same for every policy, were" in section_of(tmp_path)
    drawn = section_of(write(tmp_path, ("random", 0.1), ids=IDS))
    assert "A few samples, not all of them under every policy, were" in drawn
    assert "mean over 1 to 3 samples" in drawn
    assert "n&nbsp;=&nbsp;1</small>" in drawn


def test_the_end_of_each_answer_is_told(tmp_path: Path) -> None:
    write_cell(tmp_path, body(num_samples=1))
    add_autopsies(tmp_path)
    drawn = section_of(tmp_path)
    assert "answer tokens" in drawn
    assert f"<td>{STEPS}<" in drawn
    assert PROMPT > STEPS


def test_every_sample_shows_what_was_asked_and_a_small_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Scenes(num_samples=4).examples()
    shown = glances(examples)
    assert [one["id"] for one in shown] == [example.id for example in examples]
    assert [one["question"] for one in shown] == [example.question for example in examples]
    for one in shown:
        picture = Image.open(io.BytesIO(base64.b64decode(one["data"])))
        assert max(picture.size) <= GLANCE_PIXELS
    full = body(policy="full", budget=None, num_samples=4)
    for sample, example in zip(full["samples"], examples, strict=True):
        sample["id"] = example.id
    path = write_cell(tmp_path, full)
    write_autopsy(path.with_name("autopsy.json"), autopsy_body(full["key"]) | {"glances": shown})
    results = load_results(tmp_path)
    asked = asked_of(results)
    drawn = sample_browser(results, asked=asked)
    data = embedded(drawn, "sample-data")
    items = data[0]["items"]
    assert {items[example.id]["question"] for example in examples} == {example.question for example in examples}
    assert all(item["picture"].startswith("data:image/") for item in items.values())
    monkeypatch.setattr("kvbench.autopsy.replay._MOST_GLANCE_BYTES", 1)
    assert [one["data"] is None for one in glances(examples)] == [False, True, True, True], "questions need no room"


def test_a_damaged_small_picture_costs_its_file_alone(tmp_path: Path) -> None:
    full = body(policy="full", budget=None, num_samples=1)
    path = write_cell(tmp_path, full)
    broken = {"id": "a", "question": "what?", "media": "text/html", "data": "PHNjcmlwdD4="}
    write_autopsy(path.with_name("autopsy.json"), autopsy_body(full["key"]) | {"glances": [broken]})
    results = load_results(tmp_path)
    assert asked_of(results) == {}
    assert "does not hold what it should" in autopsy_section(results)
