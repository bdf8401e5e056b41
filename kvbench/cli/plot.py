"""One figure, or all, from records alone; and what each measure means, its unit, and which way is better.

kvbench plot --list
kvbench plot quality results --width single --out quality.pdf
kvbench plot all results --out figures/ --format pdf
kvbench measures rouge tpot

Names and flags are checked before matplotlib is imported.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.cli import Parser
from kvbench.errors import ConfigError, check_known
from kvbench.measures import MAX_TURNS, MEASURES, Measure, measure_named
from kvbench.report.figures import FIGURES, FORMATS, STYLES, WIDTHS
from kvbench.results.files import write_out

if TYPE_CHECKING:
    from kvbench.report.figures import FigureKind
    from kvbench.report.load import Group, Results


_ALL = "all"


def plot_command(arguments: Sequence[str]) -> int:
    """Draw what `arguments` ask for; return 0, or 1 if there was nothing to draw. Raises: ConfigError."""
    args = _arguments(arguments)
    if args.list:
        for kind in FIGURES.values():
            print(f"{kind.name:<12} {kind.summary}\n{'':<12} needs {kind.needs}")
        return 0
    _check(args)
    return _draw(args)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="kvbench plot", description="Draw figures from records alone.")
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"{', '.join(FIGURES)}, or {_ALL}")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--list", action="store_true", help="describe every figure and stop")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--dataset", help="only this data set")
    parser.add_argument("--policies", help="only these policies, with commas between; full stays as the reference")
    parser.add_argument(
        "--measure", help="these measures, with commas between, instead of the figure's own choice; kvbench measures"
    )
    parser.add_argument("--out", type=Path, help="file (.svg, .pdf, .png) or folder; default NAME.svg here")
    parser.add_argument("--format", help=f"{', '.join(FORMATS)}, for files in a folder (default svg)")
    parser.add_argument("--width", default="double", help=f"{', '.join(WIDTHS)}: a screen, or columns of a paper")
    parser.add_argument("--style", default="light", help=f"{', '.join(STYLES)}")
    return parser.parse_args(list(arguments))


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused without reading a record; names of measures are made whole."""
    if args.name is None:
        raise ConfigError(f"which figure? {', '.join(FIGURES)}, or {_ALL}; kvbench plot --list describes them")
    check_known("figure", args.name, [*FIGURES, _ALL])
    check_known("--width", args.width, WIDTHS)
    check_known("--style", args.style, STYLES)
    args.measures = tuple(measure_named("--measure", word) for word in _words(args.measure))
    check_known("--format", args.format or FORMATS[0], FORMATS)
    if args.measure and args.name != _ALL and not FIGURES[args.name].takes_measures:
        takers = ", ".join(kind.name for kind in FIGURES.values() if kind.takes_measures)
        raise ConfigError(f"--measure is {args.measure!r}, but {args.name} shows what it shows; it is for {takers}")
    if _is_file(args.out):
        suffix = args.out.suffix.removeprefix(".")
        if suffix not in FORMATS:
            raise ConfigError(f"--out is {args.out}; a file ends in .{', .'.join(FORMATS)}, a folder in /")
        if args.format and args.format != suffix:
            raise ConfigError(f"--out is {args.out}, but --format is {args.format!r}; give one of them")


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _is_file(out: Path | None) -> bool:
    return out is not None and bool(out.suffix) and not out.is_dir()


def _draw(args: argparse.Namespace) -> int:
    from kvbench.report.load import load_folders

    results = load_folders([args.folder])
    groups = _chosen(results, args)
    kinds = list(FIGURES.values()) if args.name == _ALL else [FIGURES[args.name]]
    if _is_file(args.out) and len(groups) * len(kinds) > 1:
        found = "; ".join(group.title for group in groups)
        raise ConfigError(f"--out is one file, but there are several figures ({found}); choose, or give a folder")
    from kvbench.report.figures.draw import draw_one, palette_of
    from kvbench.report.figures.style import THEMES, Look

    # Looks come from all records, so that a figure of some policies looks like one of all.
    palette = palette_of(results, THEMES[args.style])
    look = Look(palette=palette, width=args.width, measures=args.measures, frontiers=results.frontiers)
    num_drawn = 0
    for group, kind, path in _paths(results, groups, kinds, args):
        drawn = draw_one(kind, group, look, path.suffix.removeprefix("."))
        if drawn is not None:
            print(write_out(path, drawn))
            num_drawn += 1
            continue
        wanted = f" with {args.measure}" if args.measure and kind.takes_measures else ""
        print(f"{kind.name}: not drawn for {group.title}{wanted}; it needs {kind.needs}")
        # Files that could have been the missing data, but cannot be used.
        place = "frontier/" if kind.name == "frontier" else "cells/"
        for problem in results.problems:
            if problem.path.startswith(place):
                print(f"  {problem.path}: {problem.message}"[:300])
    return 0 if num_drawn else 1


def _chosen(results: Results, args: argparse.Namespace) -> list[Group]:
    """Return the groups and cells that were asked for. Raises: ConfigError with close matches."""
    policies = _words(args.policies)
    for part in ("model", "dataset"):
        if asked := getattr(args, part):
            check_known(f"--{part}", asked, {getattr(cell, part) for cell in results.records})
    for name in policies:
        check_known("--policies", name, results.policies)
    groups = [
        replace(group, cells=tuple(cell for cell in group.cells if not policies or cell.policy in {*policies, "full"}))
        for group in results.groups
        if args.model in (None, group.model) and args.dataset in (None, group.dataset)
    ]
    groups = [group for group in groups if group.cells]
    if not groups:
        raise ConfigError(f"no record below {args.folder} is of that model, data set and policy; nothing to draw")
    return groups


def _paths(
    results: Results, groups: list[Group], kinds: list[FigureKind], args: argparse.Namespace
) -> list[tuple[Group, FigureKind, Path]]:
    """Return what goes where; names of groups are in the file names where there are several."""
    from kvbench.report.figures.draw import group_slugs

    if _is_file(args.out):
        return [(groups[0], kinds[0], args.out)]
    titles = [group.title for group in results.groups]
    slugs = dict(zip(titles, group_slugs(results.groups), strict=True))
    folder, suffix = args.out or Path(), args.format or FORMATS[0]
    several = len(groups) > 1
    return [
        (group, kind, folder / f"{f'{slugs[group.title]}-' if several else ''}{kind.name}.{suffix}")
        for group in groups
        for kind in kinds
    ]


_DESCRIPTION = (
    "What can be measured. Wherever a measure is asked for (--measure, --margin, measure=, objective=) its name, its "
    "label or an unambiguous beginning of either will do."
)
_BETTER = {"higher": "higher is better", "lower": "lower is better", "none": "neither is better"}
_FIRST_TURN = "turn1_"
_TURN = re.compile(r"turn\d+_")


def measures_command(arguments: Sequence[str]) -> int:
    """Print the measures that `arguments` ask for and return 0. Raises: ConfigError for a word that none has."""
    parser = Parser(prog="kvbench measures", description=_DESCRIPTION)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only measures with it in their name or label")
    parser.add_argument("--json", action="store_true", help="names, units, directions and meanings as JSON")
    args = parser.parse_args(list(arguments))
    found = _found(args.words)
    if args.json:
        print(json.dumps([asdict(known) for known in found], indent=2))
        return 0
    for line in _lines(found, has_turns=not args.words):
        print(line)
    return 0


def _found(words: Sequence[str]) -> list[Measure]:
    """Return what has one of the words in its name or label, all without words; of turns only what is asked for."""
    found: dict[str, Measure] = {}
    for word in words or ("",):
        asked = word.casefold()
        having = {name: one for name, one in MEASURES.items() if asked in f"{name} {one.label}".casefold()}
        if not having:
            name = measure_named("the measure", word)
            having = {name: MEASURES[name]}
        own = {name: one for name, one in having.items() if not _TURN.match(name)}
        found |= own or having
    return list(found.values())


def _lines(measures: Sequence[Measure], *, has_turns: bool) -> Iterator[str]:
    width = max(len(known.name) for known in measures)
    for known in measures:
        yield f"{known.name:<{width}}  {known.unit:<10}  {_BETTER[known.better]:<18}  {known.label}"
        yield f"{'':<{width}}  {known.definition}"
    if has_turns:
        names = (name.removeprefix(_FIRST_TURN) for name in MEASURES if name.startswith(_FIRST_TURN))
        yield f"\nof one turn of a conversation, with turn1_ to turn{MAX_TURNS}_ before the name: {', '.join(names)}"
