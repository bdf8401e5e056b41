"""`kvbench report`: table, figures and page again, from records alone."""

from __future__ import annotations

from pathlib import Path

from kvbench.parser import Parser


def report_command(arguments: list[str]) -> int:
    """Build the report that `arguments` ask for, print the table, and return the exit code."""
    from kvbench.report.build import build_report
    from kvbench.report.load import load_results
    from kvbench.report.tables import print_tables

    parser = Parser(prog="kvbench report", description="Build table, figures and page from records.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--sweep", help="only the cells of this sweep")
    args = parser.parse_args(arguments)
    print_tables(load_results(args.folder, sweep=args.sweep))
    print(f"report: {build_report(args.folder, sweep=args.sweep).page}")
    return 0
