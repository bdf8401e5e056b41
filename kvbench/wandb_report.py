"""`kvbench report --wandb`: the W&B Report of a results folder, saved on the server or written as its spec."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.measures import MEASURES, format_with_interval, measure
from kvbench.report.ability import Ability
from kvbench.report.compare import DECLARED, Choices, Comparison, group_comparisons
from kvbench.report.figures.draw import png_names
from kvbench.report.load import flat_settings
from kvbench.report.standing import best_policies
from kvbench.results.files import replace_file
from kvbench.results.redaction import hide_known
from kvbench.sinks.console import say
from kvbench.sinks.wandb.content import measure_group
from kvbench.sinks.wandb.report import Chapter, Outline, report_spec, save_within
from kvbench.sinks.wandb.run import check_installed, check_project, resolve_mode

if TYPE_CHECKING:
    from kvbench.report.load import Group, Results

SPEC = "wandb_report.json"
_PACKAGES = {"wandb": "wandb", "wandb-workspaces": "'kvbench[wandb-report]'"}
_QUALITY = (
    *("ppl", "rougeL_vs_full", "kl_to_full", "rougeL_vs_reference", "objects_recalled_fraction"),
    *("needles_recalled_fraction", "exact_fraction", "top1_agreement_fraction"),
)
_LATENCY = ("tpot_ms", "ttft_ms", "tpot_ratio_to_full", "throughput_tokens_per_s", "capacity_prompts")
_MEMORY = ("kv_stored_bytes", "peak_memory_bytes")
_COMPARED = (*_QUALITY, "tpot_ratio_to_full")
_CURVES = {"entries": "entries", "launches_ms": "launches"}
_HEADLINES = 2  # measures of quality that the headline names


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
    path = _write_spec(outline, folder, project, entity)
    say(
        f"wandb: report written as its spec to {path} ({reason or mode}); save it later, after wandb login and "
        "kvbench wandb sync, with the same command"
    )


def _write_spec(outline: Outline, folder: Path, project: str, entity: str | None) -> Path:
    path = folder / SPEC
    text = json.dumps(report_spec(outline, project=project, entity=entity), indent=1, ensure_ascii=False)
    replace_file(path, f"{text}\n".encode())
    return path


def _outline(results: Results, choices: Choices) -> Outline:
    sweeps = sorted({cell.sweep for cell in results.records})
    compared = [(group, group_comparisons(group, choices, _COMPARED)) for group in results.groups]
    return Outline(
        title=hide_known(f"KV-cache policies, {', '.join(sweeps)}"),
        description=f"{len(results.records)} cells of kvbench, from their records; intervals are 95 %.",
        sweeps=sweeps,
        headline=hide_known("\n\n".join(line for group, some in compared for line in _headline(group, some))),
        chapters=[_chapter(group, some, results.groups) for group, some in compared],
        figures=_figures(results, sweeps),
        definitions=_definitions(results),
    )


def _figures(results: Results, sweeps: Sequence[str]) -> list[str]:
    """Return the keys of the figures that the sweeps' summary runs hold; a single cell has no summary."""
    found: dict[str, None] = {}
    for sweep in sweeps:
        cells = tuple(cell for cell in results.records if cell.sweep == sweep)
        names = png_names(replace(results, records=cells)) if len(cells) > 1 else []
        found |= dict.fromkeys(f"figures/{name}" for name in names)
    return list(found)


def _headline(group: Group, compared: Sequence[Comparison]) -> Iterator[str]:
    """Yield a sentence per budget and measure: which policy is best, how good it is, and how sure that is."""
    names = [name for name in _QUALITY if any(cell.estimate(name) for cell in group.budgeted)][:_HEADLINES]
    yield f"**{group.title}**"
    if sentence := Ability(group).sentence:
        yield sentence
        return
    found = [one for one in best_policies(group, compared) if one.measure in names]
    for one in found:
        value = format_with_interval(one.measure, one.estimate.value, one.estimate.low, one.estimate.high)
        runner_up = group.series_label(one.runner_up)
        sure = {
            "better": f"shown to be better than `{runner_up}`",
            "equivalent": f"equivalent to `{runner_up}` within the margin",
        }.get(one.verdict, f"not shown to differ from `{runner_up}` ({one.verdict})")
        label = measure(one.measure).label
        yield f"- {one.budget}, {label}: `{group.series_label(one.cell)}` is best with {value}, {sure}."
    if not found:
        yield "Fewer than two policies were measured at one budget, so there is no best one."


def _chapter(group: Group, compared: Sequence[Comparison], groups: Sequence[Group]) -> Chapter:
    measured = {name for cell in group.cells for name in MEASURES if cell.estimate(name)}
    keys = [[_key(name) for name in names if name in measured] for names in (_QUALITY, _LATENCY, _MEMORY)]
    return Chapter(
        title=group.title,
        chosen=_chosen(group, groups),
        text=hide_known(_verdict_table(group, compared)),
        quality=keys[0],
        latency=keys[1],
        memory=keys[2],
        curves=[shown for name, shown in _CURVES.items() if any(cell.curves.get(name) for cell in group.cells)],
    )


def _chosen(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    """Return the settings, as W&B calls them, that single out the runs of `group` among those of `groups`."""
    found: dict[str, Any] = {}
    for part in ("model", "dataset"):
        name = group.cells[0].labels[part]
        found[f"{part}.value.name"] = name
        same = [
            dict(flat_settings(one.cells[0].settings.get(part) or {}))
            for one in groups
            if one.cells[0].labels[part] == name
        ]
        mine = dict(flat_settings(group.cells[0].settings.get(part) or {}))
        for setting, value in sorted(mine.items()):
            if isinstance(value, str | int | float) and any(other.get(setting) != value for other in same):
                found[f"{part}.value.{setting}"] = value
    return found


def _key(name: str) -> tuple[str, str]:
    return f"{measure_group(name)}/{name}", measure(name).title


def _verdict_table(group: Group, compared: Sequence[Comparison]) -> str:
    """Return markdown: each policy against the full cache in the main measures, with interval and verdict."""
    rows = [one for one in compared if one.second.is_full and one.low is not None]
    if not rows:
        return "Nothing could be compared with the full cache."
    sentence = Ability(group).sentence
    head = "| policy | budget | measure | difference from full | 95 % interval | verdict | declared before |"
    lines = [*([sentence, ""] if sentence else []), head, "|---|---|---|---|---|---|---|"]
    for one in sorted(rows, key=lambda one: (not one.primary, _COMPARED.index(one.measure))):
        interval = f"[{one.low:.3g}, {one.high:.3g}]"
        shown = measure(one.measure)
        label = f"log-loss of {shown.label}, nats per token" if shown.unit == "ppl" else shown.label
        names = f"{_cell(group.series_label(one.first))} | {_cell(one.first.budget)} | {label}"
        primary = "primary" if one.primary else ""
        lines.append(f"| {names} | {one.value:+.3g} | {interval} | {one.verdict} | {primary} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _definitions(results: Results) -> str:
    shown = [name for name in (*_QUALITY, *_LATENCY, *_MEMORY) if any(cell.estimate(name) for cell in results.records)]
    return "\n".join(f"- **{measure(name).title}**: {measure(name).definition}" for name in shown)
