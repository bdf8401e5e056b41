"""What is done with a results folder: shown, looked at, compared, audited, sent to W&B; from records alone, no torch.

kvbench report laptop cluster/results --out both     page, figures and tables again
kvbench report results --format latex --out table.tex
kvbench results list results --policy h2o --status ok
kvbench results csv results --quality > quality.csv
kvbench diff main/results branch/results             exit code 1 if something is worse, for a merge gate
kvbench diff before/report/index.html after/report/index.html --format markdown
kvbench audit results --json                         does the folder hold together?
kvbench wandb sync results --sweep default --project kvbench
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from kvbench import installed_version
from kvbench.cli import Parser
from kvbench.errors import ConfigError, check_known, close_matches, missing_path
from kvbench.measures import MEASURES, format_bytes, measure_named
from kvbench.results.files import seal, write_out
from kvbench.results.record import STATUSES, Problem, read_cell
from kvbench.results.redaction import printable, redact
from kvbench.results.store import RecordStore, leftovers, remove, verify
from kvbench.sinks import say
from kvbench.sinks.wandb.run import (
    MODES,
    Online,
    Place,
    check_installed,
    check_online,
    check_project,
    quiet_setup,
    resolve_mode,
)
from kvbench.sinks.wandb.sync import Outcome, jobs_of, send_runs
from kvbench.stats.tests import parse_margins

if TYPE_CHECKING:
    from kvbench.report.compare import Choices
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


_DESCRIPTION = (
    "Say what changed from A to B, two results folders or pages of their reports: cells, settings, environment, paired "
    "verdicts, samples that became worse. Exit code 0: nothing is shown to be worse, 1: something is worse beyond its "
    "margin or fails now, 2: wrong input, or nothing that both have can be compared."
)
_FORMATS = ("text", "json", "markdown")


def diff_command(arguments: Sequence[str]) -> int:
    """Print what changed and return the exit code. Raises: ConfigError."""
    parser = Parser(prog="kvbench diff", description=_DESCRIPTION)
    parser.add_argument("a", type=Path, metavar="A", help="results folder, or the page of its report: before")
    parser.add_argument("b", type=Path, metavar="B", help="the same: after")
    parser.add_argument("--measure", action="append", default=[], help="compare this one instead; may be repeated")
    parser.add_argument(
        "--margin", action="append", default=[], metavar="MEASURE=X", help="what is too small to matter"
    )
    parser.add_argument("--sweep", help="only cells of this sweep, in both")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="worst samples shown per cell (default: 5)")
    parser.add_argument("--format", choices=_FORMATS, default="text", help="text (default), json, markdown")
    args = parser.parse_args(list(arguments))
    judged = [name for name, known in MEASURES.items() if known.better != "none"]
    names = [measure_named("--measure", word, judged) for words in args.measure for word in words.split(",")]
    margins, folders = parse_margins(args.margin), [_folder("A", args.a), _folder("B", args.b)]
    if args.samples < 0:
        raise ConfigError(f"--samples is {args.samples}; it must be 0 or more")
    from kvbench.report.compare import Choices
    from kvbench.report.diff import as_json, diff, markdown, text_lines

    before, after = (_read(folder, args.sweep) for folder in folders)
    found = diff(before, after, Choices(margins=margins), measures=names)
    if found.is_empty:
        cells = f"{len(before.records)} and {len(after.records)} cells"
        shared = f"{len(found.pairs)} of which both have" if found.pairs else "none of which both have"
        raise ConfigError(
            f"{folders[0]} and {folders[1]} hold {cells}, {shared}, and no number of them can be compared"
        )
    if args.format == "json":
        print(json.dumps(as_json(found), indent=2, sort_keys=True))
    elif args.format == "markdown":
        print(markdown(found, num_samples=args.samples), end="")
    else:
        print(f"A is {folders[0]}, B is {folders[1]}")
        print("\n".join(text_lines(found, num_samples=args.samples)))
    return 1 if found.is_worse else 0


def _folder(name: str, path: Path) -> Path:
    """Return the results folder that a path means: itself, or where the page of a report lies in."""
    if not path.exists():
        raise ConfigError(f"{name} is {path}; {missing_path(path)}")
    is_page = path.suffix in (".html", ".htm") or (path / "index.html").is_file()
    places = [path, *list(path.absolute().parents)[:2]] if is_page else [path]
    for place in places:
        if (place / "cells").is_dir():
            return place
    what = "a page without its records" if is_page else "no results folder"
    raise ConfigError(
        f"{name} is {path}, {what}: there is no cells folder in {places[-1]}; give one that a sweep wrote"
    )


def _read(folder: Path, sweep: str | None) -> Results:
    from kvbench.report.load import load_results

    results = load_results(folder, sweep=sweep)
    if not results.records:
        first = f"; {results.problems[0].path}: {results.problems[0].message}" if results.problems else ""
        raise ConfigError(f"{folder} holds no record that can be used{first}")
    return results


_AUDITING = (
    "Check that the records of a folder hold together: sealed, keyed, counted, recomputed, within the budget. "
    "Writes audit.json (sealed) and audit.svg (a badge), and prints the table and a line for a README. "
    "Exit code 0: none failed, 1: one failed, 2: wrong command line or no records. What is not run is counted apart."
)


def audit_command(arguments: Sequence[str]) -> int:
    """Audit the folder that `arguments` name and return the exit code. Raises: ConfigError."""
    parser = Parser(prog="kvbench audit", description=_AUDITING)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--sweep", help="only cells of this sweep")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.add_argument("--out", type=Path, help="file to write, its folder is made; FOLDER/audit.json if not given")
    args = parser.parse_args(list(arguments))
    from kvbench.audit import KIND, VERSION, audit, audit_body, badge_line, badge_svg, table_lines

    out: Path = args.out or args.folder / "audit.json"
    if out.suffix != ".json":
        raise ConfigError(f"--out is {str(out)!r}; its name must end in .json, the badge takes .svg beside it")
    result, badge = audit(args.folder, sweep=args.sweep), out.with_suffix(".svg")
    body = audit_body(result, version=installed_version(), sweep=args.sweep)
    write_out(out, seal(KIND, VERSION, body))
    write_out(badge, badge_svg(result).encode())
    if args.json:
        print(json.dumps(body, indent=2, sort_keys=True))
    else:
        for line in table_lines(result):
            print(line)
        print(f"written: {out}, {badge}")
        print(f"for a README: {badge_line(result, badge.as_posix(), out.as_posix())}")
    return 1 if result.failed else 0


_MODES = tuple(mode for mode in MODES if mode != "disabled")
_LONGEST_S = 600.0
_SHOWN = 5  # failures, which are mostly all of one kind
_PLURALS = {"cell": "cells", "summary": "summaries"}


def wandb_command(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its exit code: 1 if a run could not be sent. Raises: ConfigError."""
    args = _wandb_parser().parse_args(list(arguments))
    check_known("--mode", args.mode, _MODES)
    if not 0 < args.timeout <= _LONGEST_S:
        raise ConfigError(f"--timeout is {args.timeout:g}; it must lie in (0, {_LONGEST_S:g}] seconds")
    check_project(args.project)
    check_installed("records are to be sent to Weights & Biases")
    if args.mode == "online":
        check_online("--mode", "--mode auto")
    place = Place(project=args.project, entity=args.entity, folder=args.to or args.folder, timeout_s=args.timeout)
    jobs = jobs_of(args.folder, args.sweep, place.folder)
    mode, reason = resolve_mode(args.mode)
    if mode == "disabled":
        raise ConfigError("WANDB_MODE is 'disabled', so nothing would be sent; unset it, or give --mode")
    with tqdm(total=len(jobs), desc="wandb", unit=" runs", disable=None, leave=False) as bar:
        outcome = send_runs(jobs, place, mode, bar.update)
    _say(outcome, place, mode, reason)
    return 1 if outcome.failures else 0


def _wandb_parser() -> Parser:
    parser = Parser(prog="kvbench wandb", description="Send records to Weights & Biases.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    text = "send each cell that was not sent yet as one run, and each sweep as one more"
    sync = commands.add_parser("sync", help=text, description=f"{text[0].upper()}{text[1:]}.")
    sync.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    sync.add_argument("--sweep", help="only the cells of this sweep")
    sync.add_argument("--project", default="kvbench", help="W&B project (default: kvbench)")
    sync.add_argument("--entity", help="W&B team or user (default: that of the account)")
    sync.add_argument("--mode", default="auto", help="auto (online with a key, else offline), online, offline")
    sync.add_argument("--to", type=Path, metavar="DIR", help="folder for wandb's files (default: the results folder)")
    sync.add_argument("--timeout", type=float, default=30.0, metavar="S", help="limit for the start and end of a run")
    return parser


def _say(outcome: Outcome, place: Place, mode: Online, reason: str) -> None:
    """Print what was sent where, and how to go on if something is left to do."""
    counts = [f"{count} {what if count == 1 else _PLURALS[what]}" for what, count in outcome.sent.items()]
    address = " ".join(part for part in (quiet_setup().rstrip("/"), place.entity, place.project) if part)
    where = f"sent to {address}" if mode == "online" else f"kept offline ({reason}) in {place.files}"
    there = f"{outcome.num_there} there already" if outcome.num_there else ""
    sent = f"{' and '.join(counts)} {where}" if counts else "" if there else f"nothing {where}"
    say(f"wandb: {'; '.join(part for part in (sent, there) if part)}")
    if mode == "offline":
        say(f"wandb: upload them with: {place.upload_command}")
    for failure in outcome.failures[:_SHOWN]:
        say(f"wandb: failed: {redact(failure)}")
    if outcome.failures:
        say(f"wandb: {len(outcome.failures)} failed, {outcome.num_left} not tried; the same command goes on with them")


_REPORT_FORMATS = ("html", "md", "csv", "latex")
_SHARED = Path("report")


def report_command(arguments: Sequence[str]) -> int:
    """Build what `arguments` ask for and return the exit code. Raises: ConfigError."""
    args = _report_parser().parse_args(list(arguments))
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


def _report_parser() -> Parser:
    parser = Parser(prog="kvbench report", description="Build page, figures and tables from records.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="results folders (default: results)")
    parser.add_argument("--sweep", help="only the cells of this sweep")
    parser.add_argument(
        "--format", choices=_REPORT_FORMATS, default="html", help="html: page, figures and tables (default)"
    )
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
