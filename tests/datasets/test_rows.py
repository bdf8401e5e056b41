"""Rows of tables: a cell never slides into another column, and a name never hides another of the same name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvbench.datasets.files import read_rows
from kvbench.datasets.text import Summaries, TextWindows
from tests.datasets.files import refusal, write_json

HEAD = "document,summary\n"


def csv(folder: Path, text: str | bytes) -> str:
    path = folder / "s.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def contents(path: str) -> list[Any]:
    return [row.content if row.problem is None else row.problem for row in read_rows(path)]


def test_a_comma_that_is_not_quoted_makes_a_bad_item_and_shifts_nothing(tmp_path: Path) -> None:
    path = csv(tmp_path, HEAD + "The cat sat, and slept,A cat sleeps\nA dog ran.,A dog\n")
    message = refusal(lambda: Summaries(path=path))
    assert message.startswith("s.csv, row 0 has 3 cells, and the header names 2 columns; ")
    assert "quot" in message
    assert "dataset.on_bad_item=skip" in message
    data = Summaries(path=path, on_bad_item="skip")
    assert [(example.id, example.question, example.reference) for example in data.examples()] == [
        ("1", "Summarize the text above in a few sentences.", "A dog")
    ]
    assert [found.item for found in data.skipped] == ["s.csv, row 0"]


@pytest.mark.parametrize("row", ["only one", '"one, quoted"', "a,b,c", "a,b,,", ","])
def test_a_row_of_another_length_or_without_text_is_a_bad_item(tmp_path: Path, row: str) -> None:
    path = csv(tmp_path, HEAD + f"{row}\nA dog ran.,A dog\n")
    assert "s.csv, row 0 has " in refusal(lambda: Summaries(path=path))
    data = Summaries(path=path, on_bad_item="skip")
    assert [example.reference for example in data.examples()] == ["A dog"]


@pytest.mark.parametrize(
    ("head", "fragment"),
    [
        ("document,summary,document", "the header has the column 'document' twice"),
        ("document,summary,summary,id", "the header has the column 'summary' twice"),
    ],
)
def test_a_column_name_that_stands_twice_is_refused(tmp_path: Path, head: str, fragment: str) -> None:
    rows = "\n".join([head, ",".join("abcd"[: head.count(",") + 1])])
    for skip in ("fail", "skip"):
        message = refusal(lambda skip=skip: Summaries(path=csv(tmp_path, rows), on_bad_item=skip))  # type: ignore[misc]
        assert fragment in message


def test_a_first_column_without_a_name_is_an_index_and_no_other_may_hold_anything(tmp_path: Path) -> None:
    pd.DataFrame({"document": ["long"], "summary": ["s"]}).to_csv(tmp_path / "s.csv")  # as pandas writes it
    assert contents(str(tmp_path / "s.csv")) == [{"": "0", "document": "long", "summary": "s"}]
    path = csv(tmp_path, "document,summary,,\nA,B,,\nThe cat sat, and slept,A cat,\n")
    first, second = contents(path)
    assert first == {"document": "A", "summary": "B"}
    assert "s.csv, row 1 has the cell 'A cat' in column 3, which the header does not name" in second


@pytest.mark.parametrize(
    "text", ["\ufeff" + HEAD + "a,b\n", HEAD.replace("\n", "\r\n") + "a,b\r\n", HEAD + "\na,b\n\n"]
)
def test_a_byte_order_mark_windows_lines_and_blank_lines_are_fine(tmp_path: Path, text: str) -> None:
    assert contents(csv(tmp_path, text)) == [{"document": "a", "summary": "b"}]


def test_quoted_cells_keep_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    text = HEAD + '"a, b\r\nc ""d""",\u4e2d \u00e9\n5" pipe,NA\n'
    assert contents(csv(tmp_path, text)) == [
        {"document": 'a, b\r\nc "d"', "summary": "\u4e2d \u00e9"},
        {"document": '5" pipe', "summary": "NA"},
    ]


def test_a_cell_may_be_a_whole_book(tmp_path: Path) -> None:
    book = "word " * 40_000
    assert contents(csv(tmp_path, HEAD + f"{book},s\n")) == [{"document": book, "summary": "s"}]


@pytest.mark.parametrize("text", [HEAD + '"a" b,c\n', HEAD + 'a,b\n"open,c\n', HEAD.encode() + b"\xff,b\n", "", "\n\n"])
def test_quotes_that_do_not_close_and_foreign_bytes_refuse_the_file(tmp_path: Path, text: str | bytes) -> None:
    assert "s.csv is not CSV in UTF-8 (" in refusal(lambda: contents(csv(tmp_path, text)))


def test_a_table_of_one_column_that_another_sign_parts_says_what_it_has(tmp_path: Path) -> None:
    message = refusal(lambda: Summaries(path=csv(tmp_path, "document;summary\na;b\n")))
    assert "has the fields document;summary" in message


def test_a_name_that_stands_twice_in_one_object_is_that_items_fault(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    twice = '{"document": "a", "document": "b", "summary": "c"}'
    inner = '{"document": "a", "summary": "c", "meta": [{"x": 1, "x": 2}]}'
    path.write_text(f'[{twice}, {{"document": "d", "summary": "e"}}, {inner}]')
    first, second, third = contents(str(path))
    assert first == "s.json, item 0: an object has the name 'document' twice"
    assert second == {"document": "d", "summary": "e"}
    assert third == "s.json, item 2: an object has the name 'x' twice"
    assert "s.json, item 0: an object has the name 'document' twice" in refusal(lambda: Summaries(path=str(path)))
    assert [example.id for example in Summaries(path=str(path), on_bad_item="skip").examples()] == ["1"]


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["document", "document"])
    pq.write_table(table, tmp_path / "s.parquet")
    message = refusal(lambda: contents(str(tmp_path / "s.parquet")))
    assert "has the column 'document' twice" in message


def test_running_text_of_a_table_names_the_row_that_is_wrong(tmp_path: Path) -> None:
    path = csv(tmp_path, "text\nword word\nword, word\n")
    assert refusal(lambda: TextWindows(path=path)).startswith("s.csv, row 1 has 2 cells")
    assert "has no text 'text'" in refusal(lambda: TextWindows(path=write_json(tmp_path / "s.json", [{"t": "x"}])))
