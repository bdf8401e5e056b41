"""Data sets read from files: rows and pictures that know where they stand, checked when made, refused or left out.

Rows come from JSON, JSON lines, CSV or Parquet, or from the Hugging Face hub (extra `datasets`): a source there is
pinned to a commit, `hub:OWNER/NAME@COMMIT`, with `?config=...&split=...` where the default (no configuration, split
test) is not meant. A row that cannot be read carries its problem instead of content, so that a data set may leave it
out. `FileDataset` makes the examples of the rows; answers may lie in a file of their own, by question id.

Pictures lie inside their folder, are of a known format, not giant, whole, and shown as they are meant. Size and format
come from the header before anything is decoded; then the picture is decoded once, when the data set is made, because a
file that breaks off can be told in no other way.

What a model is shown is the picture as a viewer on a white page shows it (`SHOWN_AS`): turned as EXIF says, 16 bits
scaled to 8, what is transparent white. What has no such picture is refused: animations, and a transparent colour of 16
bits, which Pillow does not keep.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import io
import json
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from kvbench.datasets.base import Example, Fields, OnBadItem, SkippedItem, Turn, is_unicode, without_marks
from kvbench.errors import ConfigError, DataError, close_matches, missing_path

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 10**6
MAX_SIDES = 200  # longer side over shorter one: what Qwen2.5-VL's processor takes (smart_resize), and other models too
SHOWN_AS = "upright, 16 bits scaled to 8, on white"  # part of every fingerprint; a change makes old records old
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_MAX_LEVEL = 65535
_MAX_NAME = 1024


def picture_at(name: Any, folder: Path, where: str) -> partial[Image.Image]:
    """Return the loader of the picture `name` inside `folder`.

    Raises: DataError unless the picture is whole, ConfigError if there is no such folder, whose items are not to blame.
    """
    if not folder.is_dir():
        raise ConfigError(f"dataset.images {folder} cannot be read ({missing_path(folder)}); give a folder")
    path = confined(name, folder, where)
    _, problem = _inspected(path)
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    return partial(load_picture, path, where)


def picture_digest(load: Callable[[], Image.Image] | None) -> str:
    """Return the SHA-256 of the file that `load` reads, and the rule of how it is shown; empty for no picture."""
    return f"{_inspected(load.args[0])[0]}, {SHOWN_AS}" if isinstance(load, partial) else ""


def confined(name: Any, folder: Path, where: str) -> Path:
    """Return the path of `name` if it exists inside `folder`, links followed. Raises: DataError."""
    if not isinstance(name, str) or not is_unicode(name) or "\0" in name or not 0 < len(name) <= _MAX_NAME:
        raise DataError(f"{where} has the image {str(name)[:80]!r}; it must be a path inside {folder}")
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise DataError(f"{where} names the image {name[:80]!r}, which cannot be opened ({error})") from error
    if not path.is_relative_to(root):
        raise DataError(f"{where} names the image {name!r}, which lies outside {folder}; set dataset.images")
    if not is_file:
        raise DataError(f"{where} names the image {name!r}, which is not a file in {folder}; set dataset.images")
    return path


def load_picture(path: Path, where: str) -> Image.Image:
    """Return the picture as RGB (`as_shown`). Raises: DataError for broken, giant or unknown formats and animations."""
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # about damage beside the pixels
            problem = _problem_of_header(image)
            if problem is not None:
                raise DataError(f"{where}: {path.name} {problem}")
            return as_shown(image)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise many kinds, SyntaxError and struct.error among them
        raise DataError(f"{where}: {path.name} cannot be decoded ({error}); allowed: {', '.join(FORMATS)}") from error


def _problem_of_header(image: Image.Image) -> str | None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        return f"has {width} x {height} pixels; at most {MAX_PIXELS}"
    if max(width, height) > MAX_SIDES * min(width, height):
        return f"has {width} x {height} pixels; a picture may be at most {MAX_SIDES} times as long as wide"
    if "transparency" in image.info and any("RGB;16" in str(tile) for tile in getattr(image, "tile", ())):
        return "has 16 bits a colour, one of which means transparent, and is read with 8; save it with an alpha channel"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # the further frames of a photograph are its previews
        return f"has {frames} frames; save the one that is meant as a picture of its own"
    return None


def as_shown(image: Image.Image) -> Image.Image:
    """Return `image` as RGB, as a viewer on a white page shows it.

    Raises: ValueError for levels that are no 16 bits, and whatever a decoder raises.
    """
    image.load()
    with contextlib.suppress(Exception):  # EXIF that cannot be read says nothing, as every viewer takes it
        image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    page = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(page, colours).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return grey of 0 to 255 for levels of 0 to 65535, a level that means transparent kept so."""
    levels = np.asarray(image, dtype=np.float32)
    if not bool(((levels >= 0) & (levels <= _MAX_LEVEL)).all()):  # not a number fails too
        raise ValueError(f"a picture of mode {image.mode} holds levels from 0 to {_MAX_LEVEL}; it has others")
    grey = Image.fromarray((levels * (255 / _MAX_LEVEL)).round().astype(np.uint8))
    hidden = image.info.get("transparency")
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(levels == hidden, 0, 255).astype(np.uint8)))
    return grey


def _inspected(path: Path) -> tuple[str, str | None]:
    """Return the SHA-256 of the file's bytes, and what is wrong with the picture."""
    state = path.stat()
    return _inspected_state(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2**16)  # a sweep makes its data set once per cell, but a picture is decoded once
def _inspected_state(path: Path, size_bytes: int, changed_ns: int) -> tuple[str, str | None]:
    problem = None
    try:
        load_picture(path, "")
    except DataError as error:
        problem = str(error).removeprefix(": ")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), problem


HUB_PREFIX = "hub:"
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_SOURCE = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)@(?P<commit>[0-9a-f]{40})(?:\?(?P<options>.*))?")
_OPTIONS = ("config", "split")
_TWICE = "an object has the name {0!r} twice"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row: `where` it stands ("talks.json, item 3"), its number from 0, and what it holds."""

    where: str
    number: int
    content: Any = None
    problem: str | None = None

    def read(self) -> Any:
        """Return the content. Raises: DataError if it could not be read."""
        if self.problem is not None:
            raise DataError(self.problem)
        return self.content

    def fields(self, *needs: str) -> Fields:
        """Return the content as an object, which should have `needs`. Raises: DataError."""
        return Fields(self.read(), self.where, needs)


def read_rows(source: str) -> Iterator[Row]:
    """Yield the rows of a file, by its suffix, or of the hub (`hub:owner/name@commit`).

    Raises: ConfigError for a file that cannot be read, DataError for one that is not what its suffix says.
    """
    if source.startswith(HUB_PREFIX):
        for number, content in enumerate(hub_rows(source)):
            yield Row(where=f"{source}, row {number}", number=number, content=content)
        return
    path = existing(source)
    reader = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"dataset.path {source} ends in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    yield from reader(path)


def hub_rows(source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `source`. Raises: ConfigError, DataError."""
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ConfigError(
            f"dataset.path is {source!r}; a data set on the hub is written "
            "hub:OWNER/NAME@COMMIT?config=NAME&split=NAME, its commit 40 hex digits (its page lists them)"
        )
    options = dict(parse_qsl(match["options"] or "", keep_blank_values=True))
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(f"dataset.path has the option {name!r}; {close_matches(name, _OPTIONS)}")
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            "a data set on the hub needs the package `datasets`; pip install 'kvbench[datasets]'"
        ) from error
    try:
        yield from library.load_dataset(
            match["name"], options.get("config"), split=options.get("split", "test"), revision=match["commit"]
        )
    except Exception as error:  # the library raises what its file systems raise
        raise DataError(
            f"{source} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "without the network give a local file"
        ) from error


def existing(source: str, setting: str = "path") -> Path:
    """Return the path of a file that exists. Raises: ConfigError."""
    path = Path(source).expanduser()
    if not path.is_file():
        reason = "it is a folder" if path.is_dir() else missing_path(path)
        raise ConfigError(f"dataset.{setting} {source} cannot be read ({reason}); give a file")
    return path


def read_bytes(path: Path, setting: str = "path") -> bytes:
    """Return the content of a file. Raises: ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        reason = missing_path(path) if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"dataset.{setting} {path} cannot be read ({reason}); give a file") from error


def read_text(path: Path, kind: str, name: object = None, setting: str = "path") -> str:
    """Return the text of a file that should hold `kind`. Raises: ConfigError, DataError that begins with `name`."""
    try:
        return read_bytes(path, setting).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name or path} is not {kind} in UTF-8 ({error})") from error


def read_json(path: Path, setting: str = "path") -> Any:
    """Return what a JSON file holds. Raises: ConfigError, DataError; a name that stands twice is one."""
    content = read_items(path, setting)
    name = _repeated_name(content)
    if name is not None:
        raise DataError(f"{path} is not JSON in UTF-8 ({_TWICE.format(name)})")
    return content


def read_items(path: Path, setting: str = "path") -> Any:
    """Return the same, but a name that stands twice inside an item is left to `item_row`. Raises the same."""
    try:
        content = json.loads(read_text(path, "JSON", setting=setting), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON in UTF-8 ({error})") from error
    if isinstance(content, _Repeated):
        raise DataError(f"{path} is not JSON in UTF-8 ({_TWICE.format(content.twice)})")
    return content


def item_row(where: str, number: int, content: Any) -> Row:
    """Return the row of an item of JSON, with a problem if an object in it has a name twice."""
    name = _repeated_name(content)
    problem = None if name is None else f"{where}: {_TWICE.format(name)}"
    return Row(where=where, number=number, content=content if name is None else None, problem=problem)


class _Repeated(dict[str, Any]):
    """An object in which the name `twice` stands twice."""

    twice: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = _Repeated(found)
    repeated.twice = _first_twice([name for name, _ in pairs]) or ""
    return repeated


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _repeated_name(content: Any) -> str | None:
    """Look into everything, without recursion: what is nested deeper than Python calls can be is data too."""
    left = [content]
    while left:
        found = left.pop()
        if isinstance(found, _Repeated):
            return found.twice
        if isinstance(found, dict | list | tuple):
            left.extend(found.values() if isinstance(found, dict) else found)
    return None


def _json(path: Path) -> Iterator[Row]:
    items = read_items(path)
    if not isinstance(items, list):
        raise DataError(f"{path} holds a {type(items).__name__}; it must be a list of objects")
    for number, item in enumerate(items):
        yield item_row(f"{path.name}, item {number}", number, item)


def _json_lines(path: Path) -> Iterator[Row]:
    lines = enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    for number, (line, raw) in enumerate((line, raw) for line, raw in lines if raw.strip()):
        where = f"{path.name}, line {line}"
        try:
            yield item_row(where, number, json.loads(raw.decode(), object_pairs_hook=_object))
        except (ValueError, RecursionError) as error:
            yield Row(where=where, number=number, problem=f"{where} is not JSON in UTF-8 ({error})")


def _csv(path: Path) -> Iterator[Row]:
    header, *rows = _cells(path)
    twice = _first_twice(name for name in header if name)
    if twice is not None:
        raise DataError(f"{path}: the header has the column {twice!r} twice; every column needs a name of its own")
    for number, cells in enumerate(rows):
        where, problem = f"{path.name}, row {number}", None
        pairs = list(zip(header, cells, strict=False))
        # A first column without a name is an index, as pandas writes one; any other such column may hold nothing.
        stray = next((at for at, (name, cell) in enumerate(pairs) if at and cell and not name), None)
        if len(cells) != len(header):
            problem = (
                f"{where} has {len(cells)} cells, and the header names {len(header)} columns; put cells that hold a "
                'comma or a line end into double quotes (")'
            )
        elif stray is not None:
            problem = (
                f"{where} has the cell {cells[stray][:40]!r} in column {stray + 1}, which the header does not name"
            )
        named = {name: cell for at, (name, cell) in enumerate(pairs) if name or not at}
        yield Row(where=where, number=number, content=None if problem else named, problem=problem)


def _cells(path: Path) -> list[list[str]]:
    """Return header and rows without blank lines; a cell may have any length. Raises: ConfigError, DataError."""
    reader = csv.reader(io.StringIO(read_text(path, "CSV"), newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        rows = [cells for cells in reader if cells]
    except csv.Error as error:
        raise DataError(f"{path} is not CSV in UTF-8 (line {reader.line_num}: {error})") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise DataError(f"{path} is not CSV in UTF-8 (it has no header)")
    return rows


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path) as file:
            twice = _first_twice(file.schema_arrow.names)
            if twice is not None:
                raise DataError(f"{path} has the column {twice!r} twice; every column needs a name of its own")
            contents = (content for batch in file.iter_batches(batch_size=64) for content in batch.to_pylist())
            for number, content in enumerate(contents):
                yield Row(where=f"{path.name}, row {number}", number=number, content=content)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({' '.join(str(error).split())})") from error


@dataclass(frozen=True, kw_only=True)
class FileDataset(ABC):
    """Examples of a file. Everything is checked when the data set is made, before any model is loaded.

    num_samples: how many items from the first on, None for all; one that is skipped counts.
    on_bad_item: `fail` stops at the first bad item, `skip` leaves it out and names it in `skipped`.
    Raises: ConfigError for a file that cannot be read or a wrong setting, DataError naming file and item.
    """

    path: str
    num_samples: int | None = None
    on_bad_item: OnBadItem = "fail"

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ConfigError(f"dataset.num_samples is {self.num_samples}; give at least 1, or null for all")
        if self.on_bad_item not in get_args(OnBadItem):
            raise ConfigError(
                f"dataset.on_bad_item is {self.on_bad_item!r}; {close_matches(self.on_bad_item, get_args(OnBadItem))}"
            )
        self._check_settings()
        examples, skipped = self._checked
        if skipped and not examples:
            raise DataError(f"{self.path}: all {len(skipped)} items are bad; the first: {skipped[0].reason}")
        if not examples:
            raise DataError(f"{self.path} holds no item")

    def _check_settings(self) -> None:  # noqa: B027 - most data sets have no more settings
        """Raise ConfigError for a setting of the subclass that is wrong."""

    def _rows(self) -> Iterable[Row]:
        """Yield the items as they stand in the file."""
        return read_rows(self.path)

    @abstractmethod
    def _example(self, row: Row) -> Example:
        """Return the example of a row. Raises: DataError that begins with where the row stands."""

    @cached_property
    def _checked(self) -> tuple[list[Example], list[SkippedItem]]:
        kept: dict[str, Example] = {}
        skipped: list[SkippedItem] = []
        for row in islice(self._rows(), self.num_samples):
            try:
                example = _as_text(self._example(row))
                if example.id in kept:
                    raise DataError(
                        f"{row.where} has the id {example.id!r}, which an earlier item has; ids must differ"
                    )
                kept[example.id] = example
            except DataError as error:
                if self.on_bad_item == "fail":
                    raise DataError(f"{error} (dataset.on_bad_item=skip leaves such items out)") from error
                skipped.append(SkippedItem(item=row.where, reason=str(error)))
        return list(kept.values()), skipped

    @property
    def skipped(self) -> Sequence[SkippedItem]:
        """The items that were left out, in the file's order."""
        return self._checked[1]

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of everything asked and expected, pictures included; where the files lie does not count."""
        digest = hashlib.sha256()
        for example in self.examples():
            texts = [example.id, example.cluster, example.context, example.question, example.reference]
            turns = [[turn.question, turn.answer] for turn in example.follow_ups]
            facts = sorted(map(repr, example.facts or ()))
            digest.update(json.dumps([texts, turns, facts, picture_digest(example.load_image)]).encode())
        return digest.hexdigest()

    def examples(self) -> Sequence[Example]:
        """Return the examples in the file's order."""
        return self._checked[0]

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return nothing: most formats state no facts."""
        return frozenset()


def _as_text(example: Example) -> Example:
    """Return the example with the picture marks in its texts escaped, whichever reader made it."""
    facts = example.facts
    return replace(
        example,
        context=without_marks(example.context),
        question=without_marks(example.question),
        reference=without_marks(example.reference),
        follow_ups=tuple(
            Turn(question=without_marks(turn.question), answer=without_marks(turn.answer))
            for turn in example.follow_ups
        ),
        facts=facts and frozenset(without_marks(fact) if isinstance(fact, str) else fact for fact in facts),
    )


def texts_by_id(source: str, setting: str) -> dict[str, str]:
    """Return id -> text of a JSON object. Raises: ConfigError, DataError naming the id."""
    path = existing(source, setting)
    fields = Fields(read_json(path, setting), path.name, ("a text for each id",))
    return {name: fields.text(name) for name in fields.content}


def answers_by_id(source: str) -> dict[str, Mapping[str, Any]]:
    """Return question_id -> row of JSON lines. Raises: ConfigError, DataError naming the line."""
    existing(source, "answers")
    found: dict[str, Mapping[str, Any]] = {}
    for row in read_rows(source):
        fields = row.fields("question_id")
        name = fields.id("question_id", default="")
        if name in found:
            raise DataError(f"{row.where} has the question_id {name!r}, which an earlier line has; ids must differ")
        found[name] = fields.content
    return found


def answer_for(name: str, answers: Mapping[str, Any], where: str, source: str) -> Any:
    """Return the answer of question `name`. Raises: DataError if there is none."""
    if name not in answers:
        raise DataError(f"{where} (id {name!r}) has no answer in {source}; give the file that belongs to the questions")
    return answers[name]
