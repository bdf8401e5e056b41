"""Build the whole report from a results folder: page, figures, markdown, CSV and Parquet.

    build_report(Path("results")).page

`is_current` tells whether a report still says what the records say, without reading them: a stamp beside it holds a
hash over the files it was built from (name, size, time, inode) and the version that built it. Records are immutable and
only ever replaced, so an equal hash means equal bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kvbench import installed_version
from kvbench.errors import ConfigError, KvbenchError
from kvbench.report.compare import DECLARED, Choices
from kvbench.report.figures.draw import draw_plots
from kvbench.report.laws import law_rows, laws_csv, laws_markdown
from kvbench.report.load import Results, load_folders
from kvbench.report.page import render_page
from kvbench.report.tables import TABLES, csv_and_parquet, markdown_tables
from kvbench.results.files import locked, replace_file
from kvbench.results.record import AUTOPSY_FILE

_MADE = ("report/index.html", "report/table.md", *(f"{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")))
_STAMP, _LOCK, _PLOTS = ".built-from", ".lock", "plots"
_OF_LAWS = ("laws.md", "laws.csv")  # only where the records tell of laws
MOST_CELLS_DRAWN = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportPaths:
    """Every file that a report consists of."""

    page: Path
    markdown: Path
    plots: tuple[Path, ...]
    tables: tuple[Path, ...]


def build_report(results_folder: Path, *, sweep: str | None = None) -> ReportPaths:
    """Write the report of one results folder: into its folder `report`, table and samples beside that.

    Raises: ConfigError if the folder is missing, cannot be written to, or has no record of `sweep`.
    """
    return write_report(load_folders([results_folder], sweep=sweep), results_folder / "report", results_folder)


def refresh_report(results_folder: Path) -> None:
    """Write the report of all records unless it says already what they say; one job does, the others wait for it.

    So of the jobs that end on one folder at the same time, the last one leaves a report with the cells of all.
    Raises: ConfigError if the folder is missing or cannot be written to.
    """
    if is_current(results_folder):
        return
    with _in_one_line(results_folder), locked(results_folder / "report" / _LOCK):
        if is_current(results_folder):
            return
        digest = inputs_digest(results_folder)
        files = _rendered(load_folders([results_folder]), results_folder / "report", results_folder, DECLARED)
        _publish(files, results_folder / "report")
        replace_file(results_folder / "report" / _STAMP, digest.encode())


def write_report(results: Results, folder: Path, tables_folder: Path, choices: Choices = DECLARED) -> ReportPaths:
    """Write index.html, plots/*.svg and table.md into `folder`, table and samples as CSV and Parquet.

    Where the records tell of laws, laws.md and laws.csv too. The same records give the same bytes. Figures of an
    earlier report are removed, and of two writers at once the later one leaves its whole report.
    Raises: ConfigError if a folder cannot be written to.
    """
    files = _rendered(results, folder, tables_folder, choices)
    with _in_one_line(folder), locked(folder / _LOCK):
        return _publish(files, folder)


def is_current(results_folder: Path) -> bool:
    """Return whether every file of the report is there and was built from the records that are there now."""
    try:
        stamp = (results_folder / "report" / _STAMP).read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
    return stamp == inputs_digest(results_folder) and all((results_folder / name).is_file() for name in _MADE)


def inputs_digest(results_folder: Path) -> str:
    """Return the hash of what a report would be built from now; take it before building."""
    digest = hashlib.sha256(installed_version().encode())
    cells, frontiers = results_folder / "cells", results_folder / "frontier"
    patterns = ("*/record.json", "*/attempt-*.json", f"*/{AUTOPSY_FILE}")
    for path in sorted([*(path for pattern in patterns for path in cells.glob(pattern)), *frontiers.glob("*.json")]):
        with contextlib.suppress(FileNotFoundError):  # another job has set it aside since
            stat = path.stat()
            digest.update(f"{path.parent.name} {path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n".encode())
    return digest.hexdigest()


def _rendered(results: Results, folder: Path, tables_folder: Path, choices: Choices) -> dict[Path, bytes]:
    """Return the content of every file, by its path."""
    plots, laws = draw_plots(_drawn(results)), law_rows(results)
    of_laws = dict(zip(_OF_LAWS, (laws_markdown(laws), laws_csv(laws)), strict=True)) if laws else {}
    return {
        **{folder / _PLOTS / f"{plot.name}.svg": plot.svg.encode() for plot in plots},
        folder / "table.md": markdown_tables(results, choices).encode(),
        folder / "index.html": render_page(results, plots, choices, tables=_way(folder, tables_folder)).encode(),
        **{tables_folder / name: data for name, data in csv_and_parquet(results).items()},
        **{folder / name: text.encode() for name, text in of_laws.items()},
    }


def _way(folder: Path, other: Path) -> str:
    """Return the way from one folder to another, as a link has it."""
    steps = Path(os.path.relpath(other, folder)).as_posix()
    return "" if steps == "." else f"{steps}/"


def _publish(files: dict[Path, bytes], folder: Path) -> ReportPaths:
    """Put every file in its place. Until the stamp is written again, the report counts as out of date."""
    (folder / _STAMP).unlink(missing_ok=True)
    for path, data in files.items():
        replace_file(path, data)
    for old in (*(folder / _PLOTS).glob("*.svg"), *(folder / name for name in _OF_LAWS)):
        if old not in files:
            old.unlink(missing_ok=True)
    page, markdown = folder / "index.html", folder / "table.md"
    plots = tuple(path for path in files if path.parent == folder / _PLOTS)
    return ReportPaths(page=page, markdown=markdown, plots=plots, tables=tuple(files)[len(plots) + 2 :])


@contextlib.contextmanager
def _in_one_line(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, KvbenchError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise ConfigError(
            f"cannot write the report below {folder}: {cause.strerror or cause}. "
            "The folder must be writable; choose another one with --out."
        ) from error


def _drawn(results: Results) -> Results:
    """Return the first groups, up to some hundred cells: figures of more take minutes, `kvbench plot` draws any."""
    kept: set[tuple[str, str]] = set()
    room = MOST_CELLS_DRAWN
    for group in results.groups:
        room -= len(group.cells)
        if room < 0:
            break
        kept.add((group.model, group.dataset))
    return replace(results, records=tuple(cell for cell in results.records if (cell.model, cell.dataset) in kept))
