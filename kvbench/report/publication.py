"""What is published is made again from records that lie in the repository, by one command.

    python -m kvbench.report.publication              results/published, and the tables of README and docs
    python -m kvbench.report.publication --check      changes nothing; exit code 1 if something would be another one

A folder of `results/published` that holds cells shows some files of its own report (a table, figures, laws): those that
lie there are made again. A page of `docs`, or the README, says which table of which records stands where:

    <!-- table: records=results/published/laws-smollm2 kind=laws -->
    ...
    <!-- end of table -->

Between the two lines everything is made. Records that are not there yet leave a sentence that says so. A figure beside
a page is asked for in the same way, in one line: `<!-- figure: file=positions.svg records=... kind=positions ... -->`.
Where the cells of a folder are hundreds they may lie in it packed, as `cells.tar.xz`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path

from kvbench.errors import ConfigError, KvbenchError, check_known
from kvbench.measures import MISSING, format_with_interval, measure
from kvbench.report.build import write_report
from kvbench.report.compare import compare, difference_text
from kvbench.report.factorial import (
    cells_markdown,
    effects_svg,
    factorial_csv,
    interactions_markdown,
    main_effects_markdown,
    shares_markdown,
)
from kvbench.report.figures.draw import MODES, positions_svg
from kvbench.report.laws import law_rows, laws_csv, laws_markdown, load_laws
from kvbench.report.leaderboard import (
    board_markdown,
    board_svg,
    boards_csv,
    check_all,
    known_policies,
    missing_markdown,
    overview_markdown,
)
from kvbench.report.load import CellResult, Results, clusters_of, load_results, scores_of
from kvbench.report.tables import markdown_table
from kvbench.results.files import replace_file
from kvbench.stats.paired import Inference, infer, paired_sums

_BLOCK = re.compile(r"(<!-- table: ([^>]*) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_FIGURE = re.compile(r"<!-- figure: ([^>]*) -->")
_NOT_YET = "Not measured yet: `{}` holds no records."
_PACKED = "cells.tar.xz"  # in the place of `cells`, where there are hundreds
_ALONE: Mapping[str, Callable[[Results], str]] = {  # files for which no figure need be drawn
    "laws.md": lambda results: laws_markdown(law_rows(results)),
    "laws.csv": lambda results: laws_csv(law_rows(results)),
    "leaderboard.csv": boards_csv,
    "factorial.csv": factorial_csv,
}


def published(root: Path) -> dict[Path, bytes]:
    """Return the content of everything below `root` that is made from published records, by its path.

    Raises: ConfigError for a block of a page that cannot be made.
    """
    made: dict[Path, bytes] = {}
    read = cache(_load)
    for folder in sorted((root / "results" / "published").iterdir()):
        if _has_records(folder):
            made |= _files_of(folder, read)
    for page in (*root.glob("README.md"), *sorted((root / "docs").glob("*.md"))):
        if text := filled_page(root, page, read):
            made[page] = text.encode()
        made |= _figures_of(root, page, read)
    return made


def _load(folder: Path) -> Results:
    """Return what lies in a folder as it is, or packed."""
    if not (folder / _PACKED).is_file():
        return load_results(folder)
    with tempfile.TemporaryDirectory() as place, tarfile.open(folder / _PACKED) as packed:
        packed.extractall(place, filter="data")
        return load_results(Path(place))


def filled_page(root: Path, page: Path, read: Callable[[Path], Results] | None = None) -> str:
    """Return the page with its tables made from the records below `root`; "" where it has none.

    Raises: ConfigError for a block that cannot be made.
    """
    text, known = page.read_text(encoding="utf-8"), read or cache(_load)
    return _BLOCK.sub(lambda block: _filled(root, block, known), text) if _BLOCK.search(text) else ""


def _figures_of(root: Path, page: Path, read: Callable[[Path], Results]) -> dict[Path, bytes]:
    """Return the figures that a page asks for; none where there are no records."""
    made: dict[Path, bytes] = {}
    for asked in _FIGURE.findall(page.read_text(encoding="utf-8")):
        words = _words(asked)
        check_known("the kind of a figure", words.get("kind", ""), _FIGURES)
        if _has_records(root / words["records"]):
            made[page.parent / words["file"]] = _FIGURES[words["kind"]](read(root / words["records"]), words)
    return made


def _files_of(folder: Path, read: Callable[[Path], Results]) -> dict[Path, bytes]:
    """Return the files of the folder that its report has too."""
    shown = sorted(path for path in folder.iterdir() if path.is_file() and path.name != _PACKED)
    if {path.name for path in shown} <= set(_ALONE):
        return {path: _ALONE[path.name](read(folder)).encode() for path in shown}
    with tempfile.TemporaryDirectory() as place:
        write_report(read(folder), Path(place), Path(place))
        written = [path for path in Path(place).rglob("*") if path.is_file()]
        kinds = Counter(map(_kind, written))
        found = {path.name: path for path in written}
        found |= {_kind(path): path for path in written if kinds[_kind(path)] == 1}
        made = {path: found[path.name].read_bytes() for path in shown if path.name in found}
        alone = (path for path in shown if path not in made and path.name in _ALONE)
        return made | {path: _ALONE[path.name](read(folder)).encode() for path in alone}


def _kind(path: Path) -> str:
    """Return the name of a report's file, of a figure without its group's: a folder of one group leaves that out."""
    return path.name.rpartition("-")[2] if path.suffix == ".svg" else path.name


def _filled(root: Path, block: re.Match[str], read: Callable[[Path], Results]) -> str:
    words = _words(block[2])
    check_known("the kind of a table", words.get("kind", ""), _KINDS)
    place = words.get("records", "")
    has_records = bool(place) and _has_records(root / place)
    lines = _KINDS[words["kind"]](read(root / place), words) if has_records else [_NOT_YET.format(place)]
    return f"{block[1]}\n{chr(10).join(lines)}\n\n{block[3]}"


def _words(asked: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in asked.split())


def _has_records(folder: Path) -> bool:
    return (folder / _PACKED).is_file() or any((folder / "cells").glob("*/record.json"))


def _laws(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield what the records say of every expectation of every law, of which the page has statement and source."""
    found, rows = law_rows(results), []
    for law in load_laws():
        for one in law.expects:
            told = [row for row in found if row.law.name == law.name and row.expectation.says == one.says]
            verdicts = [[row.measured, row.verdict] for row in told] or [[MISSING, "not run yet"]]
            rows += [[f"{law.number}. {law.name}", one.says, one.text, *verdict] for verdict in verdicts]
    yield from markdown_table(["law", "expectation", "expected", "measured [95 %]", "verdict"], rows)


def _positions(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield `measure`, one or several, of every policy at one budget, a column for each position mode.

    `policies` and `modes`: some of them; a policy that was not measured is a dash, one that is not known an error.
    """
    cells, names = _chosen(results, words), words["measure"].split(",")
    modes = check_all("a position mode", words.get("modes", ",".join(MODES)).split(","), MODES)
    rows = []
    for policy in _asked(results, words["policies"]) if "policies" in words else _policies(cells):
        found = (_one(cells, policy, mode) for mode in modes)
        rows.append([policy, *("; ".join(_estimate(cell, name) for name in names) for cell in found)])
    label = "; ".join(measure(name).label for name in names)
    yield from markdown_table([label, *modes], rows, "l" + "r" * len(modes))


def _asked(results: Results, policies: str) -> list[str]:
    return check_all("a policy", policies.split(","), known_policies(results))


def _policies(cells: Iterable[CellResult]) -> list[str]:
    return list(dict.fromkeys(cell.labels["policy"] for cell in cells))


def _differences(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield the paired differences of `pairs`, "elastic-h2o,h2o-full", a column for each position mode."""
    cells, name = _chosen(results, words), words["measure"]
    rows = []
    for pair in words["pairs"].split(","):
        names = _asked(results, pair.replace("-", ","))
        arms = ([_one(cells, policy, mode) for policy in names] for mode in MODES)
        rows.append([f"{names[0]} minus {names[1]}", *(_difference(first, second, name) for first, second in arms)])
    yield from markdown_table([measure(name).label, *MODES], rows, "lrrr")


def _shifts(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield what each other position mode adds to a policy's original positions, paired."""
    cells, name = _chosen(results, words), words["measure"]
    rows = []
    for policy in _policies(cell for cell in cells if not cell.is_full):
        first, *others = (_one(cells, policy, mode) for mode in MODES)
        rows.append([policy, *(_difference(other, first, name) for other in others)])
    heads = [measure(name).label, *(f"{mode} minus {MODES[0]}" for mode in MODES[1:])]
    yield from markdown_table(heads, rows, "lrr")


def _parts(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield `measure` of every cell of a policy's parts, and its paired differences to the first and to `against`."""
    cells, name = _chosen(results, words), words["measure"]
    names = words["settings"].split(",")
    others = [
        _native(_chosen(results, {**words, "sweep": words["beside"]}), one) for one in _asked(results, words["against"])
    ]
    heads = [*names, measure(name).label, "minus the first", *(f"minus {one}" for one in words["against"].split(","))]
    rows = [
        [
            *(str(cell.settings["policy"].get(one)) for one in names),
            _estimate(cell, name),
            MISSING if cell is cells[0] else _difference(cell, cells[0], name),
            *(_difference(cell, other, name) for other in others),
        ]
        for cell in cells
    ]
    yield from markdown_table(heads, rows, "l" * len(names) + "r" * (len(heads) - len(names)))


def _effects(results: Results, words: Mapping[str, str]) -> Iterator[str]:
    """Yield what the second value of each setting adds to its first: alone, over all values of the others, and last.

    `settings` gives the values, "merge:both:none,fixed_point:25:1000000"; all combinations have the same samples.
    """
    cells, name = _chosen(results, words), words["measure"]
    levels = {one: values for one, *values in (part.split(":") for part in words["settings"].split(","))}
    found = {tuple(str(cell.settings["policy"].get(one)) for one in levels): cell for cell in cells}
    pairs = list(product(*levels.values()))
    if missing := [values for values in pairs if values not in found]:
        yield f"Not measured yet: {len(missing)} of {len(pairs)} combinations."
        return
    rows = []
    for place, one in enumerate(levels):
        arms = [[found[values] for values in pairs if values[place] == value] for value in levels[one]]
        alone, last = (_difference(arms[1][at], arms[0][at], name) for at in (0, -1))
        rows.append([one, *levels[one], alone, _average(arms[1], arms[0], name), last])
    heads = ["setting", "from", "to", "alone", "on average", "with the others changed"]
    yield from markdown_table(heads, rows, "lllrrr")


_KINDS: Mapping[str, Callable[[Results, Mapping[str, str]], Iterable[str]]] = {
    "laws": _laws,
    "positions": _positions,
    "differences": _differences,
    "shifts": _shifts,
    "parts": _parts,
    "effects": _effects,
    "board": board_markdown,
    "overview": overview_markdown,
    "missing": missing_markdown,
    "main_effects": main_effects_markdown,
    "interactions": interactions_markdown,
    "shares": shares_markdown,
    "combinations": cells_markdown,
}
_FIGURES: Mapping[str, Callable[[Results, Mapping[str, str]], bytes]] = {
    "positions": lambda results, words: positions_svg(_chosen(results, words), words["measure"]),
    "board": board_svg,
    "main_effects": effects_svg,
}


def _chosen(results: Results, words: Mapping[str, str]) -> list[CellResult]:
    """Return the cells of the table's sweep and data set, at its budget; the full cache has none."""
    return [
        cell
        for cell in results.records
        if cell.sweep == words["sweep"]
        and cell.labels["dataset"] == words["dataset"]
        and (cell.is_full or cell.budget_fraction == float(words["budget"]))
    ]


def _one(cells: Iterable[CellResult], policy: str, mode: str) -> CellResult | None:
    return next((cell for cell in cells if (cell.labels["policy"], cell.positions) == (policy, mode)), None)


def _native(cells: Sequence[CellResult], policy: str) -> CellResult | None:
    """Return the policy's cell in the position mode of its authors."""
    return _one(cells, policy, "in_cache" if policy == "streaming_llm" else "original")


def _estimate(cell: CellResult | None, name: str) -> str:
    found = None if cell is None else cell.estimate(name)
    return MISSING if found is None else format_with_interval(name, found.value, found.low, found.high)


def _difference(first: CellResult | None, second: CellResult | None, name: str) -> str:
    found = None if first is None or second is None else compare(first, second, name)
    return MISSING if found is None else difference_text(found)


def _average(firsts: Sequence[CellResult], seconds: Sequence[CellResult], name: str) -> str:
    """Return the difference of what two sets of cells have on average, every sample's taken together."""
    base = compare(firsts[0], seconds[0], name)
    scores = [[scores_of(cell, name) for cell in arm] for arm in (firsts, seconds)]
    clusters = clusters_of(firsts[0])
    if base is None or any(one.keys() != clusters.keys() for arm in scores for one in arm):
        return MISSING
    mine, theirs = ([_added(one[name] for one in arm) for name in clusters] for arm in scores)
    found = infer(paired_sums(mine, theirs, list(clusters.values())))
    return difference_text(replace(base, **{part.name: getattr(found, part.name) for part in fields(Inference)}))


def _added(scores: Iterable[tuple[float, float]]) -> tuple[float, float]:
    totals, weights = zip(*scores, strict=True)
    return sum(totals), sum(weights)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or check everything; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kvbench.report.publication", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path(), help="the repository (default: this folder)")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if something is out of date")
    args = parser.parse_args(arguments)
    try:
        if not (args.root / "results" / "published").is_dir():
            raise ConfigError(f"{args.root} holds no results/published; give the folder of the repository")
        made = published(args.root)
    except KvbenchError as error:
        sys.stderr.write(f"kvbench: {error}\n")
        return 2
    stale = [path for path, data in made.items() if not path.is_file() or path.read_bytes() != data]
    for path in stale:
        sys.stdout.write(f"{'out of date' if args.check else 'made again'}: {path.relative_to(args.root)}\n")
        if not args.check:
            replace_file(path, made[path])
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
