"""What the audit finds worth knowing, and no fault, stands on the page's notes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbench.audit import audit
from kvbench.report.findings import notes_of
from kvbench.report.load import load_results
from kvbench.results.record import write_record
from tests.report.synthetic import body, write_cell

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


def notes_on(folder: Path) -> str:
    (group,) = load_results(folder).groups
    return "\n".join("\n".join((note.text, *note.details)) for note in notes_of(group))


def audited(folder: Path) -> list[str]:
    return [str(note.text) for outcome in audit(folder).outcomes for note in outcome.notes]


def scored(**changes: Any) -> dict[str, Any]:
    record = body(**changes)
    record["cell"] |= {"task": {"generation": {"class": "kvbench:Generation", "max_new_tokens": 160}}}
    return record


def test_the_published_sweep_is_warned_of_alike() -> None:
    folder = PUBLISHED / "first-edition"
    lengths = [text for text in audited(folder) if "of the full cache's length" in text]
    page = notes_on(folder)
    assert len(lengths) == 11
    assert "Answers of 11 of 13 cells have 21 % to 88 % of the full cache's length" in page
    for text in lengths:
        percent = int(text.split("%")[0].split()[-1])
        assert f"length / full {percent / 100:.2f}x" in page


@pytest.mark.parametrize(
    ("audit_says", "page_says"),
    [
        ("answers of 40 % of the full cache's length", "h2o, 20 % tokens kept: length / full 0.40x"),
        ("changes that no commit holds", "changes that no commit holds"),
        ("was timed where gpu differ", "gpu: another, one"),
        ("32 samples of 64 asked for, in every cell", "32 samples of 64 asked for, in every cell"),
        ("2 items were left out", "h2o, 20 % tokens kept: 2"),
        ("measured 2 times", "h2o, 20 % tokens kept: 2 times"),
        ("cuts the prompt only", "h2o, 20 % tokens kept: 25 % of the tokens seen"),
    ],
)
def test_what_the_audit_finds_worth_knowing_is_a_note_on_the_page(
    tmp_path: Path, audit_says: str, page_says: str
) -> None:
    full, cut = scored(policy="full", budget=None), scored(evicts_at="prompt", budget_rounds="down")
    for record, gpu in ((full, "one"), (cut, "another")):
        record["environment"] |= {"gpu": gpu, "git_commit": "c0ffee-dirty"}
        record["cell"]["dataset"] = {"num_samples": 64}
    cut["cell"]["budget"] = {"fraction": 0.2, "of": "seen", "tokens": None}
    cut["curves"] = {"entries": [[seen, seen - 120.0, seen - 120.0] for seen in range(150, 160)]}
    cut["measurements"]["length_ratio"] |= {"value": 0.4}
    cut["measurements"]["realised_budget_fraction"] |= {"value": 0.25}
    if "left out" in audit_says:
        cut["measurements"]["num_skipped_items"] = {"value": 2, "n": 34}
    for record in (full, cut):
        write_cell(tmp_path, record)
    place = tmp_path / "cells" / cut["key"][:16]
    write_record(place / f"attempt-{'a' * 32}.json", cut | {"attempt": "a" * 32})
    write_record(place / f"attempt-{cut['attempt']}.json", cut)
    assert any(audit_says in text for text in audited(tmp_path)), audited(tmp_path)
    assert page_says in notes_on(tmp_path)
