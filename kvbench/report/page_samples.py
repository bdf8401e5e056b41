"""The page's samples: a browser of all answers, and a plain list of each policy's worst ones."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any

from kvbench.report.cell import CellResult
from kvbench.report.load import Results
from kvbench.report.page_autopsy import safe_json
from kvbench.report.page_samples_data import group_data
from kvbench.report.paired import is_worse, sample_score
from kvbench.report.sample_answers import COLLAPSE_RULE, answers_of
from kvbench.units import MEASURES, format_value, measure

_MOST_SAMPLES = 4000
_WORST_BY = ("objects_recalled_fraction", "rougeL_vs_full", "rougeL_vs_reference", "ppl")
_NUM_WORST = 2
_WORD = re.compile(r"\s*\S+")
_BROWSER = """<div id="sb-card"><div class=controls>
<label id="sb-group-label">Model and data set<select id="sb-group"></select></label>
<label>Policy<select id="sb-policy"></select></label>
<label>Budget<select id="sb-budget"></select></label>
<label>Show<select id="sb-which"><option value=all>all samples</option><option value=collapsed>collapsed only</option>
</select></label>
<label>Sample<select id="sb-sample"></select></label>
<button type=button id="sb-previous">Previous</button><button type=button id="sb-next">Next</button>
<span id="sb-count" class=quiet aria-live=polite></span></div>
<p id="sb-none" hidden>No sample is left; choose another policy, budget or all samples.</p>
<div id="sb-shown" tabindex=0 role=group aria-label="Sample; left and right arrow keys go to the next one">
<div class=sb-head><div id="sb-picture" hidden></div><div><h3 id="sb-name" aria-live=polite></h3>
<p id="sb-question"></p><p id="sb-differs" class=quiet></p></div></div>
<div class=panes><div class=pane><h4>Full cache</h4><p id="sb-full"></p></div>
<div class=pane><h4 id="sb-policy-name">Policy</h4><p id="sb-text"></p></div>
<div class=pane><h4>Reference</h4><p id="sb-reference"></p></div></div>
<div class=scroll tabindex=0 role=region aria-label="Scores of this sample">
<table><tbody id="sb-scores"></tbody></table></div></div></div>"""


def sample_browser(results: Results) -> str:
    """Return the section with filters and panes, and the data they show."""
    groups = [group for group in results.groups if any(cell.samples for cell in group.cells)]
    if not groups:
        return "<p>No record carries samples.</p>"
    most = max(8, _MOST_SAMPLES // max(1, sum(bool(cell.samples) for cell in results.records)))
    is_cut = any(len(list(answers_of(cell))) > most for cell in results.records)
    cut = f"<p class=quiet>The first {most} answers of each cell; all are in samples.csv.</p>" if is_cut else ""
    return f"""<p>What each policy answered, beside the full cache. The first different token is marked in both texts.
{COLLAPSE_RULE}</p>{cut}
<noscript><p>Choosing samples needs JavaScript; samples.csv holds all of them.</p></noscript>
{_BROWSER}
<script type="application/json" id="sample-data">{safe_json([group_data(group, most) for group in groups])}</script>"""


def worst_samples(results: Results) -> str:
    """Return, for each policy and budget, the samples it did worst on."""
    parts = ["<h3>Worst samples of each policy</h3>"]
    for group in results.groups:
        if any(cell.samples for cell in group.cells):
            parts.append(f"<h3>{html.escape(group.title)}</h3>")
        for label, cells in group.by_series().items():
            blocks = [_worst_block(cell) for cell in cells if cell.samples and not cell.failed]
            if blocks:
                parts.append(
                    f"<details><summary><code>{html.escape(label)}</code></summary>{''.join(blocks)}</details>"
                )
    return "".join(parts) if len(parts) > 1 else ""


def marked_pair(full: str, text: str) -> tuple[str, str]:
    """Return both texts as HTML with the first differing word marked; unmarked if their words are equal."""
    one, two = _WORD.findall(full), _WORD.findall(text)
    longest = max(len(one), len(two))
    at = next((i for i in range(longest) if _word(one, i) != _word(two, i)), None)
    return _marked(one, at), _marked(two, at)


def _word(words: list[str], index: int) -> str:
    return words[index].strip() if index < len(words) else ""


def _marked(words: list[str], at: int | None) -> str:
    if at is None:
        return html.escape("".join(words)) or "(empty)"
    found = words[at] if at < len(words) else " (ends here)"
    space = found[: len(found) - len(found.lstrip())]
    before, after = html.escape("".join(words[:at]) + space), html.escape("".join(words[at + 1 :]))
    return f"{before}<mark>{html.escape(found.strip())}</mark>{after}"


def _text(sample: Mapping[str, Any], field: str) -> str:
    return "" if sample.get(field) is None else str(sample[field])


def _scores_text(sample: Mapping[str, Any]) -> str:
    parts = [
        f"{measure(name).label} {format_value(name, float(sample[name]))}"
        for name in MEASURES
        if isinstance(sample.get(name), int | float) and not isinstance(sample.get(name), bool)
    ]
    score = sample_score(sample, "ppl")
    if score is not None:
        parts.append(f"{score[0] / score[1]:.3f} nats per reference token ({score[1]:.0f} tokens)")
    return "; ".join(parts)


def _worst_block(cell: CellResult) -> str:
    name = next((name for name in _WORST_BY if any(sample_score(sample, name) for sample in cell.samples)), None)
    if name is None:
        return ""
    scored = [(score[0] / score[1], sample) for sample in cell.samples if (score := sample_score(sample, name))]
    sign = 1.0 if is_worse(name, 0.0, 1.0) else -1.0
    worst = sorted(scored, key=lambda item: (sign * item[0], str(item[1].get("id"))))[:_NUM_WORST]
    budget = f"{html.escape(cell.budget)}: " if not cell.is_full else ""
    by = "nats per token" if name == "ppl" else measure(name).label
    return f"<h4>{budget}worst by {html.escape(by)}</h4>" + "".join(_worst_sample(cell, sample) for _, sample in worst)


def _worst_sample(cell: CellResult, sample: Mapping[str, Any]) -> str:
    full, text = marked_pair(_text(sample, "full_text"), _text(sample, "text"))
    reference = html.escape(_text(sample, "reference"))
    head = f"<p class=quiet>{html.escape(str(sample.get('id', '')))}. {html.escape(_scores_text(sample))}</p>"
    panes = [("Reference", reference), ("Full cache", full)]
    panes += [] if cell.is_full else [(html.escape(cell.policy), text)]
    return head + f"<div class=panes>{''.join(f'<div class=pane><h4>{n}</h4><p>{t}</p></div>' for n, t in panes)}</div>"
