"""Where the bytes are: what the peak is made of, peaks by phase above the weights, and KV nominal against stored.

What eviction buys when memory is the limit: throughput against batch, and the largest batch that fits.

Where the time goes: TTFT and the policy's part of it, TPOT with its roof, the share of the roof, ratios to full.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from kvbench.measures import printed_scale
from kvbench.report.figures.axes import (
    artist_name,
    axis_scale,
    footnote,
    interval_dots,
    marks_of,
    measured,
    panel_title,
    row_figure,
    status_text,
)
from kvbench.report.figures.labels import DirectLabels, Named, labelled
from kvbench.report.figures.style import Look, Mark, key_line, legend_above, new_figure, style_of
from kvbench.report.load import CellResult, Estimate, Group

PARTS = (
    ("peak_load_bytes", "weights", "grey", ""),
    ("plain_activation_bytes", "activations and vision", "sky", "////"),
    ("kv_stored_bytes", "KV stored", "blue", ""),
)
REST = ("rest", "statistics and all else", "orange", "\\\\\\\\")
PHASES = (
    ("peak_vision_bytes", "vision", "^", "sky"),
    ("peak_prefill_bytes", "prefill", "D", "green"),
    ("peak_settle_bytes", "settle", "s", "purple"),
    ("peak_decode_bytes", "decode", "o", "vermilion"),
)
_KV = ("kv_stored_bytes", "kv_valid_bytes", "kv_theoretical_bytes")


def memory_figure(group: Group, look: Look) -> Figure | None:
    """Draw the panels whose numbers any cell has."""
    phases = [phase[0] for phase in PHASES]
    has_load = bool(measured(group.cells, "peak_load_bytes"))
    wanted = (
        (has_load and measured(group.cells, "peak_memory_bytes"), _peak_parts),
        (has_load and measured(group.cells, *phases), _phases),
        (measured(group.cells, *_KV), _kv),
    )
    shown = [draw for names, draw in wanted if names]
    if not shown:
        return None
    figure, panels = row_figure(group, look, len(shown))
    marks = marks_of(group, look.palette)
    for axes, draw in zip(panels, shown, strict=True):
        draw(axes, group, marks, look)
    footnote(figure, group, look, "bytes are observed once (n = 1)")
    _keys(figure, shown, look)
    return figure


def parts_of_peak(cell: CellResult) -> dict[str, float] | None:
    """Return bytes by part of PARTS, and what of the peak is in none of them; None without a peak and weights.

    Activations are those of the model without a cache, KV is what is stored at the end. They need not be alive
    at the peak, so the parts may be more than the peak, and the rest is then 0.
    """
    peak, load = cell.estimate("peak_memory_bytes"), cell.estimate("peak_load_bytes")
    if peak is None or load is None:
        return None
    parts = {name: found.value for name, *_ in PARTS if (found := cell.estimate(name))}
    return parts | {"rest": max(0.0, peak.value - sum(parts.values()))}


def _peak_parts(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    scale = axis_scale("peak_memory_bytes", group.cells)
    for row, cell in enumerate(group.cells):
        parts, peak = parts_of_peak(cell), cell.estimate("peak_memory_bytes")
        if parts is None or peak is None:
            status_text(axes, row, cell, look)
            continue
        left = 0.0
        for name, _, colour, hatch in (*PARTS, REST):
            width = parts.get(name, 0.0) / scale.factor
            axes.barh(row, width, left=left, height=0.6, color=getattr(look.theme, colour), hatch=hatch, zorder=2,
                      edgecolor=look.theme.paper, linewidth=0.5,
                      label=artist_name(name, group.cell_label(cell)))  # fmt: skip
            left += width
        axes.vlines([peak.value / scale.factor], [row - 0.42], [row + 0.42], color=look.theme.ink, linewidth=1.8,
                    zorder=5, label=artist_name("peak_memory_bytes", group.cell_label(cell)))  # fmt: skip
    axes.set_title("Parts of the peak")
    axes.set_xlabel(scale.label)
    axes.set_xlim(left=0)


def _phases(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    """Draw how far each phase's peak is above the weights, which are in all of them."""
    above = {
        (cell.key, name): found.value - load.value
        for cell in group.cells if (load := cell.estimate("peak_load_bytes"))
        for name, *_ in PHASES if (found := cell.estimate(name))
    }  # fmt: skip
    factor, unit = printed_scale("peak_memory_bytes", max(above.values(), default=0.0))
    for row, cell in enumerate(group.cells):
        values = [above[cell.key, name] / factor for name, *_ in PHASES if (cell.key, name) in above]
        if not values:
            status_text(axes, row, cell, look)
            continue
        axes.hlines([row], [0], [max(values)], color=look.theme.grid, linewidth=2.0, zorder=1.5)
        for name, _, marker, colour in PHASES:
            if (cell.key, name) in above:
                axes.plot([above[cell.key, name] / factor], [row], linestyle="none", marker=marker, markersize=5.5,
                          color=getattr(look.theme, colour), zorder=3,
                          label=artist_name(name, group.cell_label(cell)))  # fmt: skip
    axes.set_title("Peak of each phase")
    axes.set_xlabel(f"{unit} above the weights, lower is better")
    axes.set_xlim(left=0)


def _kv(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    scale = axis_scale(measured(group.cells, *_KV)[0], group.cells)
    for row, cell in enumerate(group.cells):
        found = {name: estimate.value / scale.factor for name in _KV if (estimate := cell.estimate(name))}
        title = group.cell_label(cell)
        if not found:
            status_text(axes, row, cell, look)
        if _KV[0] in found:
            colour = marks[group.series_label(cell)].colour
            axes.barh(row, found[_KV[0]], height=0.55, color=colour, alpha=0.75, zorder=2,
                      label=artist_name(_KV[0], title))  # fmt: skip
        if _KV[2] in found:
            axes.plot([found[_KV[2]]], [row], color=look.theme.ink, marker="|", markersize=11, markeredgewidth=1.5,
                      zorder=4, linestyle="none", label=artist_name(_KV[2], title))  # fmt: skip
    axes.set_title("KV cache")
    axes.set_xlim(left=0)
    axes.set_xlabel(scale.label)


def _keys(figure: Figure, shown: Collection[object], look: Look) -> None:
    theme = look.theme
    keys: list[Line2D | Patch] = []
    if _peak_parts in shown:
        keys += [Patch(facecolor=getattr(theme, colour), hatch=hatch, edgecolor=theme.paper, label=label)
                 for _, label, colour, hatch in (*PARTS, REST)]  # fmt: skip
        keys.append(Line2D([], [], color=theme.ink, marker="|", markersize=10, markeredgewidth=1.8, linestyle="none",
                           label="measured peak"))  # fmt: skip
    if _phases in shown:
        keys += [Line2D([], [], color=getattr(theme, colour), marker=marker, linestyle="none", label=f"peak, {label}")
                 for _, label, marker, colour in PHASES]  # fmt: skip
    if _kv in shown:
        label = "right: KV stored (bar), in theory (tick)"
        keys.append(Line2D([], [], color=theme.ink, marker="|", linestyle="none", label=label))
    columns = {"page": 5, "double": 3, "single": 1}[look.width]
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, handlelength=1.6, columnspacing=1.4)


_RATE, _LARGEST, _RATE_THERE = "throughput_tokens_per_s", "capacity_prompts", "capacity_throughput_tokens_per_s"


def capacity_figure(group: Group, look: Look) -> Figure | None:
    """Draw throughput over batch where it was measured at several, and the largest batches."""
    lines = {label: _points(cells) for label, cells in _lines(group).items()}
    batches = {batch for points in lines.values() for batch, _ in points}
    largest = bool(measured(group.cells, _LARGEST))
    if len(batches) < 2 and not largest:
        return None
    return labelled(lambda legend: _build(group, look, lines, legend, largest))


def _lines(group: Group) -> dict[tuple[str, str], list[CellResult]]:
    found: dict[tuple[str, str], list[CellResult]] = {}
    for cell in group.cells:
        found.setdefault((group.series_label(cell), cell.budget), []).append(cell)
    return found


def batch_size(cell: CellResult) -> int | None:
    """Return how many prompts the speed pass ran together."""
    task: Any = cell.settings.get("task")
    speed: Any = task.get("speed") if isinstance(task, dict) else None
    size = speed.get("batch_size") if isinstance(speed, dict) else None
    return size if isinstance(size, int) and size > 0 else None


def _points(cells: list[CellResult]) -> list[tuple[float, Estimate]]:
    """Return (prompts together, throughput) by growing batch."""
    found: list[tuple[float, Estimate]] = []
    for cell in cells:
        rate, size = cell.estimate(_RATE), batch_size(cell)
        if rate and size:
            found.append((float(size), rate))
        there, largest = cell.estimate(_RATE_THERE), cell.estimate(_LARGEST)
        if there and largest:
            found.append((largest.value, there))
    return sorted(found, key=lambda point: (point[0], point[1].value))


def _build(
    group: Group, look: Look, lines: Mapping[tuple[str, str], list[tuple[float, Estimate]]], legend: bool, largest: bool
) -> DirectLabels:
    drawn = {key: points for key, points in lines.items() if points}
    figure, panels = new_figure(look, bool(drawn) + largest, 3.4 if look.width == "page" else 2.6, columns=2)
    labels = DirectLabels(figure=figure, look=look)
    marks = marks_of(group, look.palette)
    if drawn:
        ends = _throughput(panels[0], drawn, marks, look)
        panels[0].set_title(panel_title(_RATE if measured(group.cells, _RATE) else _RATE_THERE, group.cells))
        if not legend:
            labels.right_of(panels[0], ends)
    if largest:
        ends = _largest(panels[-1], group, marks, look)
        if not legend:
            labels.right_of(panels[-1], ends)
    if legend:
        legend_above(figure, [key_line(label, mark, look.theme) for label, mark in marks.items()], look)
    return labels


def _throughput(
    axes: Axes, lines: Mapping[tuple[str, str], list[tuple[float, Estimate]]], marks: Mapping[str, Mark], look: Look
) -> list[Named]:
    axes.set_xscale("log", base=2)
    ends = []
    for (label, budget), points in lines.items():
        mark = marks[label]
        xs, ys = [batch for batch, _ in points], [rate.value for _, rate in points]
        text = label if budget == "-" else f"{label}, {budget.removesuffix(' of seen')}"
        axes.vlines(xs, [rate.bounds[0] for _, rate in points], [rate.bounds[1] for _, rate in points],
                    color=mark.colour, linewidth=1.3, label=artist_name(_RATE, text))  # fmt: skip
        axes.plot(xs, ys, linestyle=mark.line, linewidth=1.4, label=artist_name(_RATE, text),
                  **style_of(mark, look.theme))  # fmt: skip
        ends.append(Named(text=text, x=xs[-1], y=ys[-1], colour=mark.colour))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompts together (batch)")
    axes.set_ylabel("tokens/s, higher is better")
    return ends


def _largest(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> list[Named]:
    """Draw the largest batch of every cell over its budget setting; full as a reference line."""
    budgets = list(group.by_budget)
    axes.set_xlim(-0.5, max(len(budgets), 1) - 0.5)
    ends = []
    for label, cells in group.by_series().items():
        mark = marks[label]
        found = [(cell, size.value) for cell in cells if (size := cell.estimate(_LARGEST))]
        if not found:
            continue
        title = artist_name(_LARGEST, label)
        if cells[0].is_full:
            axes.axhline(found[0][1], color=mark.colour, linestyle=mark.line, linewidth=1.4, label=title)
            ends.append(Named(text=label, x=axes.get_xlim()[1], y=found[0][1], colour=mark.colour))
            continue
        xs, ys = [float(budgets.index(cell.budget)) for cell, _ in found], [size for _, size in found]
        axes.plot(xs, ys, linestyle=mark.line, linewidth=1.2, label=title, **style_of(mark, look.theme))
        ends.append(Named(text=label, x=xs[-1], y=ys[-1], colour=mark.colour))
    axes.set_xticks(range(len(budgets)), [budget.removesuffix(" of seen") for budget in budgets])
    axes.set_ylim(bottom=0)
    axes.set_title("Largest batch that fits")
    axes.set_xlabel("budget")
    axes.set_ylabel("prompts, higher is better")
    return ends


_Draw = Callable[[Axes, Group, Mapping[str, Mark], Look], None]


def latency_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per part of the latency that any cell has; rows are cells."""
    wanted: tuple[tuple[tuple[str, ...], _Draw], ...] = (
        (("ttft_ms",), _ttft),
        (("tpot_ms",), _tpot),
        (("roof_share_fraction",), _roof_share),
        (("tpot_ratio_to_full",), _tpot_ratio),
        (("ttft_ratio_to_full",), _ttft_ratio),
    )
    shown = [(names, draw) for names, draw in wanted if measured(group.cells, *names)]
    if not shown:
        return None
    figure, panels = row_figure(group, look, len(shown))
    marks = marks_of(group, look.palette)
    for axes, (names, draw) in zip(panels, shown, strict=True):
        draw(axes, group, marks, look)
        for row, cell in enumerate(group.cells):
            if not any(cell.estimate(name) for name in names):
                status_text(axes, row, cell, look)
    footnote(figure, group, look)
    _plots_latency_keys(figure, group, look)
    return figure


def _ttft(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _part_bars(axes, group, "settle_ms", marks)
    interval_dots(axes, group, "ttft_ms", 1.0, marks, look)
    axes.set_xlim(left=0)
    axes.set_title(panel_title("ttft_ms", group.cells))
    axes.set_xlabel("ms, lower is better")


def _tpot(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _part_bars(axes, group, "policy_ms", marks)
    interval_dots(axes, group, "tpot_p90_ms", 1.0, marks, look, tick=True, shift=0.3)
    interval_dots(axes, group, "tpot_ms", 1.0, marks, look, shift=-0.08)
    for row, cell in enumerate(group.cells):
        found = cell.estimate("roof_ms")
        if found:
            axes.vlines([found.value], [row - 0.38], [row + 0.38], color=look.theme.ink, linewidth=1.8, zorder=5,
                        label=artist_name("roof_ms", group.cell_label(cell)))  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_title(panel_title("tpot_ms", group.cells))
    axes.set_xlabel("ms, lower is better")


def _roof_share(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    scale = axis_scale("roof_share_fraction", group.cells)
    interval_dots(axes, group, "roof_share_fraction", scale.factor, marks, look)
    axes.set_xlim(left=0)
    axes.set_title(panel_title("roof_share_fraction", group.cells))
    axes.set_xlabel("% of the memory roof")


def _tpot_ratio(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _ratio(axes, group, "tpot_ratio_to_full", marks, look)


def _ttft_ratio(axes: Axes, group: Group, marks: Mapping[str, Mark], look: Look) -> None:
    _ratio(axes, group, "ttft_ratio_to_full", marks, look)


def _ratio(axes: Axes, group: Group, name: str, marks: Mapping[str, Mark], look: Look) -> None:
    interval_dots(axes, group, name, 1.0, marks, look)
    axes.axvline(1.0, color=look.theme.ink, linestyle="--", linewidth=1.0, zorder=2)
    axes.set_title(panel_title(name, group.cells))
    axes.set_xlabel("x full, lower is better")


def _part_bars(axes: Axes, group: Group, name: str, marks: Mapping[str, Mark]) -> None:
    """Draw the part of a time that is the policy's own as a bar from 0."""
    for row, cell in enumerate(group.cells):
        found = cell.estimate(name)
        if found:
            axes.barh(row, found.value, height=0.55, color=marks[group.series_label(cell)].colour, alpha=0.35,
                      zorder=1.5, label=artist_name(name, group.cell_label(cell)))  # fmt: skip


def _plots_latency_keys(figure: Figure, group: Group, look: Look) -> None:
    theme = look.theme
    keys: list[Line2D | Patch] = [
        Line2D([], [], linestyle="none", marker="o", color=theme.muted, label="median, 95 % interval", markersize=6)
    ]
    if measured(group.cells, "tpot_p90_ms"):
        keys.append(Line2D([], [], color=theme.muted, marker="|", markersize=7, markeredgewidth=1.4, linestyle="none",
                           label="TPOT p90"))  # fmt: skip
    if measured(group.cells, "settle_ms", "policy_ms"):
        keys.append(Patch(color=theme.muted, alpha=0.35, label="bar: the policy's own time"))
    if measured(group.cells, "roof_ms"):
        keys.append(Line2D([], [], color=theme.ink, marker="|", markersize=9, markeredgewidth=1.8, linestyle="none",
                           label="memory roof"))  # fmt: skip
    columns = 1 if look.width == "single" else 4 if look.width == "page" else 2
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, handlelength=1.4)
