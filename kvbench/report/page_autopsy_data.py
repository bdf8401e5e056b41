"""The autopsies as the page's script reads them: what samples share once, eviction as short texts per head."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvbench.report.autopsy_load import Autopsy, Sample
from kvbench.report.autopsy_numbers import sentence
from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.natural import natural_key
from kvbench.results.files import Array
from kvbench.results.record import NEVER

_NARROW, _NARROW_NEVER = 250, 255  # steps that one byte can tell, and what stands for NEVER in it
MOST_BYTES = 8_000_000  # of eviction patterns on one page

Pairs = Sequence[tuple[CellResult, Autopsy]]


def group_data(group: Group, pairs: Pairs, room_bytes: int) -> tuple[dict[str, Any], int]:
    """Return one group for the script and the bytes of its patterns.

    A sample that does not fit is left out under every policy, so that what is shown can be compared.
    """
    cells = [_cell(group, cell, autopsy) for cell, autopsy in pairs]
    items: dict[str, dict[str, Any]] = {}
    spent = 0
    for name, sample in sorted(_with_most_layers(pairs).items(), key=lambda pair: natural_key(pair[0])):
        views = _views(pairs, name)
        size = sum(map(_size, views.values()))
        if spent + size <= room_bytes:
            spent += size
            items[name] = _item(sample)
            for index, view in views.items():
                cells[index]["views"][name] = view
    data = {"title": group.title, "budgets": _budgets(pairs, cells), "ids": list(items)}
    return data | {"items": items, "cells": cells}, spent


def _cell(group: Group, cell: CellResult, autopsy: Autopsy) -> dict[str, Any]:
    return {
        "label": group.series_label(cell),
        "budget": "" if cell.is_full else cell.budget,
        "layers": autopsy.num_layers,
        "heads": autopsy.num_heads,
        "views": {},
    }


def _views(pairs: Pairs, name: str) -> dict[int, dict[str, Any]]:
    """Return one sample under every policy that has it, by the policy's place."""
    return {
        index: _view(cell, sample)
        for index, (cell, autopsy) in enumerate(pairs)
        for sample in autopsy.samples
        if sample.id == name
    }


def _size(view: Mapping[str, Any]) -> int:
    return sum(len(text) for part in ("freed", "merged") if part in view for text in view[part]["patterns"])


def _budgets(pairs: Pairs, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the budgets at which there is something to see, smallest first; "" is the full cache's."""
    seen = [cell for (cell, _), shown in zip(pairs, cells, strict=True) if shown["budget"] and shown["views"]]
    return list(dict.fromkeys(cell.budget for cell in sorted(seen, key=lambda cell: cell.budget_order))) or [""]


def _with_most_layers(pairs: Pairs) -> dict[str, Sample]:
    """Return each sample under the first policy of which most layers are stored."""
    found: dict[str, Sample] = {}
    for _, autopsy in pairs:
        for sample in autopsy.samples:
            if sample.id not in found or len(sample.layers) > len(found[sample.id].layers):
                found[sample.id] = sample
    return found


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
    """Return one sample under one policy."""
    view: dict[str, Any] = {
        "steps": sample.steps,
        "answer": list(sample.tokens[sample.prompt_tokens :]),
        "layers": list(sample.layers),
        "freed": _patterns(sample.freed, sample.steps),
        "checkpoints": list(sample.checkpoints),
        "statistics": {name: values.ravel().tolist() for name, values in sample.statistics.items()},
        "says": sentence([sample]),
        "differs": _differs(cell, sample),
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


def _differs(cell: CellResult, sample: Sample) -> bool:
    """Whether the replay did not say what was measured; False where the record has no answer to compare with."""
    measured: Mapping[str, Any] = next((row for row in cell.samples if str(row.get("id")) == sample.id), {})
    text = measured.get("text")
    return isinstance(text, str) and not text.startswith(sample.answer)
