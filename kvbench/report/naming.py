"""Table order, and names that tell cells apart whose labels are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvbench.report.cell import CellResult
from kvbench.results.files import canonical_json

_MAX_NAME = 40  # longer texts of settings give way to a digest


def ordered(cells: list[CellResult]) -> tuple[CellResult, ...]:
    """Sort, after telling apart cells whose labels are the same."""
    named: list[CellResult] = []
    cells = _with_distinct_names(_with_distinct_names(cells, "model"), "dataset")
    for twins in _by(cells, lambda cell: (cell.model, cell.dataset, *cell.series)).values():
        repeated = any(len(same) > 1 for same in _by(twins, lambda cell: (cell.budget,)).values())
        named.extend(_with_variants(twins) if repeated else twins)
    return tuple(sorted(named, key=lambda cell: cell.sort_key))


def _with_distinct_names(cells: list[CellResult], part: str) -> list[CellResult]:
    """Tell apart models, or data sets, that share a name but not their settings: they are not comparable.

    The settings that differ are named; a digest of all of them where they are many, long or alike.
    """
    named: list[CellResult] = []
    for same in _by(cells, lambda cell: (getattr(cell, part),)).values():
        settings = {canonical_json(cell.settings.get(part)): cell.settings.get(part) or {} for cell in same}
        texts = dict(zip(settings, _differing(list(settings.values())), strict=True))
        if len(set(texts.values())) < len(texts) or max(map(len, texts.values())) > _MAX_NAME:
            texts = {text: f"#{hashlib.sha256(text.encode()).hexdigest()[:6]}" for text in texts}
        for cell in same:
            name: dict[str, Any] = {part: f"{getattr(cell, part)} {texts[canonical_json(cell.settings.get(part))]}"}
            named.append(replace(cell, **name) if len(settings) > 1 else cell)
    return named


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each of `settings` the names and values in which they are not all the same."""
    flat = [dict(flat_settings(one)) for one in settings]
    names = sorted(_differing_names(flat))
    return [" ".join(f"{name}={one.get(name)}" for name in names) for one in flat]


def _by(cells: Iterable[CellResult], key: Any) -> dict[tuple[object, ...], list[CellResult]]:
    found: dict[tuple[object, ...], list[CellResult]] = {}
    for cell in cells:
        found.setdefault(key(cell), []).append(cell)
    return found


def _with_variants(cells: list[CellResult]) -> list[CellResult]:
    """Name the settings in which cells with the same labels differ; the key if there is no such setting.

    Where only the tasks differ, the cell with most of them needs no name.
    """
    flat = {cell.key: dict(_told(cell.settings)) for cell in cells}
    by_budget = _by(cells, lambda cell: (cell.budget,)).values()
    differing = set().union(*(_differing_names([flat[cell.key] for cell in same]) for same in by_budget))
    shown = sorted(differing)[:2]
    texts = {cell.key: " ".join(f"{name}={flat[cell.key].get(name)}" for name in shown) for cell in cells}
    if shown == ["tasks"]:
        texts |= {max(same, key=_num_tasks).key: "" for same in by_budget}
    return [replace(cell, variant=texts[cell.key] if shown else f"key {cell.key[:8]}") for cell in cells]


def _differing_names(flat: Sequence[Mapping[str, object]]) -> set[str]:
    """Return the settings that are not the same in all; of a task that one lacks only that it lacks it."""
    names = set().union(*flat)
    lacking = {name for name in names if name.startswith("task.") and any(name not in one for one in flat)}
    return {name for name in names - lacking if len({repr(one.get(name)) for one in flat}) > 1}


def _num_tasks(cell: CellResult) -> int:
    return len(cell.settings.get("task") or ())


def _told(settings: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield from flat_settings(settings)
    if isinstance(tasks := settings.get("task"), dict):
        names = "+".join(sorted(tasks))
        yield "tasks", names if len(names) <= _MAX_NAME // 2 else len(tasks)


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield nested settings under names like "ask.kind"."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
