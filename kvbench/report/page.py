"""One HTML file that explains a results folder to a stranger; nothing is loaded from anywhere.

Order: what was found, what to be careful about, numbers, figures, samples, how it was measured.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from kvbench.report.findings import headlines
from kvbench.report.load import Group, Results
from kvbench.report.notes import Note, notes_of
from kvbench.report.page_samples import sample_browser, worst_samples
from kvbench.report.page_script import SCRIPT
from kvbench.report.page_style import STYLE
from kvbench.report.page_tables import (
    environment_html,
    measures_html,
    methods_text,
    problems_html,
    results_html,
    scroll_box,
)
from kvbench.report.plots import THEME_COLOURS, Plot
from kvbench.report.table_rows import INTERVAL_NOTE, counts_text, results_table

_CAPTIONS = {
    "quality": "Quality against budget. Bands are 95 % intervals over samples; the dashed line is the full cache. "
    "Ticks are budget settings, points stand at the budget really kept where that is near its setting. "
    "Crosses are failed cells.",
    "pareto": "Quality against the KV bytes stored. Upright bars are 95 % intervals. The line is the front: no other "
    "cell has both fewer bytes and better quality. Other cells are faded. Labels name the front's budgets.",
    "latency": "Time to first token and per output token; bars are 95 % intervals. Ratios compare with the full cache "
    "in the same process; the dashed line at 1 is its speed. n counts timed repetitions.",
    "memory": "Left: peak memory by phase (the axis need not start at zero). Right: KV cache stored (bar) and what the "
    "budget implies (upright tick).",
}
_SECTIONS = (
    ("samples", "Samples"),
    ("worst", "Worst samples"),
    ("measures", "How it is measured"),
    ("environment", "Environment"),
    ("problems", "Problems"),
)


def render_page(results: Results, plots: Sequence[Plot]) -> str:
    """Return the whole page; the same records give the same text."""
    groups = results.groups
    sections = [_group_section(index, group, plots) for index, group in enumerate(groups)]
    empty = "" if groups else "<p>No usable record was found; see Problems below.</p>"
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>KV-cache policies compared</title><style>{STYLE}</style></head><body>
<header><h1>KV-cache policies compared</h1><p class=quiet>{_summary(results)}</p>{_navigation(groups)}</header>
<main>{empty}{"".join(sections)}
{sample_browser(results)}
{worst_samples(results)}
<section id="measures"><h2>How each number is measured</h2>
<p>Intervals: {html.escape(methods_text(results))}. Paired differences in the notes subtract two cells sample by sample;
their 95 % interval is a BCa bootstrap by cluster of samples, Student's t under 20 clusters. Intervals are not corrected
for the number of comparisons. "Undecided" means that the interval holds zero, not that two policies are equal.</p>
{measures_html(_shown_measures(results))}</section>
<section id="environment"><h2>Environment</h2>{environment_html(results)}</section>
<section id="problems"><h2>Problems found while reading the records</h2>{problems_html(results.problems)}</section>
</main>
<footer class=quiet>Made by kvbench from the records alone. The same numbers are in table.csv and table.parquet, every
sample in samples.csv and samples.parquet.</footer>
<script>{SCRIPT}</script></body></html>
"""


def _summary(results: Results) -> str:
    if not results.records:
        return "0 cells"
    sweeps = ", ".join(sorted({cell.sweep for cell in results.records}))
    days = sorted({cell.started_utc[:10] for cell in results.records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    devices = ", ".join(sorted({str(cell.environment.get("device", "unknown device")) for cell in results.records}))
    return html.escape(f"Sweep {sweeps}. {counts_text(results.records)}. Measured {when} (UTC) on {devices}.")


def _navigation(groups: Sequence[Group]) -> str:
    links = [(f"group-{index}", group.title) for index, group in enumerate(groups)]
    anchors = "".join(f'<a href="#{place}">{html.escape(name)}</a>' for place, name in (*links, *_SECTIONS))
    return f"<nav aria-label=Sections>{anchors}</nav>"


def _shown_measures(results: Results) -> set[str]:
    return {name for group in results.groups for name in _columns(group)}


def _columns(group: Group) -> tuple[str, ...]:
    main = results_table(group).columns
    return (*main, *results_table(group, every_measure=True).columns)


def _group_section(index: int, group: Group, plots: Sequence[Plot]) -> str:
    table, every = results_table(group), results_table(group, every_measure=True)
    figures = "".join(_figure(plot) for plot in plots if plot.group_title == group.title)
    short = "".join(f"<li>{_prose(sentence)}</li>" for sentence in headlines(group))
    care = "".join(_note(note) for note in notes_of(group))
    return f"""<section id="group-{index}"><h2>{html.escape(group.title)}</h2>
<div class=cards><div class=card><h3>In short</h3><ul>{short}</ul></div>
<div class=card><h3>Read with care</h3><ul>{care or "<li>Nothing odd was found.</li>"}</ul></div></div>
<h3>Results</h3><p class=quiet>{html.escape(table.counts)}. {html.escape(INTERVAL_NOTE)} "-" means not measured.
Choose a column head to sort.</p>{results_html(table)}
<details><summary>Every measurement ({len(every.columns)} columns)</summary>{results_html(every)}</details>
<h3>Figures</h3>{figures}</section>"""


def _note(note: Note) -> str:
    lines = "".join(f"<li>{_prose(line)}</li>" for line in note.details)
    numbers = f"<details><summary>Details ({len(note.details)})</summary><ul>{lines}</ul></details>" if lines else ""
    return f"<li>{_prose(note.text)}{numbers}</li>"


def _prose(text: str) -> str:
    """Return text as HTML: `names` as code, and no line break between a number and its per cent sign."""
    joined = html.escape(text).replace(" %", "&nbsp;%").replace("n = ", "n&nbsp;=&nbsp;")
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", joined)


def _figure(plot: Plot) -> str:
    caption = _CAPTIONS[plot.kind]
    label = html.escape(f"{plot.kind} figure, {plot.group_title}")
    drawing = f'<div class=plot role=img aria-label="{label}: {html.escape(caption)}">{inline_svg(plot)}</div>'
    return f"<figure>{scroll_box(drawing, label)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def inline_svg(plot: Plot) -> str:
    """Return the drawing for use inside the page: own ids, the page's colours, no XML prologue."""
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = f"{plot.name}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for colour, variable in THEME_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg
