"""The page's samples: a browser of all answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from kvbench.autopsy.page import safe_json
from kvbench.report.load import Results
from kvbench.report.page_samples_data import NO_LINKS, group_data
from kvbench.report.sample_answers import COLLAPSE_RULE, answers_of

_MOST_SAMPLES = 4000
_CUT = (
    "<p class=quiet>About {most} answers of each cell: those that this page links to and those that collapse first, "
    "then from the beginning. All are in samples.csv.</p>"
)
_BROWSER = """<div class=card id="sb-card"><div class=controls>
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


def sample_browser(results: Results, linked: Mapping[tuple[str, str], Collection[str]] = NO_LINKS) -> str:
    """Return filters and panes, and the data they show; `linked` samples are among them whatever else is."""
    groups = [group for group in results.groups if any(cell.samples for cell in group.cells)]
    if not groups:
        return "<p>No record carries samples.</p>"
    most = max(2, _MOST_SAMPLES // max(1, sum(bool(cell.samples) for cell in results.records)))
    is_cut = any(len(list(answers_of(cell))) > most for cell in results.records)
    cut = _CUT.format(most=most) if is_cut else ""
    data = safe_json([group_data(group, most, linked) for group in groups])
    return f"""<p>What each policy answered, beside the full cache. The first token that differs is marked in both.
{COLLAPSE_RULE}</p>{cut}
<noscript><p>Choosing samples needs JavaScript; samples.csv holds all of them.</p></noscript>
{_BROWSER}
<script type="application/json" id="sample-data">{data}</script>"""
