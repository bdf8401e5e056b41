"""Names in the order in which a reader counts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvbench.report.load import load_results, natural_key
from tests.report.synthetic import body, write_cell


def test_numbers_inside_names_count_as_numbers() -> None:
    names = ["a", "a 2", "a 10", "a 10b", "a 10b 3", "a 10b 20", "b 1"]
    assert sorted({"b 1", "a 10b 20", "a 2", *names}, key=natural_key) == names


@given(st.lists(st.text(alphabet="0129ab /\u0663", max_size=8), unique=True))
def test_any_names_can_be_ordered_and_no_two_are_alike(names: list[str]) -> None:
    keys = sorted(map(natural_key, names))
    assert all(one < two for one, two in pairwise(keys))


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_two_numbers_are_ordered_by_size(one: int, two: int) -> None:
    assert (natural_key(f"test/{one}") < natural_key(f"test/{two}")) == (one < two)


def test_groups_that_differ_in_a_number_stand_by_its_size(tmp_path: Path) -> None:
    for num in (256, 32, 4):
        record = body(num_samples=4, seed=num)
        record["cell"] |= {"dataset": {"name": "scenes", "num_samples": num}}
        write_cell(tmp_path, record)
    names = [group.dataset for group in load_results(tmp_path).groups]
    assert names == ["scenes num_samples=4", "scenes num_samples=32", "scenes num_samples=256"]
