"""The autopsies as the page's script reads them: what samples share once, eviction as short texts per head."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvbench.autopsies import NEVER
from kvbench.packed import Array
from kvbench.report.autopsy_load import Autopsy, Sample
from kvbench.report.autopsy_numbers import sentence
from kvbench.report.cell import CellResult
from kvbench.report.load import Group

_NARROW, _NARROW_NEVER = 250, 255  # steps that one byte can tell, and what stands for NEVER in it
MOST_BYTES = 8_000_000  # of eviction patterns on one page

Pairs = Sequence[tuple[CellResult, Autopsy]]


def group_data(group: Group, pairs: Pairs, room_bytes: int) -> tuple[dict[str, Any], int]:
    """Return one group for the script and the bytes of its patterns; samples that do not fit are left out."""
    items: dict[str, dict[str, Any]] = {}
    cells = []
    spent = 0
    for cell, autopsy in pairs:
        views = {}
        for sample in autopsy.samples:
            view = _view(cell, sample)
            size = sum(map(len, view["freed"]["patterns"]))
            if spent + size <= room_bytes:
                spent += size
                items.setdefault(sample.id, _item(sample))
                views[sample.id] = view
        cells.append(
            {
                "label": group.series_label(cell),
                "budget": "" if cell.is_full else cell.budget,
                "layers": autopsy.num_layers,
                "heads": autopsy.num_heads,
                "views": views,
            }
        )
    budgets = list(dict.fromkeys(cell["budget"] for cell in cells if cell["budget"])) or [""]
    return {"title": group.title, "budgets": budgets, "items": items, "cells": cells}, spent


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
