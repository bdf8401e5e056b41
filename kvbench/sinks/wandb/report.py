"""The W&B Report of a results folder: from its cells and comparisons to an outline, from that to W&B's blocks.

    wandb_report(results, Path("results/report"), project="kvbench", entity=None)   # saved, or its spec written
    spec = report_spec(outline, project="kvbench", entity=None)                     # plain JSON data, no network
    url, why_not = save_within(outline, folder, project="kvbench", entity="team")   # within a time limit

The id of a saved report is kept sealed in the report's folder, so that the same command saves over it; without that
file a second report is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.measures import MEASURES, TASK_MEASURES, format_with_interval, measure
from kvbench.report.answer import sentences_before
from kvbench.report.compare import DECLARED, Ability, Choices, Comparison, group_comparisons, leading_quality
from kvbench.report.figures.draw import png_names
from kvbench.report.first_screen import board_markdown, board_measures, headline
from kvbench.report.load import Group, Results, flat_settings
from kvbench.report.standing import asked_budget, best_policies, is_usable, judge, leading_matrix
from kvbench.report.tables import markdown_table, matrix_markdown
from kvbench.results.files import replace_file
from kvbench.results.redaction import hide_known
from kvbench.sinks import say
from kvbench.sinks.wandb.content import measure_group
from kvbench.sinks.wandb.run import (
    check_installed,
    check_project,
    keep_note,
    kept_note,
    quiet_setup,
    reason_of,
    resolve_mode,
    within,
)

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr


SPEC = "wandb_report.json"
SAVE_LIMIT_S = 60.0
_KIND = "kvbench_wandb_report"
_PACKAGES = {"wandb": "wandb", "wandb-workspaces": "'kvbench[wandb-report]'"}
_NO_ENTITY = "entity"  # without one, wandb-workspaces would ask the server
_QUALITY = (
    *(*TASK_MEASURES, "rougeL_vs_full", "length_ratio", "ppl", "kl_to_full"),
    *("rougeL_vs_reference", "top1_agreement_fraction"),
)
_LATENCY = ("tpot_ms", "ttft_ms", "tpot_ratio_to_full", "throughput_tokens_per_s", "capacity_prompts")
_MEMORY = ("kv_stored_bytes", "peak_memory_bytes")
_COMPARED = (*_QUALITY, "tpot_ratio_to_full")
_CURVES = {"entries": "entries", "launches_ms": "launches"}
_TABLES = ("leaderboard", "failing", "best", "verdicts", "cells")  # of the summary run
_HEADLINES = 2  # measures of quality that the headline names
_WIDTH, _HEIGHT, _PER_ROW = 8, 7, 3  # of a panel, in the report's 24 columns
_BUDGET = "memory/realised_budget_fraction"
_COSTS = {"memory/kv_stored_bytes": "KV bytes", "latency/tpot_ms": "time per token"}


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One model on one data set: its text, and the summary keys of the cells' runs, most telling first.

    chosen: the settings of its runs, as W&B names them. curves: which of the runs' curves there are, "entries" and
    "launches".
    """

    title: str
    chosen: Mapping[str, str | int | float]
    text: str
    quality: Sequence[tuple[str, str]]
    latency: Sequence[tuple[str, str]]
    memory: Sequence[tuple[str, str]]
    curves: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What the report says. `sweeps` are the groups of runs it shows; keys are pairs of key and title."""

    title: str
    description: str
    sweeps: Sequence[str]
    headline: str
    chapters: Sequence[Chapter]
    figures: Sequence[str]
    definitions: str


def wandb_report(
    results: Results, folder: Path, choices: Choices = DECLARED, *, project: str, entity: str | None
) -> None:
    """Save the W&B Report of `results` if an account is at hand, else write `folder`/wandb_report.json.

    Prints the one line that says which, and how to save it later. Raises: ConfigError if a package is missing.
    """
    check_project(project)
    for package, install in _PACKAGES.items():
        check_installed("--wandb builds a W&B Report", package, install)
    outline = _outline(results, choices)
    mode, reason = resolve_mode("auto")
    if mode == "online":
        url, reason = save_within(outline, folder, project=project, entity=entity)
        if url:
            say(f"wandb: report saved: {url}")
            return
    spec = json.dumps(report_spec(outline, project=project, entity=entity), indent=1, ensure_ascii=False)
    replace_file(folder / SPEC, f"{spec}\n".encode())
    say(
        f"wandb: report written as its spec to {folder / SPEC} ({reason or mode}); save it later, after wandb login "
        "and kvbench wandb sync, with the same command"
    )


def _outline(results: Results, choices: Choices) -> Outline:
    sweeps = sorted({cell.sweep for cell in results.records})
    compared = [(group, _compared(group, choices)) for group in results.groups]
    shown = [name for name in (*_QUALITY, *_LATENCY, *_MEMORY) if any(cell.estimate(name) for cell in results.records)]
    figures: dict[str, None] = {}
    for sweep in sweeps:  # a single cell has no summary run, which holds the figures
        cells = tuple(cell for cell in results.records if cell.sweep == sweep)
        names = png_names(replace(results, records=cells)) if len(cells) > 1 else []
        figures |= dict.fromkeys(f"figures/{name}" for name in names)
    return Outline(
        title=hide_known(f"KV-cache policies, {', '.join(sweeps)}"),
        description=f"{len(results.records)} cells of kvbench, from their records; intervals are 95 %.",
        sweeps=sweeps,
        headline=hide_known("\n\n".join(line for group, some in compared for line in _headline(group, some))),
        chapters=[_chapter(group, some, results.groups, choices) for group, some in compared],
        figures=list(figures),
        definitions="\n".join(f"- **{measure(name).title}**: {measure(name).definition}" for name in shown),
    )


def _compared(group: Group, choices: Choices) -> tuple[Comparison, ...]:
    return group_comparisons(group, choices, (*_COMPARED, leading_quality(group) or ""))


def _headline(group: Group, compared: Sequence[Comparison]) -> Iterator[str]:
    """Yield what to know first, then a sentence per budget and measure: which policy is best, and how sure that is."""
    names = [name for name in dict.fromkeys((leading_quality(group), *_QUALITY)) if name and _is_told(group, name)]
    names = names[:_HEADLINES]
    yield f"**{group.title}**"
    yield from sentences_before(group)
    if Ability(group).sentence:
        return
    found = [one for one in best_policies(group, compared) if one.measure in names]
    for one in sorted(found, key=lambda one: names.index(one.measure)):
        value = format_with_interval(one.measure, one.estimate.value, one.estimate.low, one.estimate.high)
        runner_up = group.series_label(one.runner_up)
        sure = {
            "better": f"shown to be better than `{runner_up}`",
            "equivalent": f"equivalent to `{runner_up}` within the margin",
        }.get(one.verdict, f"not shown to differ from `{runner_up}` ({one.verdict})")
        label = measure(one.measure).label
        if is_usable(group, one.cell, one.measure) is False:
            sure = f"not usable; {sure}"
        yield f"- {one.budget}, {label}: `{group.series_label(one.cell)}` is best with {value}, {sure}."
    if not found and names:
        yield "Fewer than two policies were measured at one budget, so there is no best one."


def _is_told(group: Group, name: str) -> bool:
    return measure(name).better != "none" and any(cell.estimate(name) for cell in group.budgeted)


def _chapter(group: Group, compared: Sequence[Comparison], groups: Sequence[Group], choices: Choices) -> Chapter:
    measured = {name for cell in group.cells for name in MEASURES if cell.estimate(name)}
    quality, latency, memory = (
        [(f"{measure_group(name)}/{name}", measure(name).title) for name in names if name in measured]
        for names in (_QUALITY, _LATENCY, _MEMORY)
    )
    parts = [*_board(group, choices), _verdict_table(group, compared), *_matrix(group, choices)]
    return Chapter(
        title=group.title,
        chosen=_chosen(group, groups),
        text=hide_known("\n\n".join(parts)),
        quality=quality,
        latency=latency,
        memory=memory,
        curves=[shown for name, shown in _CURVES.items() if any(cell.curves.get(name) for cell in group.cells)],
    )


def _chosen(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """Return the settings, as W&B calls them, that single out the runs of `group` among those of `groups`."""
    found: dict[str, Any] = {}
    for part in ("model", "dataset"):
        name = group.cells[0].labels[part]
        found[f"{part}.value.name"] = name
        same = [one.cells[0] for one in groups if one.cells[0].labels[part] == name]
        mine, *others = (dict(flat_settings(cell.settings.get(part) or {})) for cell in (group.cells[0], *same))
        for setting, value in sorted(mine.items()):
            if isinstance(value, str | int | float) and any(other.get(setting) != value for other in others):
                found[f"{part}.value.{setting}"] = value
    return found


def _verdict_table(group: Group, compared: Sequence[Comparison]) -> str:
    """Return markdown: each policy against the full cache in the main measures, with interval and verdict."""
    rows = [one for one in compared if one.second.is_full and one.low is not None]
    if not rows:
        return "Nothing could be compared with the full cache."
    heads = ("policy", "budget", "measure", "difference from full", "95 % interval", "verdict", "declared before")
    texts = []
    for one in sorted(rows, key=lambda one: (not one.primary, (*_COMPARED, one.measure).index(one.measure))):
        shown = measure(one.measure)
        label = f"log-loss of {shown.label}, nats per token" if shown.unit == "ppl" else shown.label
        numbers = f"{one.value:+.3g}", f"[{one.low:.3g}, {one.high:.3g}]"
        names = group.series_label(one.first), one.first.budget
        texts.append((*names, label, *numbers, one.verdict, "primary" if one.primary else ""))
    before = (line for sentence in sentences_before(group) for line in (sentence, ""))
    return "\n".join([*before, *markdown_table(heads, texts)])


def _board(group: Group, choices: Choices) -> Iterator[str]:
    """Yield the page's first screen: its two sentences and the leaderboard of the headline's budget."""
    judged = judge(group, choices, leading_alone=True)
    budget, name = asked_budget(judged), next(iter(board_measures(judged)), None)
    if budget is None or name is None:
        return
    yield " ".join(headline(judged, budget))
    title = f"**Leaderboard at {budget} by {measure(name).label}**"
    yield "\n".join([title, "", *board_markdown(judged, budget, name)])


def _matrix(group: Group, choices: Choices) -> Iterator[str]:
    """Yield each policy against each other in the leading measure, where two can be compared."""
    if found := leading_matrix(group, choices):
        yield "\n".join(matrix_markdown(found, group.title))


def report_spec(outline: Outline, *, project: str, entity: str | None) -> dict[str, Any]:
    """Return the report as W&B would store it, the same for the same outline; ids that are made up are numbered."""
    report = _report(outline, project, entity or _NO_ENTITY, on_server=False)
    # The package has no public way to a spec without saving; `to_model` is what its own save() sends.
    model = report._to_model()
    spec = _renumbered(json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)), {})
    place = {"entity": entity, "project": project}
    return {"title": outline.title, "description": outline.description, **place, "spec": spec}


def _renumbered(value: Any, seen: dict[str, str]) -> Any:
    """Replace the random ids of run sets and panels by their number of appearance."""
    if isinstance(value, list):
        return [_renumbered(item, seen) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        name: seen.setdefault(item, f"id-{len(seen) + 1}")
        if name in ("id", "__id__") and isinstance(item, str) and item
        else _renumbered(item, seen)
        for name, item in value.items()
    }


def _report(outline: Outline, project: str, entity: str, *, on_server: bool) -> wr.Report:
    quiet_setup()
    import wandb_workspaces.reports.v2 as wr

    place = {"entity": entity, "project": project} if on_server else {}
    blocks: list[Any] = [wr.TableOfContents(), wr.H1(text="Headline"), wr.MarkdownBlock(text=outline.headline)]
    for chapter in outline.chapters:
        blocks += [wr.H1(text=chapter.title), wr.MarkdownBlock(text=chapter.text)]
        for heading, panels in _panels(wr, chapter).items():
            cells = _cells(wr, outline, chapter, place)
            blocks += [wr.H2(text=heading), wr.PanelGrid(runsets=[cells], panels=panels)]
    blocks += [wr.H1(text="The whole sweep"), _summary_grid(wr, outline, place)]
    blocks += [wr.H1(text="How each number is measured"), wr.MarkdownBlock(text=outline.definitions)]
    return wr.Report(
        entity=entity,
        project=project,
        title=outline.title[:128],
        description=outline.description,
        blocks=blocks,
        width="fluid",
    )


def _panels(wr: Any, chapter: Chapter) -> dict[str, list[Any]]:
    """Return the panels by heading, laid out in rows; `wr` is wandb-workspaces' module of reports."""
    known = {key for key, _ in (*chapter.latency, *chapter.memory)}
    pairs = []  # what the page's Pareto figure shows comes first
    for cost, name in _COSTS.items():
        pairs += [(cost, key, f"{title} against {name}") for key, title in chapter.quality[:1] if cost in known]
    pairs += [(_BUDGET, key, f"{title} against realised budget") for key, title in chapter.quality]
    keys = [_BUDGET, *(key for some in (chapter.memory, chapter.latency, chapter.quality) for key, _ in some[:1])]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config("policy.name"), display_name="policy")]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key)) for key in keys]
    whole = wr.Layout(w=_WIDTH * _PER_ROW, h=_HEIGHT)

    def bars(keys: Iterable[tuple[str, str]]) -> list[Any]:
        return [wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)]) for key, title in keys]

    def line(curve: str, title: str, x: str, y: list[str]) -> list[Any]:
        return [wr.LinePlot(title=title, x=x, y=y)] if curve in chapter.curves else []

    times = (
        "Time per token by run, the full cache's beside it",
        "launch",
        ["launches/tpot_ms", "launches/full_tpot_ms"],
    )
    entries = ("Entries kept over tokens seen", "seen_tokens", ["entries/mean", "entries/max"])
    found = {
        "Quality": [wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y)) for x, y, title in pairs],
        "Time": [*bars(chapter.latency), *line("launches", *times)],
        "Memory": [*bars(chapter.memory), *line("entries", *entries)],
        "All settings and numbers": [wr.ParallelCoordinatesPlot(columns=columns, layout=whole)],
    }
    for panels in found.values():
        for number, panel in enumerate(panels):
            row, column = divmod(number, _PER_ROW)
            width = max(panel.layout.w, _WIDTH)
            panel.layout = wr.Layout(x=column * _WIDTH, y=row * _HEIGHT, w=width, h=_HEIGHT)
    return {heading: panels for heading, panels in found.items() if panels}


def _cells(wr: Any, outline: Outline, chapter: Chapter, place: dict[str, str]) -> wr.Runset:
    filters = f'{_of(outline.sweeps)} and Metric("JobType") == "cell"'
    if len(outline.chapters) > 1:
        filters += "".join(f" and Config({name!r}) == {value!r}" for name, value in chapter.chosen.items())
    shown = [f"config:{part}.value.name" for part in ("policy", "budget")]
    shown += [f"summary:{key}" for key, _ in (*chapter.quality[:3], *chapter.latency[:2], *chapter.memory[:1])]
    return wr.Runset(**place, name="cells", filters=filters, groupby=["config.policy.name"], visible_columns=shown)


def _of(sweeps: Sequence[str]) -> str:
    names = [f'Metric("Group") == {sweep!r}' for sweep in sweeps]
    return names[0] if len(names) == 1 else f"({' or '.join(names)})"


def _summary_grid(wr: Any, outline: Outline, place: dict[str, str]) -> wr.PanelGrid:
    filters = f'{_of(outline.sweeps)} and Metric("JobType") == "summary"'
    panels = [wr.MediaBrowser(title="Figures", media_keys=[*outline.figures], num_columns=2)]
    panels += [wr.WeavePanelSummaryTable(table_name=name) for name in _TABLES]
    for row, panel in enumerate(panels):
        panel.layout = wr.Layout(x=0, y=row * 2 * _HEIGHT, w=_WIDTH * _PER_ROW, h=2 * _HEIGHT)
    return wr.PanelGrid(runsets=[wr.Runset(**place, name="summary", filters=filters)], panels=panels)


def save_report(outline: Outline, *, project: str, entity: str | None, report_id: str) -> tuple[str, str]:
    """Save the report on the server, over the one with `report_id` if that is given; return its URL and id.

    Raises: whatever wandb and its server do, without a time limit.
    """
    quiet_setup()
    import wandb

    report = _report(outline, project, entity or str(wandb.Api().default_entity), on_server=True)
    report.id = report_id
    report.save()
    return str(report.url), str(report.id)


def save_within(outline: Outline, folder: Path, *, project: str, entity: str | None) -> tuple[str, str]:
    """Return the URL of the saved report and "", or "" and why it was not saved; nothing is raised."""
    found: dict[str, str] = {}
    target = hashlib.sha256(f"{quiet_setup()}\n{entity}\n{project}\n{outline.title}".encode()).hexdigest()[:16]
    path = folder / f".wandb-report-{target}.json"

    def save() -> None:
        known = str(kept_note(path, _KIND).get("id", ""))
        try:
            # The package prints the URL by itself.
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                url, report_id = save_report(outline, project=project, entity=entity, report_id=known)
            found["url"] = url
            keep_note(path, _KIND, {"id": report_id})
        # wandb raises many kinds: no network, refused key, unknown project.
        except Exception as error:
            found.setdefault("reason", reason_of(error))

    if not within(SAVE_LIMIT_S, save):
        return "", f"the server did not answer within {SAVE_LIMIT_S:g} s"
    return found.get("url", ""), found.get("reason", "")
