"""`kvbench report`: table, figures and page again, from records alone."""

from __future__ import annotations

from pathlib import Path

from kvbench.parser import Parser


def report_command(arguments: list[str]) -> int:
    """Build the report that `arguments` ask for, print the table, and return the exit code."""
    from kvbench.report.load import load_results
    from kvbench.report.tables import print_tables

    parser = Parser(prog="kvbench report", description="Build table, figures and page from records.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--sweep", help="only the cells of this sweep")
    parser.add_argument("--wandb", action="store_true", help="build the W&B Report: save it, or write its spec")
    parser.add_argument("--project", default="kvbench", help="W&B project of --wandb (default: kvbench)")
    parser.add_argument("--entity", help="W&B team or user of --wandb (default: that of the account)")
    args = parser.parse_args(arguments)
    if args.wandb:
        from kvbench.wandb_report import wandb_report

        wandb_report(load_results(args.folder, sweep=args.sweep), args.folder, project=args.project, entity=args.entity)
        return 0
    print_tables(load_results(args.folder, sweep=args.sweep))
    return 0
