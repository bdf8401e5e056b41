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
from kvbench.measures import format_with_interval
from kvbench.report.load import CellResult, Estimate, load_results
from kvbench.report.tables import markdown_table
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
    rows, name = table["rows"], "setting" if table["command"] is None else "budget"
    heads = [name, "published"]
    shown = [[format(row[name], "" if name == "setting" else ".0%"), f"{row['value']:g}"] for row in rows]
    if table["command"] is not None:
        yield from (f"    {table['command']}", "")
        ours = [_ours(table, row["budget"], cells) for row in rows]
        if not any(ours):
            yield from (f"Ours: {_NOT_RUN}.", "")
        else:
            kind, width = table["band"].split()
            allowed = f"{float(width):.0%} of" if kind == "relative" else f"{width} of"
            yield from (f"Passes within {allowed} the published number.", "")
            heads += ["ours", ""]
            for texts, row, one in zip(shown, rows, ours, strict=True):
                got = format_with_interval(table["measure"], one.value, one.low, one.high) if one else "not run"
                texts += [got, verdict(table["band"], row["value"], one)]
    yield from markdown_table(heads, shown)


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
