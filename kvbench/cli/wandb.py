"""`kvbench wandb sync`: send the records of any sweep to Weights & Biases, at any time.

kvbench wandb sync results --sweep default --project kvbench

`kvbench report --wandb`: the W&B Report of a results folder, saved on the server or written as its spec.

From the records of a sweep to what its W&B summary run shows: tables, verdicts, figures, best policies.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kvbench import installed_version
from kvbench.cli import Parser
from kvbench.errors import ConfigError, close_matches
from kvbench.measures import MEASURES, format_with_interval, measure
from kvbench.report.ability import Ability
from kvbench.report.compare import DECLARED, Choices, Comparison, group_comparisons
from kvbench.report.figures.draw import png_names
from kvbench.report.load import flat_settings
from kvbench.report.standing import best_policies
from kvbench.results.files import replace_file
from kvbench.results.record import read_cell
from kvbench.results.redaction import hide_known, redact, redacted_body
from kvbench.results.store import RecordStore
from kvbench.sinks.console import say
from kvbench.sinks.wandb.content import (
    Figure,
    SweepSummary,
    Table,
    cell_digest,
    cell_run,
    measure_group,
    summary_digest,
    summary_id,
    summary_run,
)
from kvbench.sinks.wandb.report import Chapter, Outline, report_spec, save_within
from kvbench.sinks.wandb.run import (
    MODES,
    Online,
    Place,
    RunSpec,
    check_installed,
    check_online,
    check_project,
    quiet_setup,
    resolve_mode,
)
from kvbench.sinks.wandb.sync import Job, Outcome, cells_of_sweep, send_runs

if TYPE_CHECKING:
    from kvbench.report.compare import Comparison
    from kvbench.report.load import CellResult, Group, Results
    from kvbench.sinks.wandb.run import RunSpec


_MODES = tuple(mode for mode in MODES if mode != "disabled")
_LONGEST_S = 600.0
_SHOWN = 5  # failures, which are mostly all of one kind


def wandb_command(arguments: Sequence[str]) -> int:
    """Run one subcommand and return its exit code: 1 if a run could not be sent. Raises: ConfigError."""
    args = _parser().parse_args(list(arguments))
    if args.mode not in _MODES:
        raise ConfigError(f"--mode is {args.mode!r}; {close_matches(args.mode, _MODES)}")
    if not 0 < args.timeout <= _LONGEST_S:
        raise ConfigError(f"--timeout is {args.timeout:g}; it must lie in (0, {_LONGEST_S:g}] seconds")
    check_project(args.project)
    check_installed("records are to be sent to Weights & Biases")
    if args.mode == "online":
        check_online("--mode", "--mode auto")
    return _sync(args)


def _parser() -> Parser:
    parser = Parser(prog="kvbench wandb", description="Send records to Weights & Biases.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    text = "send each cell that was not sent yet as one run, and each sweep as one more"
    sync = commands.add_parser("sync", help=text, description=f"{text[0].upper()}{text[1:]}.")
    sync.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results folder")
    sync.add_argument("--sweep", help="only the cells of this sweep")
    sync.add_argument("--project", default="kvbench", help="W&B project (default: kvbench)")
    sync.add_argument("--entity", help="W&B team or user (default: that of the account)")
    sync.add_argument("--mode", default="auto", help="auto (online with a key, else offline), online, offline")
    sync.add_argument("--to", type=Path, metavar="DIR", help="folder for wandb's files (default: the results folder)")
    sync.add_argument("--timeout", type=float, default=30.0, metavar="S", help="limit for the start and end of a run")
    return parser


def _sync(args: argparse.Namespace) -> int:
    place = Place(project=args.project, entity=args.entity, folder=args.to or args.folder, timeout_s=args.timeout)
    jobs = _jobs(args.folder, args.sweep, place.folder)
    mode, reason = resolve_mode(args.mode)
    if mode == "disabled":
        raise ConfigError("WANDB_MODE is 'disabled', so nothing would be sent; unset it, or give --mode")
    with tqdm(total=len(jobs), desc="wandb", unit=" runs", disable=None, leave=False) as bar:
        outcome = send_runs(jobs, place, mode, bar.update)
    _say(outcome, place, mode, reason)
    return 1 if outcome.failures else 0


def _jobs(folder: Path, sweep: str | None, to: Path) -> list[Job]:
    """Return a job per cell, and one per sweep of more than one cell, each sweep's own after its cells."""
    from kvbench.report.load import load_results

    loaded = load_results(folder, sweep=sweep)
    for problem in loaded.problems:
        say(f"problem: {problem.path}: {problem.message}")
    sweeps: dict[str, list[str]] = {}
    for cell in loaded.records:
        if _path(folder, cell.key).exists():  # one that was moved is among the problems
            sweeps.setdefault(cell.sweep, []).append(cell.key)
    if not sweeps:
        raise ConfigError("no record is left to send; kvbench results list shows what there is")
    return [job for name, keys in sorted(sweeps.items()) for job in _sweep_jobs(folder, name, keys, to)]


def _sweep_jobs(folder: Path, sweep: str, keys: list[str], to: Path) -> Iterator[Job]:
    # Read again when its turn comes: the bodies of a large sweep need not be held together.
    known = {key: cell_digest(_body(folder, key)) for key in keys}
    yield from (Job(id=key[:16], digest=known[key], what="cell", make=partial(_cell, folder, key)) for key in keys)
    keys = cells_of_sweep(folder, sweep, keys, lambda key: _path(folder, key).exists())
    if len(keys) > 1:
        digests = [known.get(key) or cell_digest(_body(folder, key)) for key in keys]
        digest = summary_digest(digests, installed_version())
        make = partial(summary_of, folder, sweep, keys, to=to)
        yield Job(id=summary_id(sweep, keys), digest=digest, what="summary", make=make)


def _cell(folder: Path, key: str) -> RunSpec:
    return cell_run(_body(folder, key))


def _body(folder: Path, key: str) -> dict[str, Any]:
    return redacted_body(read_cell(_path(folder, key).parent).body)


def _path(folder: Path, key: str) -> Path:
    return RecordStore(folder).record_file(key)


def _say(outcome: Outcome, place: Place, mode: Online, reason: str) -> None:
    """Print what was sent where, and how to go on if something is left to do."""
    counts = [f"{count} {what if count == 1 else _plural(what)}" for what, count in outcome.sent.items()]
    folder = (place.folder / "wandb").resolve()
    where = f"sent to {_address(place)}" if mode == "online" else f"kept offline ({reason}) in {folder}"
    there = f"{outcome.num_there} there already" if outcome.num_there else ""
    sent = f"{' and '.join(counts)} {where}" if counts else "" if there else f"nothing {where}"
    say(f"wandb: {'; '.join(part for part in (sent, there) if part)}")
    if mode == "offline":
        say(f"wandb: upload them with: wandb sync {shlex.quote(str(folder))}/offline-run-*")
    for failure in outcome.failures[:_SHOWN]:
        say(f"wandb: failed: {redact(failure)}")
    if outcome.failures:
        say(f"wandb: {len(outcome.failures)} failed, {outcome.num_left} not tried; the same command goes on with them")


def _plural(what: str) -> str:
    return "summaries" if what == "summary" else f"{what}s"


def _address(place: Place) -> str:
    parts = (quiet_setup().rstrip("/"), place.entity, place.project)
    return " ".join(part for part in parts if part)


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
        names = (
            f"{_wandb_report_cell(group.series_label(one.first))} | {_wandb_report_cell(one.first.budget)} | {label}"
        )
        primary = "primary" if one.primary else ""
        lines.append(f"| {names} | {one.value:+.3g} | {interval} | {one.verdict} | {primary} |")
    return "\n".join(lines)


def _wandb_report_cell(text: str) -> str:
    return text.replace("|", "\\|")


def _definitions(results: Results) -> str:
    shown = [name for name in (*_QUALITY, *_LATENCY, *_MEMORY) if any(cell.estimate(name) for cell in results.records)]
    return "\n".join(f"- **{measure(name).title}**: {measure(name).definition}" for name in shown)


_CELL_COLUMNS = ("key", "model", "dataset", "policy", "budget", "positions", "status")
_WANDB_SUMMARY_COMPARED = (
    *("value", "low", "high", "verdict", "margin", "p_holm", "minimum_detectable", "num_samples", "num_clusters"),
    *("more_samples", "primary", "method", "reason"),
)
_IN_NUMBERS = ("value", "low", "high", "verdict")
# The measures that become keys of the summary; a key per measure and cell of a large sweep would be too many for W&B.
_SUMMARISED = (
    *("ppl", "rougeL_vs_full", "rougeL_vs_reference", "kl_to_full", "objects_recalled_fraction"),
    *("needles_recalled_fraction", "exact_fraction"),
    *("tpot_ratio_to_full", "ttft_ratio_to_full", "throughput_ratio_to_full"),
)


def summary_of(folder: Path, sweep: str, keys: Collection[str], *, to: Path | None = None) -> RunSpec:
    """Return the summary run of the records with a key in `keys` in the results folder `folder`.

    to: the folder of wandb's files, by default the same.
    """
    from kvbench.report.compare import group_comparisons
    from kvbench.report.figures.draw import draw_pngs
    from kvbench.report.load import load_results

    results = load_results(folder, keys=set(keys))
    compared = [(group, _with_interval(group_comparisons(group))) for group in results.groups]
    summary = SweepSummary(
        sweep=sweep,
        bodies=[_wandb_summary_body(folder, cell.key) for cell in results.records],
        folder=folder,
        to=to or folder,
        tables={
            "cells": _cells(results),
            "verdicts": _verdicts(compared),
            "best": _best(compared),
        },
        figures={f"figures/{png.name}": Figure(png=png.data, caption=png.caption) for png in draw_pngs(results)},
        numbers=dict(_numbers(compared)),
    )
    return summary_run(summary, installed_version())


def _with_interval(compared: tuple[Comparison, ...]) -> tuple[Comparison, ...]:
    """Leave out what was observed once, of which nothing can be said; the cells' table has the numbers."""
    return tuple(one for one in compared if one.low is not None or one.verdict == "not comparable")


def _wandb_summary_body(folder: Path, key: str) -> dict[str, Any]:
    return read_cell(RecordStore(folder).cell_folder(key)).body


def _cells(results: Results) -> Table:
    """Return a row per cell: labels, status, and every number with its interval, under the keys of the cells' runs."""
    measured = [name for name in MEASURES if any(cell.estimate(name) for cell in results.records)]
    ends = {name: [end for end in ("", "_low", "_high") if _has(results, name, end)] for name in measured}
    rows = []
    for group in results.groups:
        for cell in group.cells:
            labels = [cell.key[:16], cell.model, cell.dataset, group.series_label(cell)]
            numbers = [_part(cell, name, end) for name in measured for end in ends[name]]
            rows.append([*labels, cell.budget, cell.positions, cell.status, *numbers])
    keys = [f"{measure_group(name)}/{name}{end}" for name in measured for end in ends[name]]
    return Table(columns=[*_CELL_COLUMNS, *keys], rows=rows)


def _has(results: Results, name: str, end: str) -> bool:
    return any(_part(cell, name, end) is not None for cell in results.records)


def _part(cell: CellResult, name: str, end: str) -> float | None:
    found = cell.estimate(name)
    return None if found is None else {"": found.value, "_low": found.low, "_high": found.high}[end]


def _verdicts(compared: list[tuple[Group, tuple[Comparison, ...]]]) -> Table:
    """Return a row per comparison, those with the full cache and those between policies at one budget."""
    rows = [
        [
            *(group.title, measure(one.measure).label, group.series_label(one.first), one.first.budget),
            group.series_label(one.second),
            *(getattr(one, name) for name in _WANDB_SUMMARY_COMPARED),
        ]
        for group, some in compared
        for one in some
    ]
    return Table(columns=["group", "measure", "policy", "budget", "against", *_WANDB_SUMMARY_COMPARED], rows=rows)


def _best(compared: list[tuple[Group, tuple[Comparison, ...]]]) -> Table:
    """Return a row per budget and measure: the policy of the best value, and whether the next one is worse."""
    columns = ["group", "budget", "measure", "policy", "value", "low", "high", "next policy", "verdict against it"]
    return Table(columns=columns, rows=[row for group, some in compared for row in _best_rows(group, some)])


def _best_rows(group: Group, compared: tuple[Comparison, ...]) -> Iterator[list[Any]]:
    from kvbench.report.standing import best_policies

    for best in best_policies(group, compared):
        labels = (group.title, best.budget, measure(best.measure).label, group.series_label(best.cell))
        found = best.estimate
        yield [*labels, found.value, found.low, found.high, group.series_label(best.runner_up), best.verdict]


def _numbers(compared: list[tuple[Group, tuple[Comparison, ...]]]) -> Iterator[tuple[str, float | str]]:
    """Yield flat summary keys: to_full/<policy>@<budget>/quality/ppl, ..._low, ..._high, ..._verdict."""
    for group, some in compared:
        several = len(compared) > 1
        for one in some:
            if not one.second.is_full or one.measure not in _SUMMARISED:
                continue
            cell = f"{group.series_label(one.first)}@{one.first.budget}"
            # W&B reads a dot in a key as a step into a group.
            start = (f"to_full/{group.title}/{cell}" if several else f"to_full/{cell}").replace(".", "_")
            for part in _IN_NUMBERS:
                found = getattr(one, part)
                if found is not None:
                    ending = "" if part == "value" else f"_{part}"
                    yield f"{start}/{measure_group(one.measure)}/{one.measure}{ending}", found
