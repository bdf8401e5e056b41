"""Build the whole report from a results folder: page, figures, markdown, CSV and Parquet.

>>> build_report(Path("results")).page
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvbench.errors import ConfigError
from kvbench.report.comparisons import DECLARED, Choices
from kvbench.report.folders import load_folders
from kvbench.report.frames import write_csv_and_parquet
from kvbench.report.load import Results
from kvbench.report.page import render_page
from kvbench.report.plots import draw_plots
from kvbench.report.tables import markdown_tables


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


def write_report(results: Results, folder: Path, tables_folder: Path, choices: Choices = DECLARED) -> ReportPaths:
    """Write index.html, plots/*.svg and table.md into `folder`, table and samples as CSV and Parquet.

    The same records give the same bytes. Figures of an earlier report are removed.
    Raises: ConfigError if a folder cannot be written to.
    """
    plots = draw_plots(results)
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for stale in (folder / "plots").glob("*.svg"):
            stale.unlink()
        figures = tuple(_written(folder / "plots" / f"{plot.name}.svg", plot.svg) for plot in plots)
        markdown = _written(folder / "table.md", markdown_tables(results, choices))
        page = _written(folder / "index.html", render_page(results, plots, choices))
        tables = write_csv_and_parquet(results, tables_folder)
    except OSError as error:
        raise ConfigError(
            f"cannot write the report below {folder}: {error.strerror or error}. "
            "The folder must be writable; choose another one with --out."
        ) from error
    return ReportPaths(page=page, markdown=markdown, plots=figures, tables=tables)


def _written(path: Path, text: str) -> Path:
    """Replace `path` in one step, so that an open page never shows half a report."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)
    return path
