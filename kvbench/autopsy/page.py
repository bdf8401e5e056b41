"""The page's autopsy: which patches and tokens every policy held, per layer and head and over decode time.

The autopsies as the page's script reads them: what samples share once, eviction as short texts per head.

The autopsy in numbers: what every policy kept, in a table and in words, and how much any two keep alike.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kvbench.autopsy.read import Autopsy, Sample, chance_overlap, kept, load_autopsy, overlap, percent, sentence
from kvbench.errors import RecordError
from kvbench.report.load import CellResult, Group, Results, natural_key
from kvbench.report.markup import Head, escaped, number_cell, prose, row_head, table, text_cell
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


def numbers_html(group: Group, pairs: Pairs) -> str:
    """Return the table of what was kept, the same in words, and overlaps; "" where there is only the full cache."""
    budgeted = [(cell, autopsy) for cell, autopsy in pairs if not cell.is_full]
    if not budgeted:
        return ""
    parts = [_table(group, budgeted), _sentences(group, budgeted)]
    by_budget: dict[str, list[tuple[CellResult, Autopsy]]] = {}
    for cell, autopsy in sorted(budgeted, key=lambda pair: pair[0].budget_order):
        by_budget.setdefault(cell.budget, []).append((cell, autopsy))
    several = {budget: some for budget, some in by_budget.items() if len(some) > 1}
    tables = "".join(_overlaps(group, some, budget) for budget, some in several.items())
    overlaps = f"<details><summary>How much policies keep the same tokens</summary>{tables}</details>" if tables else ""
    left = sorted({text for _, autopsy in pairs for text in autopsy.left_out})
    out = f"<p class=quiet>Left out: {escaped('; '.join(left[:5]))}.</p>" if left else ""
    return "".join([*parts, overlaps, out])


def _table(group: Group, pairs: Pairs) -> str:
    nums = sorted({len(autopsy.samples) for _, autopsy in pairs})
    what = f"{nums[0]} to {nums[-1]} samples" if len(nums) > 1 else "1 sample" if nums == [1] else f"{nums[0]} samples"
    heads = [
        Head(label="policy", kind="text"),
        Head(label="budget", kind="amount"),
        Head(label="after the prompt", group="image patches kept"),
        Head(label="at the end", group="image patches kept"),
        Head(label="after the prompt", group="prompt text kept"),
        Head(label="at the end", group="prompt text kept"),
        Head(label="after the prompt", group="attention held"),
        Head(label="at the end", group="attention held"),
        Head(label="after the prompt", group="merged, in a held entry"),
        Head(label="at the end", group="merged, in a held entry"),
        Head(label="mean age", note="tokens, at the end", group=""),
        Head(label="answer tokens", note="at the end", group=""),
    ]
    rows = (f"<tr>{''.join(_cells(group, cell, autopsy, several=len(nums) > 1))}</tr>" for cell, autopsy in pairs)
    caption = f"What was kept of the prompt, mean over {what}, layers and KV heads; small: lowest and highest layer"
    return table(caption, heads, rows, classes="ap-kept")


def _cells(group: Group, cell: CellResult, autopsy: Autopsy, *, several: bool) -> Iterator[str]:
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
        for index in (0, 1):
            low, high = (percent(share) for share in by_layer or (0.0, 0.0))
            spread = f"{low} to {high}" if low != high and not index else ""
            value = None if shares is None else shares[index]
            yield number_cell("-" if value is None else f"{100 * value:.0f} %", spread, value=value)
    yield number_cell(f"{found.mean_age_tokens:.0f}", value=found.mean_age_tokens)
    fewest, most = found.steps
    yield number_cell(str(fewest) if fewest == most else f"{fewest} to {most}", value=(fewest + most) / 2)


def _sentences(group: Group, pairs: Pairs) -> str:
    items = "".join(
        f"<li><b>{escaped(group.cell_label(cell))}</b>: {prose(sentence(autopsy.samples))}</li>"
        for cell, autopsy in pairs
    )
    return f"<details><summary>The same in words</summary><ul>{items}</ul></details>"


def _overlaps(group: Group, pairs: Sequence[tuple[CellResult, Autopsy]], budget: str) -> str:
    names = [group.series_label(cell) for cell, _ in pairs]
    rows = []
    for cell, one in pairs:
        cells = [row_head(group.series_label(cell))]
        for other_cell, other in pairs:
            share = 1.0 if cell is other_cell else overlap(one.samples, other.samples)
            chance = f"blind {chance_overlap(one.samples, other.samples):.2f}" if cell is not other_cell else ""
            cells.append(number_cell("-" if share is None else f"{share:.2f}", chance, value=share))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [Head(label="policy", kind="text"), *(Head(label=name) for name in names)]
    caption = (
        f"At {budget}: tokens that both hold after the prompt over those that either holds (Jaccard), mean over "
        "layers, KV heads and samples; small: two blind choices of the same sizes"
    )
    return table(caption, heads, rows)


_INTRO = (
    "A few samples, {same}, were answered once more, alone and outside of everything that is measured, and it was "
    "written down when each token left the cache, in every layer and KV head. A clear patch or word is held; the more "
    "layers and heads have let it go, the fainter it is. A merged token lives on inside another entry, as long as "
    "that entry is held."
)
_SAME = {True: "the same for every policy", False: "not all of them under every policy"}
_ATTENTION = (
    "Attention: what the full cache's own answer attends to in the prompt, summed over its steps, mean over the query "
    "heads of a KV head; the share of it that falls on tokens which the policy holds. It is the same yardstick for all."
)
_CONTROLS = """<div class=controls>
<label id="ap-group-label">Model and data set<select id="ap-group"></select></label>
<label>Sample<select id="ap-sample"></select></label>
<label>Budget<select id="ap-budget"></select></label>
<label>Layers<select id="ap-layer"></select></label>
<label>KV heads<select id="ap-head"></select></label>
<label>Heat map<select id="ap-measure"></select></label></div>
<div class=ap-time><button type=button id="ap-play">Play</button>
<input type=range id="ap-step" min=0 max=0 value=0 aria-label="Moment of the answer">
<output id="ap-moment"></output></div>
<p class=ap-legend><span><span class=ap-swatch></span>held by all</span><span><span class="ap-swatch ap-out"></span>let
go</span><span><span class="ap-swatch ap-join"></span>merged into an entry that is held</span><span><span
class="ap-swatch ap-ramp"></span><span id="ap-scale"></span></span></p>
<p id="ap-readout" aria-live=polite></p><div id="ap-panels" class=ap-panels></div>"""
_MOST_NAMES = 5
_HATCH = (
    '<svg width=0 height=0 aria-hidden=true focusable=false style="position:absolute"><defs>'
    '<pattern id="ap-hatch" width=".34" height=".34" patternUnits=userSpaceOnUse patternTransform="rotate(45)">'
    '<rect width=".07" height=".34" style="fill:var(--hatch)"/></pattern></defs></svg>'
)


def autopsy_section(results: Results) -> str:
    """Return what stands below the heading; "" without records. Damaged files are named, missing ones cost nothing."""
    parts: list[str] = []
    data: list[dict[str, Any]] = []
    problems: list[str] = []
    same = True
    room = MOST_BYTES
    for group in results.groups:
        pairs = _read(group, problems)
        if pairs:
            one, spent = group_data(group, pairs, room)
            room -= spent
            data.extend([one] if one["items"] else [])
            same &= len({frozenset(sample.id for sample in autopsy.samples) for _, autopsy in pairs}) == 1
            title = f"<h3>{escaped(group.title)}</h3>" if len(results.groups) > 1 else ""
            parts.append(title + _without_room(pairs, one["ids"]) + numbers_html(group, pairs))
    notes = "".join(f"<p class=failed>{escaped(problem)}</p>" for problem in problems)
    if not results.records:
        return notes
    if not parts:
        return f"{notes}<p>No record has an autopsy beside it (setting <code>autopsy=few</code>).</p>"
    intro = f"<p>{prose(_INTRO.format(same=_SAME[same]))}</p><p class=quiet>{prose(_ATTENTION)}</p>"
    return f"{intro}{notes}{_drawings(data) if data else ''}{''.join(parts)}"


def _drawings(data: list[dict[str, Any]]) -> str:
    return f"""<noscript><p>Choosing samples needs JavaScript; the numbers below do not.</p></noscript>
<div class=ap-box>{_HATCH}{_CONTROLS}</div>
<script type="application/json" id="autopsy-data">{safe_json(data)}</script>"""


def _without_room(pairs: Pairs, shown: list[str]) -> str:
    """Say which samples are in the numbers but not in the drawings."""
    every = {sample.id for _, autopsy in pairs for sample in autopsy.samples}
    left = sorted(every.difference(shown), key=natural_key)
    if not left:
        return ""
    names = ", ".join(left[:_MOST_NAMES]) + (f" and {len(left) - _MOST_NAMES} more" if len(left) > _MOST_NAMES else "")
    return (
        f"<p class=quiet>{len(left)} of {len(every)} samples are in the numbers below but not in the drawings, for "
        f"which the page has no room: {escaped(names)}.</p>"
    )


def safe_json(data: object) -> str:
    """Return JSON that no text in it can break out of its element; a reader of JSON sees the same characters."""
    text = json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(group: Group, problems: list[str]) -> Pairs:
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
    return pairs
