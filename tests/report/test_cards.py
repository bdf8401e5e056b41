"""Reproduction cards: published numbers, our figures beside them, and a verdict that can be either."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from kvbench.measures import MEASURES
from kvbench.report.cards import card_text, main, verdict, write_cards
from kvbench.report.load import Estimate, load_results
from tests.report.synthetic import body, write_cell

REPO = Path(__file__).parents[2]
PUBLISHED = json.loads((files("kvbench.report") / "published.json").read_text(encoding="utf-8"))
TABLE = {
    "title": "Perplexity",
    "source": "a paper, Table 1",
    "command": "kvbench policy=h2o",
    "measure": "ppl",
    "model": "tiny-llava",
    "dataset": "scenes",
    "policy": "h2o",
    "positions": "original",
    "band": "relative 0.10",
    "rows": [{"budget": 0.2, "value": 2.0}, {"budget": 0.9, "value": 1.0}],
}
CARD = {"title": "A method", "method": "a paper", "tables": [TABLE], "notes": ["a note"]}


def estimate(value: float) -> Estimate:
    return Estimate(value=value, low=None, high=None, n=None, method="")


def test_without_records_a_card_says_that_weights_are_not_here() -> None:
    text = card_text(CARD, [])
    assert "weights not available here" in text
    assert "| 20% | 2 |" in text
    assert "a paper, Table 1" in text


def test_a_record_of_ours_stands_beside_the_published_number(tmp_path: Path) -> None:
    record = body(policy="h2o", positions="original")
    write_cell(tmp_path, record)
    (group,) = load_results(tmp_path).groups
    (cell,) = group.cells
    table = {**TABLE, "model": cell.model, "dataset": cell.dataset, "policy": cell.policy}
    value = cell.measurements["ppl"].value
    table["rows"] = [{"budget": cell.budget_fraction, "value": value}, {"budget": 0.77, "value": 1.0}]
    text = card_text({**CARD, "tables": [table]}, group.cells)
    assert "pass |" in text
    assert "| 77% | 1 | not run |  |" in text
    table["rows"] = [{"budget": cell.budget_fraction, "value": value * 1.2}]
    assert "fail |" in card_text({**CARD, "tables": [table]}, group.cells)
    table["positions"] = "released"
    assert "weights not available here" in card_text({**CARD, "tables": [table]}, group.cells)


@pytest.mark.parametrize(
    ("band", "ours", "expected"),
    [
        ("relative 0.10", 2.2, "pass"),
        ("relative 0.10", 2.21, "fail"),
        ("relative 0.10", 1.79, "fail"),
        ("absolute 0.05", 2.05, "pass"),
        ("absolute 0.05", 2.06, "fail"),
    ],
)
def test_a_verdict_is_about_the_band(band: str, ours: float, expected: str) -> None:
    assert verdict(band, 2.0, estimate(ours)) == expected
    assert verdict(band, 2.0, None) == ""


@pytest.mark.parametrize("name", PUBLISHED["cards"])
def test_every_published_table_can_be_matched(name: str) -> None:
    policies = {path.stem for path in (REPO / "conf" / "policy").glob("*.yaml")}
    for table in PUBLISHED["cards"][name]["tables"]:
        assert table["measure"] in MEASURES
        assert table["rows"]
        if table["command"] is not None:
            assert table["policy"] in policies
            assert f"policy={table['policy']}" in table["command"]
            assert verdict(table["band"], table["rows"][0]["value"], estimate(table["rows"][0]["value"])) == "pass"


def test_the_cards_in_the_repository_are_those_that_the_generator_writes(tmp_path: Path) -> None:
    """They hold no figure of ours yet, so no record is needed to write them again."""
    for path in write_cards(tmp_path / "none", tmp_path / "cards"):
        assert path.read_text() == (REPO / "docs" / "reproduction" / path.name).read_text()


def test_the_command_names_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        Path(line).name for line in capsys.readouterr().out.splitlines()
    )
