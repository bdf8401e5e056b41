"""What a model is shown is what the file means: turned, scaled and laid on white, or refused; never altered unsaid."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from kvbench.datasets import pictures
from kvbench.datasets.conversation import Conversation
from kvbench.datasets.pictures import load_picture
from kvbench.errors import DataError
from tests.datasets.files import refusal, write_json

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
