"""Reproduction cards: what was published, the command, and what our records say to it.

    python -m kvbench.report.cards                          docs/reproduction from results
    python -m kvbench.report.cards RESULTS --out FOLDER

Published numbers lie in published.json beside this file, each table with its source. A figure of ours
passes if it lies in the table's band around the published one; the band is our choice and is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvbench.errors import KvbenchError
from kvbench.measures import format_with_interval, measure
from kvbench.report.load import CellResult, Estimate, load_results
from kvbench.results.files import replace_file

_NOT_RUN = "weights not available here"
_HEAD = "Made by `python -m kvbench.report.cards` from published numbers and our records; do not edit."


def write_cards(results: Path, out: Path) -> list[Path]:
    """Write a card per method into `out`; records under `results` are used where there are any."""
    published = json.loads((files("kvbench.report") / "published.json").read_text(encoding="utf-8"))
    cells = [cell for group in load_results(results).groups for cell in group.cells] if results.is_dir() else []
    paths = []
    for name, card in published["cards"].items():
        path = out / f"{name}.md"
        replace_file(path, card_text(card, cells).encode())
        paths.append(path)
    return paths


def card_text(card: Mapping[str, Any], cells: Sequence[CellResult]) -> str:
    """Return one card as markdown; the same records give the same text."""
    parts = [f"# {card['title']}", f"{card['method']}. {_HEAD}"]
    for table in card["tables"]:
        parts += ["\n".join(_table(table, cells))]
    if card["notes"]:
        parts += ["## Published, and not to be compared cell by cell", "\n".join(f"- {note}" for note in card["notes"])]
    return "\n\n".join(parts) + "\n"


def _table(table: Mapping[str, Any], cells: Sequence[CellResult]) -> Iterator[str]:
    yield from (f"## {table['title']}", "", f"Source: {table['source']}.", "")
    if table["command"] is None:
        yield from ("| setting | published |", "|---|---|")
        yield from (f"| {row['setting']} | {row['value']:g} |" for row in table["rows"])
        return
    ours = {row["budget"]: _ours(table, row["budget"], cells) for row in table["rows"]}
    yield from (f"    {table['command']}", "")
    if not any(ours.values()):
        yield from (f"Ours: {_NOT_RUN}.", "", "| budget | published |", "|---|---|")
        yield from (f"| {row['budget']:.0%} | {row['value']:g} |" for row in table["rows"])
        return
    kind, width = table["band"].split()
    yield (
        f"Passes within {float(width):.0%} of the published number."
        if kind == "relative"
        else (f"Passes within {width} of the published number.")
    )
    yield from ("", "| budget | published | ours | |", "|---|---|---|---|")
    for row in table["rows"]:
        estimate = ours[row["budget"]]
        got = "not run" if estimate is None else _with_interval(table["measure"], estimate)
        yield f"| {row['budget']:.0%} | {row['value']:g} | {got} | {verdict(table['band'], row['value'], estimate)} |"


def verdict(band: str, published: float, estimate: Estimate | None) -> str:
    """Return pass or fail for a band such as "relative 0.10" or "absolute 0.05"; nothing without a figure."""
    if estimate is None:
        return ""
    kind, width = band.split()
    allowed = float(width) * (published if kind == "relative" else 1.0)
    return "pass" if abs(estimate.value - published) <= allowed * (1 + 1e-9) else "fail"


def _ours(table: Mapping[str, Any], budget: float, cells: Sequence[CellResult]) -> Estimate | None:
    wanted = tuple(table[name] for name in ("model", "dataset", "policy", "positions"))
    for cell in cells:
        same = (cell.model, cell.dataset, cell.policy, cell.positions) == wanted
        if same and cell.budget_fraction == budget and cell.estimate(table["measure"]) is not None:
            return cell.estimate(table["measure"])
    return None


def _with_interval(name: str, estimate: Estimate) -> str:
    return format_with_interval(measure(name).name, estimate.value, estimate.low, estimate.high)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the cards; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kvbench.report.cards", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=Path("results"), help="folder of records")
    parser.add_argument("--out", type=Path, default=Path("docs/reproduction"), help="folder of the cards")
    args = parser.parse_args(arguments)
    try:
        paths = write_cards(args.results, args.out)
    except KvbenchError as error:
        sys.stderr.write(f"kvbench: {error}\n")
        return 2
    sys.stdout.write("".join(f"{path}\n" for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
