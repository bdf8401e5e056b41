"""Rows of a file: JSON, JSON lines, CSV or Parquet, each knowing where it stands.

A row that cannot be read carries its problem instead of content, so that a data set may leave it out.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.datasets.hub import HUB_PREFIX, hub_rows
from kvbench.errors import ConfigError, DataError, missing_path

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
_TWICE = "an object has the name {0!r} twice"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row: `where` it stands ("talks.json, item 3"), its number from 0, and what it holds."""

    where: str
    number: int
    content: Any = None
    problem: str | None = None


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
    except FileNotFoundError as error:
        raise ConfigError(f"dataset.{setting} {path} cannot be read ({missing_path(path)}); give a file") from error
    except OSError as error:
        raise ConfigError(f"dataset.{setting} {path} cannot be read ({error.strerror}); give a file") from error


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
        content = json.loads(read_bytes(path, setting).decode("utf-8-sig"), object_pairs_hook=_object)
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
    repeated.twice = _first_twice(name for name, _ in pairs) or ""
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
        if isinstance(found, dict):
            left.extend(found.values())
        elif isinstance(found, list | tuple):
            left.extend(found)
    return None


def _json(path: Path) -> Iterator[Row]:
    items = read_items(path)
    if not isinstance(items, list):
        raise DataError(f"{path} holds a {type(items).__name__}; it must be a list of objects")
    for number, item in enumerate(items):
        yield item_row(f"{path.name}, item {number}", number, item)


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    for line, raw in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            yield _json_line(raw, f"{path.name}, line {line}", number)
            number += 1


def _json_line(raw: bytes, where: str, number: int) -> Row:
    try:
        return item_row(where, number, json.loads(raw.decode(), object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        return Row(where=where, number=number, problem=f"{where} is not JSON in UTF-8 ({error})")


def _csv(path: Path) -> Iterator[Row]:
    header, *rows = _cells(path)
    twice = _first_twice(name for name in header if name)
    if twice is not None:
        raise DataError(f"{path}: the header has the column {twice!r} twice; every column needs a name of its own")
    for number, cells in enumerate(rows):
        yield _csv_row(f"{path.name}, row {number}", number, header, cells)


def _csv_row(where: str, number: int, header: Sequence[str], cells: Sequence[str]) -> Row:
    # A first column without a name is an index, as pandas writes one; any other such column may hold nothing.
    if len(cells) != len(header):
        problem = (
            f"{where} has {len(cells)} cells, and the header names {len(header)} columns; put cells that hold a comma "
            'or a line end into double quotes (")'
        )
        return Row(where=where, number=number, problem=problem)
    stray = next((at for at, name in enumerate(header) if at and not name and cells[at]), None)
    if stray is not None:
        problem = f"{where} has the cell {cells[stray][:40]!r} in column {stray + 1}, which the header does not name"
        return Row(where=where, number=number, problem=problem)
    named = {name: cell for at, (name, cell) in enumerate(zip(header, cells, strict=True)) if name or not at}
    return Row(where=where, number=number, content=named)


def _cells(path: Path) -> list[list[str]]:
    """Return header and rows without blank lines; a cell may have any length. Raises: ConfigError, DataError."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        rows = []
        try:
            rows = [cells for cells in reader if cells]
        except csv.Error as error:
            raise DataError(f"{path} is not CSV in UTF-8 (line {reader.line_num}: {error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not CSV in UTF-8 ({error})") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise DataError(f"{path} is not CSV in UTF-8 (it has no header)")
    return rows


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            twice = _first_twice(file.schema_arrow.names)
            if twice is not None:
                raise DataError(f"{path} has the column {twice!r} twice; every column needs a name of its own")
            for batch in file.iter_batches(batch_size=64):
                for content in batch.to_pylist():
                    yield Row(where=f"{path.name}, row {number}", number=number, content=content)
                    number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({' '.join(str(error).split())})") from error
