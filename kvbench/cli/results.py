"""`kvbench results`: look at, export, check and tidy a results folder, from its records alone; no torch.

kvbench results list results --policy h2o --status ok
kvbench results csv results --quality > quality.csv
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvbench.cli import Parser
from kvbench.errors import ConfigError, check_known, close_matches
from kvbench.measures import format_bytes
from kvbench.results.files import write_out
from kvbench.results.maintenance import leftovers, remove, verify
from kvbench.results.record import STATUSES, Problem, read_cell
from kvbench.results.redaction import printable
from kvbench.results.store import RecordStore

if TYPE_CHECKING:
    from kvbench.report.load import Results


_SELECTING = ("list", "table", "csv", "parquet")


def results_command(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its exit code. Raises: ConfigError."""
    args = _parser().parse_args(list(arguments))
    return _COMMANDS[args.command][1](args) or 0


def _parser() -> Parser:
    parser = Parser(prog="kvbench results", description="Look at, export, check and tidy a results folder.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (text, _) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
        if name in _SELECTING:
            command.add_argument("--policy", action="append", help="only this policy; may be repeated")
            command.add_argument("--sweep", help="only cells of this sweep")
            command.add_argument("--status", action="append", help=f"only this status: {', '.join(STATUSES)}")
        if name in ("csv", "parquet"):
            command.add_argument("--samples", action="store_true", help="a row per cell and sample")
            command.add_argument("--long", action="store_true", help="a row per cell and measurement, with its unit")
            command.add_argument("--quality", action="store_true", help="only what a second run gives again")
            command.add_argument("--out", type=Path, help="file to write")
        if name == "show":
            command.add_argument("key", help="the cell's key, or the first digits of it")
            command.add_argument("--json", action="store_true", help="the whole record as JSON")
        if name == "gc":
            command.add_argument("--delete", action="store_true", help="remove instead of list")
    return parser


def _selected(args: argparse.Namespace) -> Results:
    from kvbench.report.load import load_results

    results = load_results(args.folder, sweep=args.sweep)
    for name in args.status or ():
        check_known("--status", name, STATUSES)
    for name in args.policy or ():
        check_known("--policy", name, {cell.policy for cell in results.records})
    chosen = [
        cell
        for cell in results.records
        if (not args.policy or cell.policy in args.policy) and (not args.status or cell.status in args.status)
    ]
    return replace(results, records=tuple(chosen))


def _list(args: argparse.Namespace) -> None:
    results = _selected(args)
    for cell in results.records:
        names = f"{cell.status:<12} {cell.policy:<16} {cell.budget:<16} {cell.model} on {cell.dataset}"
        names = f"{names:<80} {cell.sweep:<12} {cell.started_utc[:19]}"
        print(printable(f"{cell.key[:16]}  {names}{'  ' + cell.error if cell.failed else ''}")[:200])
    print(f"{len(results.records)} cells, {len(results.problems)} problems")
    print_problems(results.problems)


def print_problems(problems: Sequence[Problem], file: TextIO | None = None) -> None:
    """Print what was left out of a table, a line each, to `file` where stdout holds the table itself."""
    for problem in problems:
        print(printable(f"problem: {problem.path}: {problem.message}"), file=file)


def _show(args: argparse.Namespace) -> None:
    body = _one_record(args.folder, args.key.lower())
    if args.json:
        print(json.dumps(body, indent=2, sort_keys=True))
        return
    attempts = RecordStore(args.folder).attempts(body["key"])
    head = {name: body[name] for name in ("key", "sweep", "status", "phase", "started_utc", "duration_s")}
    numbers = {name: entry["value"] for name, entry in body["measurements"].items()}
    parts = {"cell": head, "labels": body["labels"], "error": body["error"] or {}, "settings": body["cell"]}
    for title, part in {**parts, "measurements": numbers, "environment": body["environment"]}.items():
        print(title)
        for name, value in part.items():
            lines = str(value).splitlines() or [""]
            shown = [f"{name}: {lines[0]}"] if len(lines) == 1 else [f"{name}:", *(f"  {line}" for line in lines)]
            print(*(printable(f"  {line}") for line in shown), sep="\n")
    print("attempts", *(f"  {body['attempt']} {body['status']} {body['started_utc']}" for body in attempts), sep="\n")


def _one_record(folder: Path, start: str) -> dict[str, Any]:
    from kvbench.report.load import load_results

    keys = [cell.key for cell in load_results(folder).records]
    found = [key for key in keys if start and key.startswith(start)]
    if len(found) != 1:
        what = "begin with it; give more digits" if found else f"has it; {close_matches(start, [k[:16] for k in keys])}"
        raise ConfigError(f"key is {start!r}; {len(found) or 'no'} cell{'s' if found else ''} {what}")
    return read_cell(RecordStore(folder).cell_folder(found[0])).body


def _table(args: argparse.Namespace) -> None:
    from kvbench.report.tables import print_tables

    print_tables(_selected(args))


def _export(args: argparse.Namespace) -> None:
    from kvbench.report import tables

    kinds = {"samples": tables.samples_frame, "long": tables.long_frame, "quality": tables.quality_frame}
    asked = [name for name in kinds if getattr(args, name)]
    if len(asked) > 1:
        raise ConfigError(f"{' and '.join(f'--{name}' for name in asked)} are different tables; give one of them")
    make = kinds[asked[0]] if asked else tables.cells_frame
    results = _selected(args)
    print_problems(results.problems, sys.stderr)
    frame = make(results)
    if args.command == "parquet":
        name = "samples" if args.samples else "table_long" if args.long else "table"
        path = args.out or args.folder / f"{name}.parquet"
        print(write_out(path, tables.parquet_bytes(frame)))
    elif args.out is None:
        print(tables.csv_text(frame), end="")
    else:
        print(write_out(args.out, tables.csv_text(frame).encode()))


def _verify(args: argparse.Namespace) -> int:
    seen = verify(args.folder)
    print_problems(seen.problems)
    print(f"{seen.num_records} records and {seen.num_attempts} attempts hold; {len(seen.problems)} problems")
    return 1 if seen.problems else 0


def _gc(args: argparse.Namespace) -> int:
    found = leftovers(args.folder)
    failed = 0
    for leftover in found:
        done = not args.delete or remove(leftover)
        failed += not done
        said = "would remove" if not args.delete else "removed" if done else "could not remove"
        print(printable(f"{said} {leftover.path.relative_to(args.folder)} ({leftover.reason})"))
    size = format_bytes(sum(leftover.size_bytes for leftover in found))
    print(f"{len(found)} leftovers, {size}" + ("" if args.delete or not found else "; --delete removes them"))
    return 1 if failed else 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], int | None]]] = {
    "list": ("one line per cell: key, status, policy, budget, model, data set, sweep, when", _list),
    "show": ("everything about one cell: settings, numbers, environment, attempts", _show),
    "table": ("the results table", _table),
    "csv": ("a row per cell, per cell and measurement, or per cell and sample, to the terminal or a file", _export),
    "parquet": ("the same as a Parquet file", _export),
    "verify": ("check every file; exit code 1 if one must not be believed", _verify),
    "gc": ("list what killed processes left behind; --delete removes it", _gc),
}
