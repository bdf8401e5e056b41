"""The W&B Report of a sweep, from plain data to the blocks of wandb-workspaces.

spec = report_spec(outline, project="kvbench", entity=None)     # plain JSON data, without a network
url = save_report(outline, project="kvbench", entity="team", report_id="")
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvbench.sinks.wandb_report_panels import HEIGHT, PER_ROW, WIDTH, chapter_panels
from kvbench.sinks.wandb_service import quiet_setup

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

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
