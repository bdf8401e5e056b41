"""What the page is made of: data for its scripts, and tables that wait for a reader."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from kvbench.report.markup import Head, TableCell, TableView, row_head, safe_json
from tests.report.synthetic import embedded

LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-9, 9) | st.text("<a&", max_size=4)
TREES = st.recursive(
    LEAVES,
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text("kn!", max_size=3), part, max_size=3),
    max_leaves=30,
)


def in_a_page(data: Markup) -> str:
    return f'<script id="it">{data}</script>'


@given(data=TREES)
def test_scripts_read_what_was_written_and_nothing_leaves_its_element(data: Any) -> None:
    text = safe_json(data)
    assert not {"<", ">", "&"} & set(text)
    assert embedded(in_a_page(text), "it") == data


def test_what_comes_again_stands_once() -> None:
    rows = [{"policy": "streaming_llm", "numbers": [0.125, 0.25, None], "texts": ["undecided", "p = 1"]}] * 40
    text = safe_json(rows)
    assert [text.count(word) for word in ("streaming_llm", "undecided", "numbers", "0.125")] == [1, 1, 1, 1]
    assert len(text) < 1100


def test_a_large_table_waits_and_a_small_one_or_one_that_is_filtered_stands_there() -> None:
    rows = [[row_head(f"row {number}"), TableCell("-1.5", "[-2, -1]", sort=-1.5)] for number in range(200)]
    heads = [Head("policy", kind="text"), Head("value")]
    large = TableView(caption="large", heads=heads, rows=rows)
    assert large.is_large
    assert not TableView(caption="small", heads=heads, rows=rows[:9]).is_large
    assert not TableView(caption="filtered", heads=heads, rows=rows, name="verdict-table").is_large
    found = embedded(in_a_page(large.packed), "it")
    assert found["heads"][1] == ["value", "", "", "number"]
    number = ["\u22121.5", "[\u22122,\u00a0\u22121]", "", "", "", "number"]
    assert found["rows"][7] == [["row 7", "", "", "", "", "head"], number]


def test_a_number_sorts_by_what_it_shows_and_else_by_its_own() -> None:
    cells = TableCell("3.475", sort=3.4749), TableCell("12 %", sort=0.12), TableCell("-")
    assert [one.order for one in cells] == ["", "0.12", ""]
