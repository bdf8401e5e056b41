"""Rows of tables and pictures of a folder: nothing slides, nothing hides, what is shown is what the file means."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from kvbench.datasets import files as pictures
from kvbench.datasets.files import load_picture, read_rows
from kvbench.datasets.questions import Conversation, LlavaBench
from kvbench.datasets.text import Summaries, TextWindows
from kvbench.errors import DataError
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


ORIENTATION = 0x0112
COLOURS = ("red", "lime", "blue", "yellow", "cyan", "black")


def patches() -> Image.Image:
    """Six colours in two rows of three, each 8 x 8 pixels, so that a turn or flip shows and JPEG keeps them apart."""
    picture = Image.new("RGB", (24, 16))
    for number, colour in enumerate(COLOURS):
        picture.paste(colour, (8 * (number % 3), 8 * (number // 3), 8 * (number % 3) + 8, 8 * (number // 3) + 8))
    return picture


def shown(path: Path) -> np.ndarray[Any, Any]:
    picture = load_picture(path, "item 0")
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def difference(found: np.ndarray[Any, Any], expected: Image.Image) -> int:
    wanted = np.asarray(expected.convert("RGB")).astype(int)
    assert found.shape == wanted.shape
    return int(np.abs(found - wanted).max())


# How EXIF (JEITA CP-3451, table of tag 274) says that rows and columns of the file lie in the picture.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_shown_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = patches().transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else patches()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless: dict[str, Any] = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **lossless.get(suffix, {}))
    assert difference(shown(tmp_path / f"a.{suffix}"), patches()) <= 8


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    patches().save(tmp_path / "a.png", exif=exif)
    assert difference(shown(tmp_path / "a.png"), patches()) == 0


def test_broken_exif_turns_nothing_and_hides_no_picture(tmp_path: Path) -> None:
    for number, exif in enumerate(
        (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09")
    ):
        patches().save(tmp_path / f"{number}.png", exif=exif)
        assert difference(shown(tmp_path / f"{number}.png"), patches()) == 0


def deep(path: Path, levels: np.ndarray[Any, Any], **options: Any) -> Path:
    Image.fromarray(levels.astype(np.uint16)).save(path, **options)
    return path


def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 16 * 16).round().reshape(16, 16)
    path = deep(tmp_path / "a.png", levels)
    with Image.open(path) as stored:
        assert stored.mode == "I;16"
    expected = np.repeat((levels / 257).round()[..., None], 3, axis=2)
    assert np.array_equal(shown(path), expected)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "F"])
def test_every_mode_of_many_levels_is_scaled_alike(mode: str) -> None:
    levels = np.array([[0, 257, 32896, 65535]])
    if mode == "I;16B":
        picture = Image.frombytes("I;16B", (4, 1), levels.astype(">u2").tobytes())
    else:
        kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        picture = Image.fromarray(levels.astype(kind))
    assert picture.mode == mode
    assert np.asarray(pictures.as_shown(picture))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("value", [-1.0, 65536.0, float("nan"), float("inf")])
def test_levels_beyond_sixteen_bits_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="levels from 0 to 65535"):
        pictures.as_shown(Image.fromarray(np.array([[0, value]], dtype=np.float32)))


def test_sixteen_bits_with_a_transparent_level_are_laid_on_white(tmp_path: Path) -> None:
    path = deep(tmp_path / "a.png", np.array([[0, 1000, 1001, 65535]]), transparency=1000)
    assert shown(path)[0, :, 0].tolist() == [0, 255, 4, 255]


def colour_of_sixteen_bits(path: Path, *, hidden: bytes = b"") -> Path:
    """Write a PNG of two pixels, red and a blue which may mean transparent; Pillow writes none of 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + (chunk(b"tRNS", hidden) if hidden else b"")
    row = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0, 0x1234)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + row + chunk(b"IEND", b""))
    return path


def test_a_transparent_colour_of_sixteen_bits_is_refused_as_only_eight_of_them_are_read(tmp_path: Path) -> None:
    assert shown(colour_of_sixteen_bits(tmp_path / "a.png"))[0].tolist() == [[255, 0, 0], [0, 0, 0x12]]
    hidden = colour_of_sixteen_bits(tmp_path / "b.png", hidden=struct.pack(">3H", 0, 0, 0x1234))
    with pytest.raises(DataError, match=r"item 0: b\.png has 16 bits a colour, one of which means transparent"):
        load_picture(hidden, "item 0")


def with_hidden_colour(mode: str) -> Image.Image:
    """Left: opaque red (dark grey). Middle: half of it. Right: fully transparent, black underneath."""
    picture = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 128, 0)):
        picture.putpixel((x, 0), (200, 0, 0, alpha) if alpha else (0, 0, 0, 0))
    return picture.convert(mode) if mode != "RGBA" else picture


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_what_is_transparent_is_white(tmp_path: Path, suffix: str) -> None:
    with_hidden_colour("RGBA").save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert shown(tmp_path / f"a.{suffix}")[0].tolist() == [[200, 0, 0], [227, 127, 127], [255, 255, 255]]


def test_a_grey_picture_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    with_hidden_colour("LA").save(tmp_path / "a.png")
    grey = Image.new("RGB", (1, 1), (200, 0, 0)).convert("L").getpixel((0, 0))
    assert isinstance(grey, int)
    found = shown(tmp_path / "a.png")[0]
    assert found[0].tolist() == [grey] * 3
    assert found[2].tolist() == [255] * 3
    assert abs(found[1][0] - round(grey * 128 / 255 + 255 * 127 / 255)) <= 1


def test_a_palette_with_transparent_entries_is_laid_on_white(tmp_path: Path) -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    picture.putdata([0, 1, 2])
    picture.save(tmp_path / "one.png", transparency=2)
    assert shown(tmp_path / "one.png")[0].tolist() == [[10, 20, 30], [40, 50, 60], [255] * 3]
    picture.save(tmp_path / "many.png", transparency=bytes([255, 0, 255]))
    assert shown(tmp_path / "many.png")[0].tolist() == [[10, 20, 30], [255] * 3, [0, 0, 0]]
    assert np.asarray(pictures.as_shown(Image.open(tmp_path / "many.png").convert("PA")))[0, 1].tolist() == [255] * 3


@pytest.mark.parametrize(("mode", "hidden"), [("L", 7), ("RGB", (7, 8, 9)), ("1", 0)])
def test_one_colour_that_means_transparent_is_white(tmp_path: Path, mode: str, hidden: Any) -> None:
    picture = Image.new(mode, (2, 1), hidden)
    picture.putpixel((1, 0), {"L": 8, "RGB": (7, 8, 10), "1": 1}[mode])
    picture.save(tmp_path / "a.png", transparency=hidden)
    found = shown(tmp_path / "a.png")[0]
    assert found[0].tolist() == [255] * 3
    assert found[1].tolist() == {"L": [8] * 3, "RGB": [7, 8, 10], "1": [255] * 3}[mode]


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "1", "RGB"])
def test_a_picture_without_transparency_keeps_every_pixel(tmp_path: Path, mode: str) -> None:
    picture = patches().convert(mode)
    picture.save(tmp_path / "a.png")
    assert difference(shown(tmp_path / "a.png"), picture) == 0


def test_a_cmyk_photograph_is_shown_in_its_colours(tmp_path: Path) -> None:
    patches().convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    assert difference(shown(tmp_path / "a.jpg"), patches()) <= 8


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_animation_is_refused(tmp_path: Path, suffix: str) -> None:
    others = [ImageOps.mirror(patches())] * 2
    patches().save(tmp_path / f"a.{suffix}", save_all=True, append_images=others, duration=40)
    with pytest.raises(DataError, match=rf"item 0: a\.{suffix} has \d frames; save the one that is meant"):
        load_picture(tmp_path / f"a.{suffix}", "item 0")


def test_a_photograph_with_previews_in_its_file_is_shown(tmp_path: Path) -> None:
    previews = [ImageOps.mirror(patches())]
    patches().save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=previews, quality=100, subsampling=0)
    assert difference(shown(tmp_path / "a.jpg"), patches()) <= 8


@pytest.mark.parametrize("size", [(2, 500), (1001, 5)])
def test_a_strip_that_processors_reject_is_a_bad_item(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "strip.png")
    Image.new("RGB", (2, 400)).save(tmp_path / "long.png")
    items = [{"question": "q", "answer": "a", "image": name} for name in ("strip.png", "long.png")]
    path = write_json(tmp_path / "t.json", items)
    message = refusal(lambda: Conversation(path=path))
    assert f"t.json, item 0: strip.png has {size[0]} x {size[1]} pixels" in message
    assert "at most 200 times as long as wide" in message
    data = Conversation(path=path, on_bad_item="skip")
    assert [example.id for example in data.examples()] == ["1"]
    assert [found.item for found in data.skipped] == ["t.json, item 0"]


def test_the_fingerprint_holds_the_rule_of_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches().save(tmp_path / "a.png")
    item = {"question": "q", "answer": "a"}
    seen, text = (
        write_json(tmp_path / name, [content])
        for name, content in (("seen.json", {**item, "image": "a.png"}), ("text.json", item))
    )
    before = Conversation(path=seen).fingerprint, Conversation(path=text).fingerprint
    monkeypatch.setattr(pictures, "SHOWN_AS", "another rule")
    after = Conversation(path=seen).fingerprint, Conversation(path=text).fingerprint
    assert before[0] != after[0]
    assert before[1] == after[1], "a record of text alone stays"


def test_a_picture_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    bomb = chunk(b"zTXt", b"comment\0\0" + zlib.compress(b"\0" * 2**21))
    (tmp_path / "a.png").write_bytes(whole[:33] + bomb + whole[33:])
    with pytest.raises(DataError, match=r"a\.png cannot be decoded"):
        load_picture(tmp_path / "a.png", "item 0")
