"""`kvbench report`: page, figures and tables again, from records alone.

kvbench report results
kvbench report laptop cluster/results --out both
kvbench report results --format latex --out table.tex
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.cli import Parser
from kvbench.cli.results import print_problems
from kvbench.errors import ConfigError
from kvbench.results.files import write_out
from kvbench.stats.tests import parse_margins

if TYPE_CHECKING:
    from kvbench.report.compare import Choices
    from kvbench.report.load import Results


_FORMATS = ("html", "md", "csv", "latex")
_SHARED = Path("report")


def report_command(arguments: Sequence[str]) -> int:
    """Build what `arguments` ask for and return the exit code. Raises: ConfigError."""
    args = _parser().parse_args(list(arguments))
    margins, folders, out = parse_margins(args.margin), args.folders or [Path("results")], args.out
    if out is not None and args.format == "html" and out.is_file():
        raise ConfigError(f"--out is the file {out}; for --format html it must be a folder")
    if out is not None and args.format != "html" and out.is_dir():
        raise ConfigError(f"--out is the folder {out}; for --format {args.format} it must be a file")
    if args.wandb and args.format != "html":
        raise ConfigError(f"--wandb builds a W&B Report and --format {args.format} a text; give one of them")
    from kvbench.report.compare import Choices
    from kvbench.report.load import load_folders

    choices = Choices(margins=margins, intersect=args.intersect)
    results = load_folders(folders, sweep=args.sweep)
    if not results.records and not results.problems:
        named = ", ".join(map(str, folders))
        raise ConfigError(f"there is no cells/*/record.json in {named}; run a sweep first or give the right folder")
    several = len(results.folders) > 1
    folder = out or (_SHARED if several else folders[0] / "report")
    if args.wandb:
        from kvbench.sinks.wandb.report import wandb_report

        wandb_report(results, folder, choices, project=args.project, entity=args.entity)
    elif args.format == "html":
        from kvbench.report.build import write_report
        from kvbench.report.laws import law_rows, print_laws
        from kvbench.report.tables import print_tables

        print_tables(results, choices=choices)
        print_laws(law_rows(results))
        written = write_report(results, folder, folder if out or several else folders[0], choices)
        print(f"report: {written.page}")
    else:
        print_problems(results.problems, sys.stderr)
        text = _text(results, args.format, choices)
        print(text if out is None else f"{write_out(out, text.encode())}\n", end="")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="kvbench report", description="Build page, figures and tables from records.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="results folders (default: results)")
    parser.add_argument("--sweep", help="only the cells of this sweep")
    parser.add_argument("--format", choices=_FORMATS, default="html", help="html: page, figures and tables (default)")
    parser.add_argument("--html", dest="format", action="store_const", const="html", help="the same as --format html")
    parser.add_argument("--out", type=Path, help="html: folder (default FOLDER/report); else a file, not the terminal")
    parser.add_argument(
        "--margin", action="append", default=[], metavar="MEASURE=X", help="what is too small to matter"
    )
    parser.add_argument("--intersect", action="store_true", help="compare cells on the samples that both scored")
    parser.add_argument("--wandb", action="store_true", help="build the W&B Report instead: save it, or write its spec")
    parser.add_argument("--project", default="kvbench", help="W&B project of --wandb (default: kvbench)")
    parser.add_argument("--entity", help="W&B team or user of --wandb (default: that of the account)")
    return parser


def _text(results: Results, file_format: str, choices: Choices) -> str:
    from kvbench.report.standing import judge
    from kvbench.report.verdicts import verdicts_csv, verdicts_latex, verdicts_markdown

    make = {"md": verdicts_markdown, "csv": verdicts_csv, "latex": verdicts_latex}[file_format]
    return make([judge(group, choices) for group in results.groups])
