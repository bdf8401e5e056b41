"""The page's autopsy: which patches and tokens every policy held, per layer and head and over decode time.

`autopsy_section` renders it: drawings, which the script `autopsy.js` makes of the data that stands in the page (what
samples share once, eviction as short texts per head), and what every policy kept, in a table and in words.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from kvbench.autopsy.read import Autopsy, Sample, chance_overlap, kept, load_autopsy, overlap, percent, sentence
from kvbench.errors import RecordError
from kvbench.report.compare import declared_budget
from kvbench.report.load import CellResult, Group, Results, natural_key
from kvbench.report.markup import Head, TableCell, TableView, render, row_head, safe_json, text_cell
from kvbench.results.files import Array
from kvbench.results.record import NEVER

_NARROW, _NARROW_NEVER = 250, 255  # steps that one byte can tell, and what stands for NEVER in it
MOST_BYTES = 8_000_000  # of eviction patterns on one page

Pairs = Sequence[tuple[CellResult, Autopsy]]


def group_data(group: Group, pairs: Pairs, room_bytes: int) -> tuple[dict[str, Any], int]:
    """Return one group for the script and the bytes of its patterns.

    A sample that does not fit is left out under every policy, so that what is shown can be compared.
    """
    cells: list[dict[str, Any]] = [
        {
            "label": group.series_label(cell),
            "budget": "" if cell.is_full else cell.budget,
            "layers": autopsy.num_layers,
            "heads": autopsy.num_heads,
            "views": {},
        }
        for cell, autopsy in pairs
    ]
    items: dict[str, dict[str, Any]] = {}
    most_layers: dict[str, Sample] = {}  # each sample under the first policy of which most layers are stored
    views: dict[str, dict[int, dict[str, Any]]] = {}  # by the sample and the policy's place
    for index, (cell, autopsy) in enumerate(pairs):
        for sample in autopsy.samples:
            views.setdefault(sample.id, {})[index] = _view(cell, sample)
            known = most_layers.setdefault(sample.id, sample)
            if len(sample.layers) > len(known.layers):
                most_layers[sample.id] = sample
    spent = 0
    for name, sample in sorted(most_layers.items(), key=lambda pair: natural_key(pair[0])):
        parts = [view[part] for view in views[name].values() for part in ("freed", "merged") if part in view]
        size = sum(len(text) for part in parts for text in part["patterns"])
        if spent + size <= room_bytes:
            spent += size
            items[name] = _item(sample)
            for index, view in views[name].items():
                cells[index]["views"][name] = view
    # The budgets at which there is something to see, smallest first; "" is the full cache's.
    seen = [cell for (cell, _), shown in zip(pairs, cells, strict=True) if shown["budget"] and shown["views"]]
    budgets = list(dict.fromkeys(cell.budget for cell in sorted(seen, key=lambda cell: cell.budget_order))) or [""]
    data = {
        "title": group.title,
        "asked": declared_budget(group) or "",
        "budgets": budgets,
        "ids": list(items),
        "items": items,
        "cells": cells,
    }
    return data, spent


def _item(sample: Sample) -> dict[str, Any]:
    """Return what is the same under every policy."""
    prompt = sample.prompt_tokens
    item: dict[str, Any] = {
        "tokens": list(sample.tokens[:prompt]),
        "kinds": "".join(map(str, sample.kinds[:prompt].tolist())),
        "layers": list(sample.layers),
        "attention": [_text(layer) for layer in sample.attention],
    }
    picture = sample.picture
    if picture is not None:
        places = [-1 if row == NEVER else int(row) * picture.columns + int(column) for row, column in picture.places]
        item["picture"] = {"source": picture.source, "width": picture.width, "height": picture.height}
        item["picture"] |= {"rows": picture.rows, "columns": picture.columns, "places": places}
    return item


def _view(cell: CellResult, sample: Sample) -> dict[str, Any]:
    """Return one sample under one policy; it "differs" where the replay did not say what was measured."""
    measured: Mapping[str, Any] = next((row for row in cell.samples if str(row.get("id")) == sample.id), {})
    text = measured.get("text")
    view: dict[str, Any] = {
        "steps": sample.steps,
        "answer": list(sample.tokens[sample.prompt_tokens :]),
        "layers": list(sample.layers),
        "freed": _patterns(sample.freed, sample.steps),
        "checkpoints": list(sample.checkpoints),
        "statistics": {name: values.ravel().tolist() for name, values in sample.statistics.items()},
        "says": sentence([sample]),
        "differs": isinstance(text, str) and not text.startswith(sample.answer),
    }
    if sample.merged is not None:
        view["merged"] = _patterns(sample.merged, NEVER)
    return view


def _patterns(rows: Array, largest: int) -> dict[str, Any]:
    """Return every different row once: base64 of a byte per token where the numbers allow, else of two."""
    narrow = largest <= _NARROW
    numbers = np.where(rows == NEVER, _NARROW_NEVER, rows).astype(np.uint8) if narrow else rows.astype("<u2")
    texts = [[_text(head) for head in layer] for layer in numbers]
    different = list(dict.fromkeys(text for layer in texts for text in layer))
    of = [[different.index(text) for text in layer] for layer in texts]
    return {"wide": not narrow, "patterns": different, "of": of}


def _text(numbers: Array) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


_KEPT_HEADS = (
    Head("policy", kind="text"),
    Head("budget", kind="amount"),
    *(
        Head(when, group=what)
        for what in ("image patches kept", "prompt text kept", "attention held", "merged, in a held entry")
        for when in ("after the prompt", "at the end")
    ),
    Head("mean age", "tokens, at the end"),
    Head("answer tokens", "at the end"),
)


def _numbers(group: Group, pairs: Pairs) -> dict[str, object]:
    """Return the table of what was kept, the same in words, and overlaps; no table of the full cache alone."""
    budgeted = [(cell, autopsy) for cell, autopsy in pairs if not cell.is_full]
    if not budgeted:
        return {"kept": None}
    by_budget: dict[str, list[tuple[CellResult, Autopsy]]] = {}
    for cell, autopsy in sorted(budgeted, key=lambda pair: pair[0].budget_order):
        by_budget.setdefault(cell.budget, []).append((cell, autopsy))
    nums = sorted({len(autopsy.samples) for _, autopsy in budgeted})
    what = f"{nums[0]} to {nums[-1]} samples" if len(nums) > 1 else "1 sample" if nums == [1] else f"{nums[0]} samples"
    rows = [list(_kept_cells(group, cell, one, several=len(nums) > 1)) for cell, one in budgeted]
    caption = (
        f"What was kept of the prompt, {group.title}: mean over {what}, layers and KV heads; "
        "small: lowest and highest layer"
    )
    return {
        "kept": TableView(caption=caption, heads=_KEPT_HEADS, rows=rows, classes="ap-kept"),
        "words": [(group.cell_label(cell), sentence(autopsy.samples)) for cell, autopsy in budgeted],
        "overlaps": [_overlaps(group, some, budget) for budget, some in by_budget.items() if len(some) > 1],
        "left_out": sorted({text for _, autopsy in pairs for text in autopsy.left_out}),
    }


def _kept_cells(group: Group, cell: CellResult, autopsy: Autopsy, *, several: bool) -> Iterator[TableCell]:
    found = kept(autopsy.samples)
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    yield row_head(group.series_label(cell), f"n = {len(autopsy.samples)}" if several else "")
    yield text_cell(cell.budget, sort=size)
    for shares, by_layer in (
        (found.image, found.image_by_layer),
        (found.text, None),
        (found.attention, found.attention_by_layer),
        (found.merged, None),
    ):
        low, high = map(percent, by_layer or (0.0, 0.0))
        for value, spread in zip(shares or (None, None), (f"{low} to {high}" if low != high else "", ""), strict=True):
            yield TableCell("-" if value is None else f"{100 * value:.0f} %", spread, sort=value)
    yield TableCell(f"{found.mean_age_tokens:.0f}", sort=found.mean_age_tokens)
    fewest, most = found.steps
    yield TableCell(str(fewest) if fewest == most else f"{fewest} to {most}", sort=(fewest + most) / 2)


def _overlaps(group: Group, pairs: Pairs, budget: str) -> TableView:
    rows = []
    for cell, one in pairs:
        cells = [row_head(group.series_label(cell))]
        for other_cell, other in pairs:
            share = 1.0 if cell is other_cell else overlap(one.samples, other.samples)
            chance = f"blind {chance_overlap(one.samples, other.samples):.2f}" if cell is not other_cell else ""
            cells.append(TableCell("-" if share is None else f"{share:.2f}", chance, sort=share))
        rows.append(cells)
    caption = (
        f"At {budget}, {group.title}: tokens that both hold after the prompt over those that either holds (Jaccard), "
        "mean over layers, KV heads and samples; small: two blind choices of the same sizes"
    )
    heads = [Head("policy", kind="text"), *(Head(group.series_label(cell)) for cell, _ in pairs)]
    return TableView(caption=caption, heads=heads, rows=rows)


def asked_of(results: Results) -> dict[str, dict[str, tuple[str, str]]]:
    """Return, by a group's title and a sample's id, what was asked and the small picture; a damaged file has none."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for group in results.groups:
        for cell in (cell for cell in group.cells if cell.is_full):
            with contextlib.suppress(RecordError):
                autopsy = load_autopsy(cell)
                for sample, glance in (autopsy.glances if autopsy else {}).items():
                    found.setdefault(group.title, {})[sample] = (glance.question, glance.source)
    return found


_MOST_NAMES = 5


def autopsy_section(results: Results) -> Markup:
    """Return what stands below the heading; "" without records. Damaged files are named, missing ones cost nothing."""
    groups: list[Mapping[str, object]] = []
    data: list[dict[str, Any]] = []
    problems: list[str] = []
    is_same = True
    room = MOST_BYTES
    for group in results.groups:
        pairs = []
        for cell in group.cells:
            try:
                found = load_autopsy(cell)
            except RecordError as error:
                folder = "" if cell.cell_folder is None else str(cell.cell_folder.parent.parent)
                problems.append(str(error).replace(f"{folder}/", ""))
                continue
            if found is not None and found.samples:
                pairs.append((cell, found))
        if not pairs:
            continue
        one, spent = group_data(group, pairs, room)
        room -= spent
        data.extend([one] if one["items"] else [])
        by_cell = [{sample.id for sample in autopsy.samples} for _, autopsy in pairs]
        every = set().union(*by_cell)
        is_same &= all(ids == every for ids in by_cell)
        undrawn = sorted(every.difference(one["ids"]), key=natural_key)
        drawn = {"title": group.title, "num_samples": len(every), "undrawn": undrawn}
        groups.append(drawn | _numbers(group, pairs))
    return render(
        "autopsy.html.j2",
        has_records=bool(results.records),
        several=len(results.groups) > 1,
        problems=problems,
        groups=groups,
        data=safe_json(data) if data else None,
        is_same=is_same,
        most_names=_MOST_NAMES,
    )
