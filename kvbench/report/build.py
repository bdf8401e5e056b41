"""Build the whole report from a results folder: page, figures, markdown, CSV and Parquet.

>>> build_report(Path("results")).page
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kvbench.errors import ConfigError, KvbenchError
from kvbench.report.comparison import DECLARED, Choices
from kvbench.report.folders import load_folders
from kvbench.report.frames import csv_and_parquet
from kvbench.report.freshness import STAMP, inputs_digest, is_current, write_stamp
from kvbench.report.load import Results
from kvbench.report.page import render_page
from kvbench.report.plots import draw_plots
from kvbench.report.tables import markdown_tables
from kvbench.results.files import locked, replace_file

MOST_CELLS_DRAWN = 300
_LOCK = ".lock"


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
        write_stamp(results_folder, digest)


def write_report(results: Results, folder: Path, tables_folder: Path, choices: Choices = DECLARED) -> ReportPaths:
    """Write index.html, plots/*.svg and table.md into `folder`, table and samples as CSV and Parquet.

    The same records give the same bytes. Figures of an earlier report are removed, and of two writers at once
    the later one leaves its whole report. Raises: ConfigError if a folder cannot be written to.
    """
    files = _rendered(results, folder, tables_folder, choices)
    with _in_one_line(folder), locked(folder / _LOCK):
        return _publish(files, folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rendered:
    """The content of every file, by its path."""

    plots: dict[Path, bytes]
    markdown: tuple[Path, bytes]
    page: tuple[Path, bytes]
    tables: dict[Path, bytes]


def _rendered(results: Results, folder: Path, tables_folder: Path, choices: Choices) -> _Rendered:
    plots = draw_plots(_drawn(results))
    return _Rendered(
        plots={folder / "plots" / f"{plot.name}.svg": plot.svg.encode() for plot in plots},
        markdown=(folder / "table.md", markdown_tables(results, choices).encode()),
        page=(folder / "index.html", render_page(results, plots, choices).encode()),
        tables={tables_folder / name: data for name, data in csv_and_parquet(results).items()},
    )


def _publish(files: _Rendered, folder: Path) -> ReportPaths:
    """Put every file in its place. Until the stamp is written again, the report counts as out of date."""
    (folder / STAMP).unlink(missing_ok=True)
    for path, data in [*files.plots.items(), files.markdown, files.page, *files.tables.items()]:
        replace_file(path, data)
    for old in (folder / "plots").glob("*.svg"):
        if old not in files.plots:
            old.unlink(missing_ok=True)
    return ReportPaths(
        page=files.page[0], markdown=files.markdown[0], plots=tuple(files.plots), tables=tuple(files.tables)
    )


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
