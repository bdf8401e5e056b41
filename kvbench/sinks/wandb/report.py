"""The W&B Report of a sweep, from plain data to the blocks of wandb-workspaces.

spec = report_spec(outline, project="kvbench", entity=None)     # plain JSON data, without a network
url = save_report(outline, project="kvbench", entity="team", report_id="")

The panels of one chapter of a W&B Report: quality, time and memory of its cells, as their runs' summaries say.

Save a W&B Report within a time limit, over the one that was saved from the same folder before.

The id of a saved report is kept sealed in <folder>; without that file a second report is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import KvbenchError, RecordError
from kvbench.results.files import replace_file, seal, unseal
from kvbench.sinks.wandb.run import quiet_setup, reason_of, within

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr


WIDTH, HEIGHT, PER_ROW = 8, 7, 3  # of a panel, in the report's 24 columns
_BUDGET = "memory/realised_budget_fraction"
_KV = "memory/kv_stored_bytes"
_TPOT = "latency/tpot_ms"


def chapter_panels(wr: Any, chapter: Chapter) -> dict[str, list[Any]]:
    """Return the panels by heading, laid out in rows; `wr` is wandb-workspaces' module of reports."""
    found = {
        "Quality": _quality(wr, chapter),
        "Time": _times(wr, chapter),
        "Memory": _memory(wr, chapter),
        "All settings and numbers": [_parallel(wr, chapter)],
    }
    return {heading: _placed(wr, panels) for heading, panels in found.items() if panels}


def _quality(wr: Any, chapter: Chapter) -> list[Any]:
    budget = [_scatter(wr, _BUDGET, key, f"{title} against realised budget") for key, title in chapter.quality]
    known = {key for key, _ in (*chapter.latency, *chapter.memory)}
    costs = [(key, name) for key, name in ((_KV, "KV bytes"), (_TPOT, "time per token")) if key in known]
    pareto = [
        _scatter(wr, cost, key, f"{title} against {name}") for cost, name in costs for key, title in chapter.quality[:1]
    ]
    return [*budget, *pareto]


def _scatter(wr: Any, x: str, y: str, title: str) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))


def _times(wr: Any, chapter: Chapter) -> list[Any]:
    title = "Time per token by launch, the full cache's beside it"
    of_both = ["launches/tpot_ms", "launches/full_tpot_ms"]
    lines = [wr.LinePlot(title=title, x="launch", y=of_both)] if "launches" in chapter.curves else []
    return [*_bars(wr, chapter.latency), *lines]


def _memory(wr: Any, chapter: Chapter) -> list[Any]:
    title, of_both = "Entries kept over tokens seen", ["entries/mean", "entries/max"]
    lines = [wr.LinePlot(title=title, x="seen_tokens", y=of_both)] if "entries" in chapter.curves else []
    return [*_bars(wr, chapter.memory), *lines]


def _bars(wr: Any, keys: Sequence[tuple[str, str]]) -> list[Any]:
    return [wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)]) for key, title in keys]


def _parallel(wr: Any, chapter: Chapter) -> wr.ParallelCoordinatesPlot:
    keys = [_BUDGET, *(key for some in (chapter.memory, chapter.latency, chapter.quality) for key, _ in some[:1])]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config("policy.name"), display_name="policy")]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(key)) for key in keys]
    return wr.ParallelCoordinatesPlot(columns=columns, layout=wr.Layout(w=WIDTH * PER_ROW, h=HEIGHT))


def _placed(wr: Any, panels: list[Any]) -> list[Any]:
    for number, panel in enumerate(panels):
        row, column = divmod(number, PER_ROW)
        wide = panel.layout.w > WIDTH
        width = panel.layout.w if wide else WIDTH
        panel.layout = wr.Layout(x=column * WIDTH, y=row * HEIGHT, w=width, h=HEIGHT)
    return panels


_NO_ENTITY = "entity"  # without one, wandb-workspaces would ask the server


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


def report_spec(outline: Outline, *, project: str, entity: str | None) -> dict[str, Any]:
    """Return the report as W&B would store it, the same for the same outline; ids that are made up are numbered."""
    report = _report(outline, project, entity or _NO_ENTITY, on_server=False)
    # The package has no public way to a spec without saving; `to_model` is what its own save() sends.
    model = report._to_model()
    spec = _renumbered(json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)), {})
    place = {"entity": entity, "project": project}
    return {"title": outline.title, "description": outline.description, **place, "spec": spec}


def save_report(outline: Outline, *, project: str, entity: str | None, report_id: str) -> tuple[str, str]:
    """Save the report on the server, over the one with `report_id` if that is given; return its URL and id.

    Raises: whatever wandb and its server do, without a time limit.
    """
    quiet_setup()
    import wandb

    entity = entity or str(wandb.Api().default_entity)
    report = _report(outline, project, entity, on_server=True)
    report.id = report_id
    report.save()
    return str(report.url), str(report.id)


def _renumbered(value: Any, seen: dict[str, str]) -> Any:
    """Replace the random ids of run sets and panels by their number of appearance."""
    if isinstance(value, list):
        return [_renumbered(item, seen) for item in value]
    if not isinstance(value, dict):
        return value
    named = ("id", "__id__")
    return {
        name: seen.setdefault(item, f"id-{len(seen) + 1}")
        if name in named and isinstance(item, str) and item
        else _renumbered(item, seen)
        for name, item in value.items()
    }


def _report(outline: Outline, project: str, entity: str, *, on_server: bool) -> wr.Report:
    quiet_setup()
    import wandb_workspaces.reports.v2 as wr

    place = {"entity": entity, "project": project} if on_server else {}
    blocks: list[Any] = [wr.TableOfContents(), wr.H1(text="Headline"), wr.MarkdownBlock(text=outline.headline)]
    for chapter in outline.chapters:
        blocks += _chapter(wr, outline, chapter, place)
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


def _chapter(wr: Any, outline: Outline, chapter: Chapter, place: dict[str, str]) -> Iterator[Any]:
    yield wr.H1(text=chapter.title)
    yield wr.MarkdownBlock(text=chapter.text)
    for heading, panels in chapter_panels(wr, chapter).items():
        yield wr.H2(text=heading)
        yield wr.PanelGrid(runsets=[_cells(wr, outline, chapter, place)], panels=panels)


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
    width = WIDTH * PER_ROW
    panels = [wr.MediaBrowser(title="Figures", media_keys=[*outline.figures], num_columns=2)]
    panels += [wr.WeavePanelSummaryTable(table_name=name) for name in ("best", "verdicts", "cells")]
    for row, panel in enumerate(panels):
        panel.layout = wr.Layout(x=0, y=row * 2 * HEIGHT, w=width, h=2 * HEIGHT)
    return wr.PanelGrid(runsets=[wr.Runset(**place, name="summary", filters=filters)], panels=panels)


SAVE_LIMIT_S = 60.0
_KIND, _VERSION = "kvbench_wandb_report", 1


def save_within(outline: Outline, folder: Path, *, project: str, entity: str | None) -> tuple[str, str]:
    """Return the URL of the saved report and "", or "" and why it was not saved; nothing is raised."""
    found: dict[str, str] = {}
    path = _path(folder, f"{quiet_setup()}\n{entity}\n{project}\n{outline.title}")

    def save() -> None:
        try:
            # The package prints the URL by itself.
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                url, report_id = save_report(outline, project=project, entity=entity, report_id=_known(path))
            found["url"] = url
            _keep(path, report_id)
        # wandb raises many kinds: no network, refused key, unknown project.
        except Exception as error:
            found.setdefault("reason", reason_of(error))

    if not within(SAVE_LIMIT_S, save):
        return "", f"the server did not answer within {SAVE_LIMIT_S:g} s"
    return found.get("url", ""), found.get("reason", "")


def _path(folder: Path, target: str) -> Path:
    return folder / f".wandb-report-{hashlib.sha256(target.encode()).hexdigest()[:16]}.json"


def _known(path: Path) -> str:
    try:
        return str(unseal(path, _KIND, _VERSION, "Delete it.").get("id", ""))
    except RecordError:
        return ""


def _keep(path: Path, report_id: str) -> None:
    """Note the id; a disk that refuses costs a second report the next time."""
    with contextlib.suppress(OSError, KvbenchError):
        replace_file(path, seal(_KIND, _VERSION, {"id": report_id}))
