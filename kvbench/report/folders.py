"""Several results folders as one: every cell once, the newest attempt that can be used.

results = load_folders([Path("laptop"), Path("cluster/results")])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kvbench.errors import RecordError
from kvbench.report.cell import CellResult
from kvbench.report.frontier import Frontier, load_frontier
from kvbench.report.load import Choice, Problem, Results, read_cells, results_of


def load_folders(folders: Sequence[Path], *, sweep: str | None = None) -> Results:
    """Read every folder; of cells with the same key the newest that did not fail counts, then the newest.

    One folder reads as `load_results` does. Of several, each cell and problem names its folder by the shortest end
    of its path that tells the folders apart, so that the page does not depend on where they lie.
    Raises: ConfigError if a folder is missing or no record belongs to `sweep`.
    """
    unique = {folder.resolve(): folder for folder in folders}
    names = folder_names(list(unique)) if len(unique) > 1 else [""]
    cells: list[CellResult] = []
    problems: list[Problem] = []
    frontiers: list[Frontier] = []
    for folder, name in zip(unique.values(), names, strict=True):
        found, doubts = read_cells(folder)
        frontiers.extend(_frontiers(folder, doubts))
        cells.extend(replace(cell, folder=name) for cell in found)
        problems.extend(replace(doubt, path=f"{name}/{doubt.path}" if name else doubt.path) for doubt in doubts)
    chosen, choices = _newest(cells)
    return replace(
        results_of(chosen, problems, sweep),
        choices=tuple(choices),
        folders=tuple(names),
        frontiers=tuple(frontiers),
    )


def folder_names(folders: Sequence[Path]) -> list[str]:
    """Return for each path (absolute, all different) the shortest end that no other one has."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]).replace("//", "/") for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _frontiers(folder: Path, problems: list[Problem]) -> Iterator[Frontier]:
    for path in sorted((folder / "frontier").glob("*.json")):
        try:
            yield load_frontier(path)
        except RecordError as error:
            name = path.relative_to(folder).as_posix()
            problems.append(Problem(path=name, message=str(error).removeprefix(f"{path} ")))


def _newest(cells: Sequence[CellResult]) -> tuple[list[CellResult], list[Choice]]:
    by_key: dict[str, list[CellResult]] = {}
    for cell in cells:
        by_key.setdefault(cell.key, []).append(cell)
    chosen: list[CellResult] = []
    choices: list[Choice] = []
    for key, same in by_key.items():
        best = max(same, key=lambda cell: (not cell.failed, cell.started_utc))
        chosen.append(best)
        if len(same) > 1:
            others = tuple((cell.folder, cell.status, cell.started_utc) for cell in same if cell is not best)
            choices.append(Choice(key=key, folder=best.folder, others=others))
    return chosen, choices
