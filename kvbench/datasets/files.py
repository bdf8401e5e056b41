"""Data sets read from files: rows that know where they stand, checked when made, bad items refused or left out.

Rows come from JSON, JSON lines, CSV or Parquet, or from the Hugging Face hub (extra `datasets`): a source there is
pinned to a commit, `hub:OWNER/NAME@COMMIT`, with `?config=...&split=...` where the default (no configuration, split
test) is not meant. A row that cannot be read carries its problem instead of content, so that a data set may leave it
out. `FileDataset` makes the examples of the rows; answers may lie in a file of their own, by question id.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.datasets.base import Example, Fields, OnBadItem, SkippedItem, Turn, without_marks
from kvbench.datasets.pictures import picture_digest
from kvbench.errors import ConfigError, DataError, close_matches, missing_path

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
