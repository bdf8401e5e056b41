"""Rows of a file: JSON, JSON lines, CSV or Parquet, each knowing where it stands.

A row that cannot be read carries its problem instead of content, so that a data set may leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kvbench.datasets.hub import HUB_PREFIX, hub_rows
from kvbench.errors import ConfigError, DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


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
        reason = "it is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(f"dataset.{setting} {source} cannot be read ({reason}); give a file")
    return path


def read_bytes(path: Path, setting: str = "path") -> bytes:
    """Return the content of a file. Raises: ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"dataset.{setting} {path} cannot be read ({error.strerror}); give a file") from error


def read_json(path: Path, setting: str = "path") -> Any:
    """Return what a JSON file holds. Raises: ConfigError, DataError; a name that stands twice is one."""
    try:
        return json.loads(read_bytes(path, setting).decode("utf-8-sig"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON in UTF-8 ({error})") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the name {twice!r} twice")
    return found


def _json(path: Path) -> Iterator[Row]:
    items = read_json(path)
    if not isinstance(items, list):
        raise DataError(f"{path} holds a {type(items).__name__}; it must be a list of objects")
    for number, item in enumerate(items):
        yield Row(where=f"{path.name}, item {number}", number=number, content=item)


def _json_lines(path: Path) -> Iterator[Row]:
    number = 0
    for line, raw in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            yield _json_line(raw, f"{path.name}, line {line}", number)
            number += 1


def _json_line(raw: bytes, where: str, number: int) -> Row:
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_distinct)
        return Row(where=where, number=number, content=content)
    except (ValueError, RecursionError) as error:
        return Row(where=where, number=number, problem=f"{where} is not JSON in UTF-8 ({error})")


def _csv(path: Path) -> Iterator[Row]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"dataset.path {path} cannot be read ({error.strerror}); give a CSV file") from error
    except ValueError as error:  # pandas' own errors and wrong UTF-8
        raise DataError(f"{path} is not CSV in UTF-8 ({' '.join(str(error).split())})") from error
    for number, content in enumerate(table.to_dict("records")):
        yield Row(where=f"{path.name}, row {number}", number=number, content=content)


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for content in batch.to_pylist():
                    yield Row(where=f"{path.name}, row {number}", number=number, content=content)
                    number += 1
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a whole Parquet file ({' '.join(str(error).split())})") from error
