from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvbench.datasets.questions import Conversation
from kvbench.errors import ConfigError, DataError

GOOD = {"question": "What is it?", "answer": "A dot."}


def written(folder: Path, items: Any, encoding: str = "utf-8") -> str:
    path = folder / "talks.json"
    path.write_bytes((items if isinstance(items, str) else json.dumps(items)).encode(encoding))
    return str(path)


def load_all(path: str, **options: Any) -> None:
    for example in Conversation(path=path, **options).examples():
        assert example.load_image is not None
        example.load_image()


def refused(path: str, **options: Any) -> str:
    """Return the message of the one error that making the data set, or loading its pictures, gives."""
    with pytest.raises((ConfigError, DataError)) as caught:
        load_all(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_good_file_gives_its_items_in_order(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (5, 4), "red").save(tmp_path / "pics" / "a.png")
    Image.new("L", (6, 4)).save(tmp_path / "pics" / "b.jpg")
    path = written(
        tmp_path,
        [
            {**GOOD, "image": "pics/a.png", "question": "<image>\nWhat is it?"},
            {**GOOD, "image": "pics/b.jpg"},
            {**GOOD, "image": "pics/b.jpg"},
            {**GOOD, "answer": " Ein Punkt, \u00e9\u4e2d. ", "image": None},
        ],
    )
    data = Conversation(path=path)
    examples = data.examples()
    assert [example.question for example in examples] == ["What is it?"] * 4
    assert [example.reference for example in examples] == ["A dot."] * 3 + ["Ein Punkt, \u00e9\u4e2d."]
    assert [example.cluster for example in examples] == ["pics/a.png", "pics/b.jpg", "pics/b.jpg", "3"]
    pictures = [example.load_image() for example in examples[:3] if example.load_image]
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (5, 4)), ("RGB", (6, 4)), ("RGB", (6, 4))]
    assert examples[3].load_image is None
    assert len(Conversation(path=path, num_samples=2).examples()) == 2
    assert data.facts_in("anything") == frozenset()


def test_pictures_may_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "pics" / "a.webp")
    path = written(tmp_path, [{**GOOD, "image": "a.webp"}])
    assert Conversation(path=path, images=str(tmp_path / "pics")).examples()[0].load_image is not None
    assert "not a file" in refused(path)


@pytest.mark.parametrize("text", ["\ufeff" + json.dumps([GOOD]), json.dumps([GOOD], indent=1).replace("\n", "\r\n")])
def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path, text: str) -> None:
    assert len(Conversation(path=written(tmp_path, text)).examples()) == 1


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for name, items in (("a", [GOOD]), ("b", [GOOD]), ("c", [GOOD, GOOD])):
        (tmp_path / name).mkdir()
        written(tmp_path / name, items)
    a, b, c = (Conversation(path=str(tmp_path / name / "talks.json")).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{nonsense", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({"question": "q"}, "holds a dict"),
        ([], "holds no item"),
        (["text"], "item 0 is"),
        ([GOOD, None], "item 1 is"),
        ([GOOD, {"question": "q"}], "item 1 has no answer; it needs the text 'answer'"),
        ([{"question": 3, "answer": "a"}], "item 0 has the question '3'"),
        ([GOOD, {**GOOD, "answer": " \n"}], "item 1 has an empty answer"),
        ([{**GOOD, "question": ""}], "item 0 has an empty question"),
        ([{**GOOD, "question": "<image>\n"}], "item 0 has an empty question"),
        ([{**GOOD, "answer": "\ud800 half"}], "item 0 has half a surrogate pair"),
        ([{**GOOD, "image": "../secret.png"}], "item 0 names the image '../secret.png', which lies outside"),
        ([{**GOOD, "image": "/etc/passwd"}], "item 0 names the image '/etc/passwd', which lies outside"),
        ([{**GOOD, "image": "a/../../secret.png"}], "lies outside"),
        ([{**GOOD, "image": "a\0.png"}], "item 0 has the image"),
        ([{**GOOD, "image": "\udcff.png"}], "item 0 has the image"),
        ([{**GOOD, "image": ["a.png"]}], "item 0 has the image"),
        ([{**GOOD, "image": "x" * 2000}], "item 0 has the image"),
        ([{**GOOD, "image": "x" * 600}], "item 0 names the image"),
        ([{**GOOD, "image": "nowhere.png"}], "item 0 names the image 'nowhere.png', which is not a file"),
        ([{**GOOD, "image": "."}], "which is not a file"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, content: Any, fragment: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "secret.png")
    assert fragment in refused(written(folder, content))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert "is not JSON in UTF-8" in refused(written(tmp_path, '[{"question": "\u00e9", "answer": "a"}]', "latin-1"))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(str(tmp_path / "nowhere.json"))
    assert "cannot be read" in refused(str(tmp_path))


@pytest.mark.parametrize("number", [0, -3])
def test_a_number_of_samples_below_one_is_refused(tmp_path: Path, number: int) -> None:
    assert f"dataset.num_samples is {number}" in refused(written(tmp_path, [GOOD]), num_samples=number)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "secret.png")
    (folder / "a.png").symlink_to(tmp_path / "secret.png")
    assert "item 0 names the image 'a.png', which lies outside" in refused(
        written(folder, [{**GOOD, "image": "a.png"}])
    )


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to("b.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert "item 0 names the image 'a.png'" in refused(written(tmp_path, [{**GOOD, "image": "a.png"}]))


@pytest.mark.parametrize("size", [(8001, 8000), (14_000, 14_000)])
def test_a_giant_picture_is_refused_before_it_is_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 10**5
    assert "item 0: a.png" in refused(written(tmp_path, [{**GOOD, "image": "a.png"}]))


def test_broken_and_foreign_pictures_are_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    jpg, png = (tmp_path / "whole.jpg").read_bytes(), (tmp_path / "whole.png").read_bytes()
    contents = {
        "text.png": b"hello",
        "empty.png": b"",
        "cut.jpg": jpg[: len(jpg) // 2],
        "cut.png": png[: len(png) // 2],
        "chunk.png": png[:37] + b"\0" * 8 + png[45:],
        "type.png": png[:12] + b"XXXX" + png[16:],
    }
    Image.new("RGB", (5, 4)).save(tmp_path / "a.bmp")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "a.bmp"):
        message = refused(written(tmp_path, [{**GOOD, "image": name}]))
        assert message.startswith(f"talks.json, item 0: {name} cannot be decoded"), message
