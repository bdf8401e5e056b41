"""One HTML file that explains a results folder to a stranger; nothing is loaded from anywhere.

Order: a leaderboard and the Pareto front, figures, samples and what the cache kept, then the tables behind them, and
folded at the end how it was measured. Figures are drawn by the page's own script from the numbers that stand in it.

Every section is a function that builds plain data and renders a template of `templates/`; `page.html.j2` puts them
together with the style sheets and the scripts that lie there. The content policy loads nothing and lets that one script
run, by its hash. Scripts put texts into the document as text nodes only, so a model's output is never read as markup.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

from markupsafe import Markup

from kvbench.autopsy.page import asked_of, autopsy_section
from kvbench.measures import MEASURES, measure
from kvbench.report.answer import answer_html, failures_html
from kvbench.report.compare import DECLARED, Choices, size_with_unit
from kvbench.report.figures.draw import Plot, palette_of
from kvbench.report.figures.living import group_data
from kvbench.report.figures.style import PLOT_STYLE
from kvbench.report.findings import notes_of
from kvbench.report.first_screen import board_html, board_measures, in_short, leaderboard
from kvbench.report.laws import law_rows, laws_html
from kvbench.report.load import Results
from kvbench.report.markup import Head, TableView, listed, render, resource, safe_json
from kvbench.report.page_tables import (
    environment_html,
    frontier_html,
    latency_html,
    matrices_html,
    memory_html,
    numbers_html,
    verdicts_html,
)
from kvbench.report.samples import SampleLinks, sample_browser
from kvbench.report.standing import Judged, asked_budget, judge, rule_text
from kvbench.report.tables import counts_text, results_table
from kvbench.report.verdicts import all_rows
from kvbench.stats.tests import smallest_margin

BESIDE = "../"  # where a results folder has its tables, seen from its report
_UNITS = {"score": "0 to 1", "ppl": "perplexity", "fraction": "%", "ratio": "x full"}


def methods_html(results: Results, judged: Sequence[Judged], choices: Choices = DECLARED) -> Markup:
    """Return passes, words, intervals and the definitions of every number shown."""
    tables = [results_table(group, every_measure=every) for group in results.groups for every in (False, True)]
    shown = {name for table in tables for name in table.columns}
    found = {found.method for cell in results.records for found in cell.measurements.values() if found.method}
    methods = {method.replace("launches", "runs").replace("launch", "run") for method in found}  # a timed pass is a run
    heads = [Head(label, kind=None) for label in ("name", "what it is", "unit", "better")]
    return render(
        "definitions.html.j2",
        margins=_margins_text(choices),
        rules=list(dict.fromkeys(rule_text(one.primary) for one in judged if one.primary)),
        methods=sorted(methods),
        measures=[
            (known.label, known.definition, _UNITS.get(known.unit, known.unit), known.better.replace("none", "-"))
            for name, known in MEASURES.items()
            if name in shown
        ],
        view=TableView(caption="Definitions of the numbers on this page", heads=heads, classes="text"),
    )


def _margins_text(choices: Choices) -> str:
    """Say where margins come from; one that the reader of the numbers chose was not declared before them."""
    sizes = ((name, value, smallest_margin(name)) for name, value in sorted(choices.margins.items()))
    chosen = [
        f"{measure(name).label} ({size_with_unit(name, value)} instead of {size_with_unit(name, declared)})"
        for name, value, declared in sizes
        if value != declared
    ]
    if not chosen:
        return "was declared before measuring"
    return f"was chosen for this page in {listed(chosen)} and declared before measuring elsewhere"


_MOST_CHOICES = 50


def again_html(results: Results, choices: Choices = DECLARED, tables: str = BESIDE) -> Markup:
    """Return commands, links to the tables and, of several folders, which one each shared cell was taken from.

    The commands hold the options without which the page would be another one.
    """
    words = [name or "FOLDER" for name in results.folders]
    words += [] if results.sweep is None else [f"--sweep={results.sweep}"]
    words += [f"--margin={name}={value!r}" for name, value in sorted(choices.margins.items())]
    words += ["--intersect"] if choices.intersect else []
    several = results.folders if len(results.folders) > 1 else ()
    return render(
        "again.html.j2",
        folders=shlex.join(words),
        first=shlex.quote(results.folders[0] or "FOLDER"),
        counts=[(name, sum(cell.folder == name for cell in results.records)) for name in several],
        choices=results.choices[:_MOST_CHOICES] if several else (),
        tables=quote(tables),
        num_more=len(results.choices) - _MOST_CHOICES if several else 0,
        labels={cell.key: f"{cell.policy}, {cell.budget}" for cell in results.records},
    )


_MOST_OPEN_GROUPS = 4
_MOST_FIRSTS = 8  # lines above the leaderboard
_STYLES = ("page.css", "autopsy.css", "samples.css", "charts.css", "print.css")
_SCRIPTS = ("page.js", "print.js", "autopsy.js", "samples.js", "charts.js", "board.js")


def render_page(results: Results, plots: Sequence[Plot], choices: Choices = DECLARED, *, tables: str = BESIDE) -> str:
    """Return the whole page; the same records give the same text. `tables` is the way to the folder of table.csv."""
    judged = [judge(group, choices) for group in results.groups]
    script = "".join(map(resource, _SCRIPTS))
    drawn = render(
        "page.html.j2",
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style="".join(map(resource, _STYLES)) + PLOT_STYLE,
        summary=_summary(results),
        contents=_contents(results, judged, plots, choices, tables),
        script=script,
    )
    return str(drawn)


def _contents(
    results: Results, judged: Sequence[Judged], plots: Sequence[Plot], choices: Choices, tables: str
) -> Mapping[str, Markup]:
    """Return every section by its name; one without content is left out of the page."""
    links = SampleLinks()
    failures = _per_group(judged, lambda one: failures_html(one, links))
    answers = answer_section(results, judged, links)
    titles = {plot.group_title for plot in plots}
    undrawn = sum(one.group.title not in titles for one in judged) if plots else 0
    figures = render("figures.html.j2", num_files=len(plots), num_undrawn=undrawn, num_searches=len(results.frontiers))
    return {
        "answer": answers or Markup("<p>No usable record was found; see Problems while reading.</p>"),
        "verdicts": verdicts_html(all_rows(judged)) if judged else Markup(),
        "policies": _per_group(judged, matrices_html),
        "laws": laws_html(law_rows(results)),
        "care": _per_group(judged, lambda one: render("care.html.j2", notes=notes_of(one.group))),
        "frontier": frontier_html(results.frontiers, choices, results.groups) if judged else Markup(),
        "figures": figures if judged else Markup(),
        "failures": failures,
        "samples": sample_browser(results, links.found, openings(judged), asked_of(results)),
        "autopsy": autopsy_section(results),
        "memory": _per_group(judged, lambda one: memory_html(one.group)),
        "latency": _per_group(judged, lambda one: latency_html(one.group)),
        "numbers": _per_group(judged, lambda one: numbers_html(one, quote(tables))),
        "measures": methods_html(results, judged, choices),
        "environment": environment_html(results),
        "problems": render("problems.html.j2", problems=results.problems),
        "again": again_html(results, choices, tables),
    }


def answer_section(results: Results, judged: Sequence[Judged], links: SampleLinks | None = None) -> Markup:
    """Return the first screen: leaderboards, one figure, and folded below what stands behind each budget."""
    boards = [board_html(one, number) for number, one in enumerate(judged)]
    if not any(boards):
        return _per_group(judged, lambda one: answer_html(one, links))
    palette = palette_of(results)
    return render(
        "board.html.j2",
        boards=Markup().join(boards),
        firsts=_firsts(judged) if len(judged) > 1 else {},
        folds_firsts=len(judged) > _MOST_FIRSTS,
        more=_per_group(judged, lambda one: answer_html(one, links)),
        data=safe_json([group_data(one, palette, results.frontiers) for one in judged]),
    )


def _firsts(judged: Sequence[Judged]) -> dict[str, list[tuple[str, str, str]]]:
    """Return by budget what each leaderboard says first at its own: the group, the way to choose it, the words."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for one in judged:
        if (budget := asked_budget(one)) and (words := in_short(one, budget)):
            found.setdefault(budget, []).append((one.group.title, quote(one.group.title, safe=""), words))
    return found


def openings(judged: Sequence[Judged]) -> dict[str, tuple[str, str]]:
    """Return by group the policy and the budget that its answer speaks of, at which samples open."""
    found = {}
    for one in judged:
        budget, name = asked_budget(one), next(iter(board_measures(one)), None)
        places = leaderboard(one, budget, name) if budget and name else ()
        for place in (place for place in places if place.rank == 1):
            found[one.group.title] = (place.policy, place.cell.budget)
    return found


def _per_group(judged: Sequence[Judged], part: Callable[[Judged], Markup]) -> Markup:
    """Return one part per model and data set, under its name where there are several; folded where there are many."""
    parts = [(one.group.title, content) for one in judged if (content := part(one))]
    how = "alone" if len(judged) == 1 else "open" if len(judged) <= _MOST_OPEN_GROUPS else "folded"
    return render("groups.html.j2", parts=parts, how=how)


def _summary(results: Results) -> str:
    if not results.records:
        return "0 cells"
    sweeps = ", ".join(sorted({cell.sweep for cell in results.records}))
    days = sorted({cell.started_utc[:10] for cell in results.records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    devices = ", ".join(sorted({str(cell.environment.get("device", "unknown device")) for cell in results.records}))
    titles = [group.title for group in results.groups]  # several are listed below, each with its answer
    what = titles[0] if len(titles) == 1 else f"{len(titles)} pairs of model and data set"
    return f"{what}. Sweep {sweeps}. {counts_text(results.records)}. Measured {when} (UTC) on {devices}."
