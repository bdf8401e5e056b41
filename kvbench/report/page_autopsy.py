"""The page's autopsy: which patches and tokens every policy held, per layer and head and over decode time."""

from __future__ import annotations

import json
from typing import Any

from kvbench.errors import RecordError
from kvbench.report.autopsy_load import load_autopsy
from kvbench.report.load import Group, Results
from kvbench.report.natural import natural_key
from kvbench.report.page_autopsy_data import MOST_BYTES, Pairs, group_data
from kvbench.report.page_autopsy_tables import numbers_html
from kvbench.report.page_markup import escaped, prose

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
