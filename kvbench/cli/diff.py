"""`kvbench diff`: what changed from one results folder to another, with an exit code that a merge gate can use.

kvbench diff main/results branch/results
kvbench diff before/report/index.html after/report/index.html --format markdown
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.cli import Parser
from kvbench.errors import ConfigError, missing_path
from kvbench.measures import MEASURES, measure_named
from kvbench.stats.tests import parse_margins

if TYPE_CHECKING:
    from kvbench.report.load import Results

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
