from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from kvbench.datasets.files import read_rows
from kvbench.datasets.questions import Conversation, LlavaBench
from kvbench.datasets.text import Summaries
from tests.datasets.files import refusal, write_json, write_lines, write_picture

GOOD = {"question": "What is it?", "answer": "A dot."}
BAD: list[Any] = [
    {"question": "q"},
    {"question": "q", "answer": " "},
    {**GOOD, "image": "nowhere.png"},
    {**GOOD, "image": "../outside.png"},
    {**GOOD, "image": "broken.png"},
    {**GOOD, "image": "giant.png"},
    "no object",
]


def folder_with_pictures(folder: Path) -> Path:
    (folder / "data").mkdir()
    write_picture(folder / "outside.png")
    write_picture(folder / "data" / "whole.png")
    Image.effect_noise((64, 64), 50).save(folder / "data" / "broken.png")
    noise = (folder / "data" / "broken.png").read_bytes()
    (folder / "data" / "broken.png").write_bytes(noise[: len(noise) // 2])
    Image.new("1", (9000, 8000)).save(folder / "data" / "giant.png")
    return folder / "data"


def test_bad_items_are_left_out_counted_and_named(tmp_path: Path) -> None:
    folder = folder_with_pictures(tmp_path)
    path = write_json(folder / "talks.json", [GOOD, *BAD, {**GOOD, "image": "whole.png"}])
    data = Conversation(path=path, on_bad_item="skip")
    assert [example.id for example in data.examples()] == ["0", "8"]
    assert [found.item for found in data.skipped] == [f"talks.json, item {number}" for number in range(1, 8)]
    for found, fragment in zip(
        data.skipped,
        (
            "no answer",
            "empty answer",
            "not a file",
            "lies outside",
            "cannot be decoded",
            "9000 x 8000",
            "it must be an",
        ),
        strict=True,
    ):
        assert fragment in found.reason
        assert found.item in found.reason


@pytest.mark.parametrize("item", BAD, ids=range(len(BAD)))
def test_one_bad_item_stops_by_default_and_names_the_way_out(tmp_path: Path, item: Any) -> None:
    folder = folder_with_pictures(tmp_path)
    path = write_json(folder / "talks.json", [GOOD, item])
    message = refusal(lambda: Conversation(path=path))
    assert "talks.json, item 1" in message
    assert "dataset.on_bad_item=skip" in message


def test_a_skipped_item_counts_as_looked_at(tmp_path: Path) -> None:
    path = write_json(tmp_path / "talks.json", [GOOD, "bad", GOOD, GOOD])
    data = Conversation(path=path, on_bad_item="skip", num_samples=3)
    assert ([example.id for example in data.examples()], len(data.skipped)) == (["0", "2"], 1)


def test_when_every_item_is_bad_the_first_reason_is_told(tmp_path: Path) -> None:
    path = write_json(tmp_path / "talks.json", ["bad", "worse"])
    assert "all 2 items are bad; the first: talks.json, item 0" in refusal(
        lambda: Conversation(path=path, on_bad_item="skip")
    )


def test_an_unknown_way_with_bad_items_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "talks.json", [GOOD])
    assert "did you mean 'skip'" in refusal(lambda: Conversation(path=path, on_bad_item="skp"))  # type: ignore[arg-type]


def test_ids_that_repeat_are_refused_or_skipped(tmp_path: Path) -> None:
    row = {"id": "a", "document": "long text", "summary": "text"}
    path = write_lines(tmp_path / "s.jsonl", [row, {**row, "summary": "other"}, {**row, "id": "b"}])
    assert "s.jsonl, line 2 has the id 'a', which an earlier item has" in refusal(lambda: Summaries(path=path))
    data = Summaries(path=path, on_bad_item="skip")
    assert [(example.id, example.reference) for example in data.examples()] == [("a", "text"), ("b", "text")]


def test_the_fingerprint_follows_pictures_and_texts_and_not_places(tmp_path: Path) -> None:
    prints = []
    for name, colour, answer in (("a", "red", "x"), ("b", "red", "x"), ("c", "blue", "x"), ("d", "red", "y")):
        write_picture(tmp_path / name / "p.png", colour)
        items = [{"question": "q", "answer": answer, "image": "p.png"}]
        prints.append(Conversation(path=write_json(tmp_path / name / "t.json", items)).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_picture_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    write_picture(tmp_path / "p.png")
    path = write_json(tmp_path / "t.json", [{**GOOD, "image": "p.png"}])
    before = Conversation(path=path).fingerprint
    (tmp_path / "p.png").write_bytes(b"no picture any more")
    assert "cannot be decoded" in refusal(lambda: Conversation(path=path))
    write_picture(tmp_path / "p.png", "blue")
    assert Conversation(path=path).fingerprint != before


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"a": "x", "b": '\u00e9, \u4e2d\n"q"'}, {"a": "", "b": "NA"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        write_json(path, rows)
    elif suffix == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(row).encode() for row in rows))
    elif suffix == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)
    assert [(row.number, row.content) for row in read_rows(str(path))] == [(0, rows[0]), (1, rows[1])]


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.parquet", b"PAR1 no parquet", "is not a whole Parquet file"),
        ("a.csv", b'a,b\n"open', "is not CSV in UTF-8"),
        ("a.csv", b"a,b\n\xe9,x\n", "is not CSV in UTF-8"),
        ("a.csv", b"", "is not CSV in UTF-8"),
        ("a.jsonl", b'{"document": "d", "summary": "s"}\n\xe9\n', "a.jsonl, line 2 is not JSON in UTF-8"),
        ("a.jsonl", b'{"document": "d"\n', "a.jsonl, line 1 is not JSON in UTF-8"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1 is not JSON in UTF-8"),
        ("a.jsonl", b'{"id": 1, "id": 2}', "has the name 'id' twice"),
        ("a.jsonl", b"", "holds no item"),
        ("a.json", b'[{"id": 1, "id": 2}]', "has the name 'id' twice"),
        ("a.json", b"\xff\xfe", "is not JSON in UTF-8"),
        ("a.pkl", b"\x80\x04K\x01.", "ends in '.pkl'; allowed: .json, .jsonl, .csv, .parquet"),
        ("a", b"", "ends in ''; allowed"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path: Path, name: str, content: bytes, fragment: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert fragment in refusal(lambda: Summaries(path=str(tmp_path / name)))


def test_a_line_that_cannot_be_read_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"document": "d", "summary": "s"}\n\xe9\n{"document": "e", "summary": "s"}\n')
    data = Summaries(path=str(tmp_path / "a.jsonl"), on_bad_item="skip")
    assert [example.context for example in data.examples()] == ["d\n\n", "e\n\n"]
    assert [found.item for found in data.skipped] == ["a.jsonl, line 2"]


@pytest.mark.parametrize("name", [["x"], True, {"a": 1}, 1.5])
def test_an_id_that_is_no_name_is_refused(tmp_path: Path, name: Any) -> None:
    write_picture(tmp_path / "p.png")
    path = write_lines(tmp_path / "q.jsonl", [{"question_id": name, "image": "p.png", "text": "q"}])
    assert "q.jsonl, line 1 has the id" in refusal(lambda: LlavaBench(path=path))
