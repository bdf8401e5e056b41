"""One HTML file that explains a results folder to a stranger; nothing is loaded from anywhere.

Order: the answer, the verdicts behind it, what to be careful about, figures and tables, samples, how it was measured.

How each number on the page is measured, and what the words of a verdict mean.

The page's figures: each drawing inline, with ids of its own and the page's colours.

The page's account of itself: which folders, what was chosen among them, and how to make it again.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvbench.autopsy.page import autopsy_section
from kvbench.frontier.section import frontier_html
from kvbench.measures import measure
from kvbench.report.answer import answer_html, failures_html
from kvbench.report.compare import DECLARED, Choices, difference_unit, size_text
from kvbench.report.figures.draw import Plot
from kvbench.report.figures.style import PLOT_STYLE, THEME_COLOURS
from kvbench.report.findings import Note, notes_of
from kvbench.report.load import Choice, Group, Results
from kvbench.report.markup import escaped, listed, prose, scroll_box
from kvbench.report.page_script import SCRIPT, content_policy
from kvbench.report.page_style import STYLE
from kvbench.report.page_tables import (
    environment_html,
    latency_html,
    measures_html,
    memory_html,
    methods_text,
    problems_html,
    results_html,
    verdicts_html,
)
from kvbench.report.samples import linked_samples, sample_browser
from kvbench.report.standing import Judged, judge, rule_text
from kvbench.report.tables import INTERVAL_NOTE, counts_text, results_table
from kvbench.report.verdicts import all_rows
from kvbench.stats.tests import smallest_margin

_WORDS = (
    (
        "better, worse",
        "the 95 % interval of the difference leaves zero out, and p is at most 5 % after Holm's correction",
    ),
    ("equivalent", "the whole interval lies inside the margin, which {margins}"),
    ("undecided", "neither is shown; about how many more samples would decide it is said where that can be estimated"),
    ("noisy", "the machine was not quiet; times of this cell are grey and in no ranking, its quality counts"),
    ("not comparable", "the two cells were not scored on the same samples"),
    ("not ranked", "the full cache itself does not do the task, so no policy can be shown to lose or keep it"),
    ("detectable", "the smallest true difference that this many samples find in 80 % of repetitions"),
)
_PASSES = (
    "Quality, speed and memory are three passes. Quality: the same samples under every policy, greedy, differences "
    "paired by sample and clustered by picture or document. Speed: launches in the order policy, full, full, policy in "
    "one process, medians per launch. Memory: counted from the storages of tensors, once. The full cache answers twice "
    "in every run and must give the same tokens. The comparisons of one measure within one model and data set are one "
    "family for Holm's correction: against the full cache one, between policies at the same budget another."
)


def methods_html(results: Results, judged: Sequence[Judged], choices: Choices = DECLARED) -> str:
    """Return passes, words, intervals and the definitions of every number shown."""
    margins = _margins_text(choices)
    words = "".join(
        f"<li><b>{prose(word)}</b>: {prose(meaning.format(margins=margins))}.</li>" for word, meaning in _WORDS
    )
    rules = "".join(dict.fromkeys(f"<p>{prose(rule_text(one.primary))}</p>" for one in judged if one.primary))
    shown = {name for group in results.groups for name in _columns(group)}
    intervals = prose(f"Intervals of single cells: {methods_text(results)}.")
    return f"<p>{prose(_PASSES)}</p><ul>{words}</ul>{rules}<p>{intervals}</p>{measures_html(shown)}"


def _margins_text(choices: Choices) -> str:
    """Say where margins come from; one that the reader of the numbers chose was not declared before them."""
    chosen = [
        f"{measure(name).label} ({_size(name, value)} instead of {_size(name, smallest_margin(name))})"
        for name, value in sorted(choices.margins.items())
        if value != smallest_margin(name)
    ]
    if not chosen:
        return "was declared before measuring"
    return f"was chosen for this page in {listed(chosen)} and declared before measuring elsewhere"


def _size(name: str, margin: float | None) -> str:
    return f"{size_text(name, margin)} {difference_unit(name)[0]}".strip()


def _columns(group: Group) -> tuple[str, ...]:
    return (*results_table(group).columns, *results_table(group, every_measure=True).columns)


_MOST_CHARACTERS = 6_000_000
_TALL = 0.9  # height over width
_STYLE = re.compile(r"<style\b.*?</style>", re.DOTALL)
_SIZE = re.compile(r'viewBox="0 0 ([0-9.]+) ([0-9.]+)"')
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)


def chosen_plots(plots: Sequence[Plot]) -> tuple[Plot, ...]:
    """Return the figures that the page can hold and stay quick; of a very large folder the first ones."""
    chosen: list[Plot] = []
    room = _MOST_CHARACTERS
    for plot in plots:
        room -= len(plot.svg)
        if room >= 0:
            chosen.append(plot)
    return tuple(chosen)


def figures_html(plots: Iterable[Plot], group_title: str) -> str:
    """Return the figures of one group."""
    return "".join(_figure(plot) for plot in plots if plot.group_title == group_title)


def inline_svg(plot: Plot) -> str:
    """Return the drawing for use inside the page: own ids, the page's colours, no prologue, no style of its own.

    The style sheet inside an SVG would reach the whole page; what it says is said once in the page's own.
    """
    svg = _STYLE.sub("", _METADATA.sub("", plot.svg[plot.svg.index("<svg") :]))
    prefix = f"{plot.name}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
    for colour, variable in THEME_COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg


def _figure(plot: Plot) -> str:
    label = f"{plot.title}, {plot.group_title}"
    kind = " class=tall" if _is_tall(plot.svg) else ""
    drawing = f'<div class=plot role=img aria-label="{escaped(label)}">{inline_svg(plot)}</div>'
    return f"<figure{kind}>{scroll_box(drawing, label)}<figcaption>{prose(plot.caption)}</figcaption></figure>"


def _is_tall(svg: str) -> bool:
    """Tell whether the drawing takes a sheet of its own on paper, which lies across."""
    size = _SIZE.search(svg)
    return size is not None and float(size[2]) > _TALL * float(size[1])


_MOST_CHOICES = 50


def again_html(results: Results, choices: Choices = DECLARED) -> str:
    """Return commands and, where several folders were read, which one each shared cell was taken from."""
    folders = " ".join(shlex.quote(name or "FOLDER") for name in results.folders)
    folders += _options(results, choices)
    return f"""<p>The same records give the same page, byte for byte:</p>
<pre>kvbench report {escaped(folders)}
kvbench report {escaped(folders)} --format csv
kvbench report {escaped(folders)} --format latex --out table.tex
kvbench results show {escaped(shlex.quote(results.folders[0] or "FOLDER"))} KEY</pre>
<p>The last line shows the settings and the software of one cell; running a sweep again measures only cells that are
missing. All numbers lie in <code>table.csv</code> and <code>table.parquet</code>, every sample in
<code>samples.csv</code> and <code>samples.parquet</code>.</p>{_choices(results)}"""


def _options(results: Results, choices: Choices) -> str:
    """Return the options without which the page would be another one."""
    words = [] if results.sweep is None else [f"--sweep={results.sweep}"]
    words += [f"--margin={name}={value!r}" for name, value in sorted(choices.margins.items())]
    words += ["--intersect"] if choices.intersect else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def _choices(results: Results) -> str:
    if len(results.folders) < 2:
        return ""
    counts = [(name, sum(cell.folder == name for cell in results.records)) for name in results.folders]
    read = ", ".join(f"{count} from <code>{escaped(name)}</code>" for name, count in counts)
    items = "".join(f"<li>{_choice(results, choice)}</li>" for choice in results.choices[:_MOST_CHOICES])
    more = f"<p>And {len(results.choices) - _MOST_CHOICES} more.</p>" if len(results.choices) > _MOST_CHOICES else ""
    shared = (
        f"<p>Cells in more than one folder: the newest that did not fail counts.</p><ul>{items}</ul>" if items else ""
    )
    return f"<p>Cells shown: {read}.</p>{shared}{more}"


def _choice(results: Results, choice: Choice) -> str:
    labels = {cell.key: f"{cell.policy}, {cell.budget}" for cell in results.records}
    others = ", ".join(
        f"{_code(folder)} ({escaped(status)}, {escaped(start[:19])})" for folder, status, start in choice.others
    )
    name = escaped(labels.get(choice.key, choice.key[:16]))
    return f"{name}: taken from {_code(choice.folder)}, not from {others}"


def _code(text: str) -> str:
    return f"<code>{escaped(text)}</code>"


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
