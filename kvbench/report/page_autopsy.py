"""The page's autopsy: which patches and tokens every policy held, per layer and head and over decode time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from kvbench.errors import RecordError
from kvbench.report.autopsy_load import Autopsy, load_autopsy
from kvbench.report.autopsy_numbers import Kept, chance_overlap, kept, overlap, percent, sentence
from kvbench.report.cell import CellResult
from kvbench.report.load import Group, Results
from kvbench.report.page_autopsy_data import MOST_BYTES, Pairs, group_data
from kvbench.report.page_markup import Head, escaped, number_cell, prose, row_head, table, text_cell

_INTRO = (
    "A few samples, the same for every policy, were answered once more, alone and outside of everything that is "
    "measured, and it was written down when each token left the cache, in every layer and KV head. A clear patch or "
    "word is held; the more layers and heads have let it go, the fainter it is. Merged tokens live on inside another "
    "entry."
)
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
go</span><span><span class="ap-swatch ap-join"></span>merged into another entry</span><span><span
class="ap-swatch ap-ramp"></span><span id="ap-scale"></span></span></p>
<p id="ap-readout" aria-live=polite></p><div id="ap-panels" class=ap-panels></div>"""
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
    room = MOST_BYTES
    for group in results.groups:
        pairs = _read(group, problems)
        if pairs:
            one, spent = group_data(group, pairs, room)
            room -= spent
            data.append(one)
            title = f"<h3>{escaped(group.title)}</h3>" if len(results.groups) > 1 else ""
            parts.append(title + _numbers(group, pairs))
    notes = "".join(f"<p class=failed>{escaped(problem)}</p>" for problem in problems)
    if not results.records:
        return notes
    if not data:
        return f"{notes}<p>No record has an autopsy beside it (setting <code>autopsy=few</code>).</p>"
    return f"""<p>{prose(_INTRO)}</p><p class=quiet>{prose(_ATTENTION)}</p>{notes}
<noscript><p>Choosing samples needs JavaScript; the numbers below do not.</p></noscript>
<div class=ap-box>{_HATCH}{_CONTROLS}</div>{"".join(parts)}
<script type="application/json" id="autopsy-data">{safe_json(data)}</script>"""


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


def _numbers(group: Group, pairs: Pairs) -> str:
    budgeted = [(cell, autopsy) for cell, autopsy in pairs if not cell.is_full]
    if not budgeted:
        return ""
    num = max(len(autopsy.samples) for _, autopsy in budgeted)
    what = "1 sample" if num == 1 else f"{num} samples"
    parts = [_table(group, budgeted, what), _sentences(group, budgeted)]
    by_budget: dict[str, list[tuple[CellResult, Autopsy]]] = {}
    for cell, autopsy in budgeted:
        by_budget.setdefault(cell.budget, []).append((cell, autopsy))
    several = {budget: some for budget, some in by_budget.items() if len(some) > 1}
    tables = "".join(_overlaps(group, some, budget) for budget, some in several.items())
    overlaps = f"<details><summary>How much policies keep the same tokens</summary>{tables}</details>" if tables else ""
    left = sorted({text for _, autopsy in pairs for text in autopsy.left_out})
    out = f"<p class=quiet>Left out: {escaped('; '.join(left[:5]))}.</p>" if left else ""
    return "".join([*parts, overlaps, out])


def _table(group: Group, pairs: Pairs, what: str) -> str:
    heads = [
        Head(label="policy", kind="text"),
        Head(label="budget", kind="text"),
        Head(label="after the prompt", group="image patches kept"),
        Head(label="at the end", group="image patches kept"),
        Head(label="after the prompt", group="prompt text kept"),
        Head(label="at the end", group="prompt text kept"),
        Head(label="after the prompt", group="attention held"),
        Head(label="at the end", group="attention held"),
        Head(label="merged", note="of the prompt", group=""),
        Head(label="mean age", note="tokens, at the end", group=""),
    ]
    rows = [f"<tr>{''.join(_cells(group, cell, kept(autopsy.samples)))}</tr>" for cell, autopsy in pairs]
    caption = f"What was kept of the prompt, mean over {what}, layers and KV heads; small: lowest and highest layer"
    return table(caption, heads, rows, classes="ap-kept")


def _cells(group: Group, cell: CellResult, found: Kept) -> Iterator[str]:
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    yield row_head(group.series_label(cell))
    yield text_cell(cell.budget, sort=size)
    for shares, by_layer in (
        (found.image, found.image_by_layer),
        (found.text, None),
        (found.attention, found.attention_by_layer),
    ):
        for index in (0, 1):
            low, high = (percent(share) for share in by_layer or (0.0, 0.0))
            spread = f"{low} to {high}" if low != high and not index else ""
            value = None if shares is None else shares[index]
            yield number_cell("-" if value is None else f"{100 * value:.0f} %", spread, value=value)
    yield number_cell(f"{100 * found.merged:.0f} %", value=found.merged)
    yield number_cell(f"{found.mean_age_tokens:.0f}", value=found.mean_age_tokens)


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
