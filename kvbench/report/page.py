"""One HTML file that explains a results folder to a stranger; nothing is loaded from anywhere.

Order: the answer, the verdicts behind it, what to be careful about, figures and tables, samples, how it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbench.autopsy.page import autopsy_section
from kvbench.report.cell_rows import all_rows
from kvbench.report.comparison import DECLARED, Choices
from kvbench.report.judged import Judged, judge
from kvbench.report.load import Results
from kvbench.report.note import Note
from kvbench.report.notes import notes_of
from kvbench.report.page_again import again_html
from kvbench.report.page_answer import answer_html
from kvbench.report.page_failures import failures_html
from kvbench.report.page_figures import chosen_plots, figures_html
from kvbench.report.page_frontier import frontier_html
from kvbench.report.page_latency import latency_html
from kvbench.report.page_markup import escaped, prose
from kvbench.report.page_memory import memory_html
from kvbench.report.page_methods import methods_html
from kvbench.report.page_sample_links import linked_samples
from kvbench.report.page_samples import sample_browser
from kvbench.report.page_script import SCRIPT, content_policy
from kvbench.report.page_style import STYLE
from kvbench.report.page_tables import environment_html, problems_html, results_html
from kvbench.report.page_verdicts import verdicts_html
from kvbench.report.plots import Plot
from kvbench.report.plots_theme import PLOT_STYLE
from kvbench.report.table_rows import INTERVAL_NOTE, counts_text, results_table

_MOST_OPEN_GROUPS = 4
_MOST_CELLS_IN_FULL = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """A part of the page; it is left out, with its `link`, where `content` is empty."""

    name: str
    link: str
    title: str
    content: str


def render_page(results: Results, plots: Sequence[Plot], choices: Choices = DECLARED) -> str:
    """Return the whole page; the same records give the same text."""
    judged = [judge(group, choices) for group in results.groups]
    sections = [section for section in _sections(results, judged, plots, choices) if section.content]
    links = "".join(f'<a href="#{section.name}">{section.link}</a>' for section in sections)
    body = "".join(
        f'<section id="{section.name}"><h2>{section.title}</h2>{section.content}</section>' for section in sections
    )
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="{content_policy(SCRIPT)}">
<title>KV-cache policies compared</title><style>{STYLE}{PLOT_STYLE}</style></head><body>
<a class=skip href="#main">Skip to the answer</a>
<header><div class=top><h1>KV-cache policies compared</h1>
<button type=button id="theme" class=plain hidden>Dark colours</button></div>
<p class=quiet>{_summary(results)}</p><nav aria-label=Sections>{links}</nav></header>
<main id="main" tabindex=-1>{body}</main>
<footer class=quiet>Made by kvbench from records alone.</footer>
<script>{SCRIPT}</script></body></html>
"""


def _sections(results: Results, judged: Sequence[Judged], plots: Sequence[Plot], choices: Choices) -> list[_Section]:
    shown = chosen_plots(plots)
    answers, failures = _answers(judged), _per_group(judged, failures_html)
    parts = (
        ("answer", "Answer", "Answer", answers),
        ("verdicts", "Verdicts", "Verdicts", verdicts_html(all_rows(judged)) if judged else ""),
        ("care", "Care", "Read with care", _per_group(judged, _care)),
        (
            "frontier",
            "Safe budgets",
            "Smallest safe budget",
            frontier_html(results.frontiers, choices, results.groups) if judged else "",
        ),
        (
            "figures",
            "Figures",
            "Figures",
            _per_group(judged, lambda one: figures_html(shown, one.group.title)) + _cut(judged, plots, shown),
        ),
        ("failures", "Failures", "Where policies fail", failures),
        ("samples", "Samples", "Samples", sample_browser(results, linked_samples(answers + failures))),
        ("autopsy", "Kept", "What the cache kept", autopsy_section(results)),
        ("memory", "Memory", "Memory", _per_group(judged, lambda one: memory_html(one.group))),
        ("latency", "Latency", "Latency", _per_group(judged, lambda one: latency_html(one.group))),
        ("numbers", "Numbers", "All numbers", _per_group(judged, _numbers)),
        ("measures", "Methods", "How each number is measured", methods_html(results, judged, choices)),
        ("environment", "Environment", "Environment", environment_html(results)),
        ("problems", "Problems", "Problems while reading", problems_html(results.problems)),
        ("again", "This page", "This page again", again_html(results, choices)),
    )
    return [_Section(name=name, link=link, title=title, content=content) for name, link, title, content in parts]


def _per_group(judged: Sequence[Judged], render: Callable[[Judged], str]) -> str:
    """Return one part per model and data set, under its name where there are several; folded where there are many."""
    drawn = [(one.group.title, content) for one in judged if (content := render(one))]
    if len(judged) == 1:
        return "".join(content for _, content in drawn)
    if len(judged) <= _MOST_OPEN_GROUPS:
        return "".join(f"<h3>{escaped(title)}</h3>{content}" for title, content in drawn)
    return "".join(f"<details><summary>{escaped(title)}</summary>{content}</details>" for title, content in drawn)


def _answers(judged: Sequence[Judged]) -> str:
    return _per_group(judged, answer_html) or "<p>No usable record was found; see Problems while reading.</p>"


def _summary(results: Results) -> str:
    if not results.records:
        return "0 cells"
    sweeps = ", ".join(sorted({cell.sweep for cell in results.records}))
    days = sorted({cell.started_utc[:10] for cell in results.records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    devices = ", ".join(sorted({str(cell.environment.get("device", "unknown device")) for cell in results.records}))
    titles = [group.title for group in results.groups]
    what = ", ".join(titles) if len(titles) <= _MOST_OPEN_GROUPS else f"{len(titles)} pairs of model and data set"
    return escaped(f"{what}. Sweep {sweeps}. {counts_text(results.records)}. Measured {when} (UTC) on {devices}.")


def _care(judged: Judged) -> str:
    notes = "".join(_note(note) for note in notes_of(judged.group))
    return f"<ul>{notes or '<li>Nothing odd was found.</li>'}</ul>"


def _note(note: Note) -> str:
    lines = "".join(f"<li>{prose(line)}</li>" for line in note.details)
    numbers = f"<details><summary>Details ({len(note.details)})</summary><ul>{lines}</ul></details>" if lines else ""
    return f"<li>{prose(note.text)}{numbers}</li>"


def _cut(judged: Sequence[Judged], plots: Sequence[Plot], shown: Sequence[Plot]) -> str:
    """Say which figures are elsewhere, of very large folders."""
    left = len(plots) - len(shown)
    beside = f"<p>{left} more figures are in the folder plots beside this page.</p>" if left else ""
    titles = {plot.group_title for plot in plots}
    undrawn = sum(one.group.title not in titles for one in judged)
    apart = f"<p>Not drawn here: {undrawn} of {len(judged)} groups; <code>kvbench plot</code> draws them.</p>"
    return beside + (apart if undrawn else "")


def _numbers(judged: Judged) -> str:
    group = judged.group
    table, every = results_table(group), results_table(group, every_measure=True)
    note = f'{table.counts}. {INTERVAL_NOTE} "-" means not measured. Every measurement is in table.csv.'
    main = f"<p class=quiet>{prose(note)}</p>{results_html(table, f'Results, {group.title}')}"
    if len(group.cells) > _MOST_CELLS_IN_FULL:
        return main
    return (
        f"{main}<details><summary>Every measurement ({len(every.columns)} columns)</summary>"
        f"{results_html(every, f'Every measurement, {group.title}')}</details>"
    )
