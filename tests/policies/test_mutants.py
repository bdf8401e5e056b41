"""The mistakes of `make test-mutants` can still be planted, and one of them is, with the rule that notices it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mutants import MUTANTS, REPO


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_fits_the_source_of_today(name: str) -> None:
    compile(MUTANTS[name].text(), MUTANTS[name].file, "exec")


def test_there_are_twenty_and_six_of_them_are_in_parts() -> None:
    assert len(MUTANTS) == 20
    assert sum(name.startswith(("allocation", "ragged", "merge", "rhythm")) for name in MUTANTS) == 6


@pytest.mark.long
def test_the_contract_notices_a_mistake_and_no_other() -> None:
    """In a process of its own, as this one has imported the sources as they are."""
    code = (
        "from tests.mutants import MUTANTS, Mutant, in_a_process\n"
        "print(in_a_process(MUTANTS['one entry too few is kept']))\n"
        "print(in_a_process(Mutant(file='kvbench/nowhere.py', right='', wrong='')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["holds_its_budget (middle_first)", "failed to run: FileNotFoundError"]
