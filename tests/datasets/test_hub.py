from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.datasets.text import Summaries
from tests.datasets.files import refusal

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"document": "News.", "summary": "N.", "id": 3}, {"document": "More.", "summary": "M.", "id": 4}]


def library(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[tuple[Any, ...]]:
    """Put a stand-in for the package `datasets` in place; return the list of its calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str) -> list[dict[str, Any]]:
        calls.append((name, config, split, revision))
        if error is not None:
            raise error
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_rows_of_the_hub_are_rows_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = library(monkeypatch)
    data = Summaries(path=f"hub:Some/xsum@{COMMIT}?config=all&split=validation")
    assert [(e.id, e.context, e.reference) for e in data.examples()] == [
        ("3", "News.\n\n", "N."),
        ("4", "More.\n\n", "M."),
    ]
    assert calls == [("Some/xsum", "all", "validation", COMMIT)]


def test_the_test_split_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = library(monkeypatch)
    Summaries(path=f"hub:xsum@{COMMIT}", num_samples=1)
    assert calls == [("xsum", None, "test", COMMIT)]


@pytest.mark.parametrize("source", ["hub:a/b", "hub:a/b@main", "hub:a/b/c@" + COMMIT, "hub:@" + COMMIT])
def test_a_source_that_is_not_pinned_is_refused(source: str) -> None:
    assert "hub:OWNER/NAME@COMMIT" in refusal(lambda: Summaries(path=source))


def test_an_unknown_option_is_refused() -> None:
    assert "did you mean 'split'" in refusal(lambda: Summaries(path=f"hub:a/b@{COMMIT}?splt=test"))


def test_without_the_package_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'kvbench[datasets]'" in refusal(lambda: Summaries(path=f"hub:a/b@{COMMIT}"))


def test_what_the_hub_says_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, ConnectionError("no\nnetwork"))
    assert "cannot be loaded (ConnectionError: no network)" in refusal(lambda: Summaries(path=f"hub:a/b@{COMMIT}"))
