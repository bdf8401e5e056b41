"""What a cache costs: where the time goes, where the bytes are, and what eviction buys when memory is the limit.

`latency_figure` and `memory_figure` have a row per cell, `capacity_figure` lines over the prompts that run together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from kvbench.measures import measure, printed_scale
from kvbench.report.compare import timing_noise
from kvbench.report.figures.labels import DirectLabels, Named, labelled
from kvbench.report.figures.style import (
    Look,
    Mark,
    artist_name,
    axis_scale,
    fitting,
    footnote,
    interval_dots,
    keys_above,
    legend_above,
    marks_of,
    measured,
    narrowed,
    new_figure,
    panel_title,
    row_figure,
    row_inches,
    status_text,
    style_of,
)
from kvbench.report.load import CellResult, Estimate, Group

_Marks = Mapping[str, Mark]
_LATENCIES = ("ttft_ms", "tpot_ms", "roof_share_fraction", "tpot_ratio_to_full", "ttft_ratio_to_full")
_POLICY_PART = {"ttft_ms": "settle_ms", "tpot_ms": "policy_ms"}
_LATENCY_AXES = {
    "ms": "ms, lower is better",
    "fraction": "MBU (%), higher is better",
    "ratio": "x full, lower is better",
}


def latency_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per part of the latency that any cell has; rows are cells."""
    group = narrowed(group, look)
    names = measured(group.cells, *_LATENCIES)
    if not names:
        return None
    if look.width == "single":  # the step first: it is what most of an answer's time is
        names.sort(key=lambda name: not name.startswith("tpot"))
    shown = fitting(look, names, row_inches(group, look))
    figure, panels = row_figure(group, look, len(shown))
    marks = marks_of(group, look.palette)
    for axes, name in zip(panels, shown, strict=True):
        _latency_panel(axes, group, name, marks, look)
        for row, cell in enumerate(group.cells):
            if not cell.estimate(name):
                status_text(axes, row, cell, look)
    footnote(figure, group, look)
    theme = look.theme
    dot = Line2D([], [], linestyle="none", marker="o", color=theme.muted, label="median, 95 % interval", markersize=6)
    keys: list[Line2D | Patch] = [dot]
    if measured(group.cells, "tpot_p90_ms"):
        keys.append(_tick_key("TPOT p90", theme.muted, markersize=7, markeredgewidth=1.4))
    if measured(group.cells, *_POLICY_PART.values()):
        keys.append(Patch(color=theme.muted, alpha=0.35, label="bar: the policy's own time"))
    if measured(group.cells, "roof_ms"):
        keys.append(_tick_key("memory roof", theme.ink, markersize=9, markeredgewidth=1.8))
    if any(timing_noise(cell, name) for cell in group.cells for name in shown):
        keys.append(Line2D([], [], linestyle="none", marker="o", color=theme.muted, alpha=0.35, label="pale: noisy"))
    keys_above(figure, keys, look, {"page": 5, "double": 3, "single": 2}, handlelength=1.4)
    return figure


def _latency_panel(axes: Axes, group: Group, name: str, marks: _Marks, look: Look) -> None:
    """Draw a time with the policy's own part of it as a bar from 0, a share of the roof, or a ratio to full."""
    for cell, row, label in _rows(group):
        if name in _POLICY_PART and (found := cell.estimate(_POLICY_PART[name])):
            axes.barh(row, found.value, height=0.55, color=marks[group.series_label(cell)].colour, alpha=0.35,
                      zorder=1.5, label=artist_name(_POLICY_PART[name], label))  # fmt: skip
    if name == "tpot_ms":
        interval_dots(axes, group, "tpot_p90_ms", 1.0, marks, look, tick=True, shift=0.3)
    factor = axis_scale(name, group.cells).factor
    interval_dots(axes, group, name, factor, marks, look, shift=-0.08 if name == "tpot_ms" else 0.0)
    for cell, row, label in _rows(group):
        if name == "tpot_ms" and (found := cell.estimate("roof_ms")):
            axes.vlines([found.value], [row - 0.38], [row + 0.38], color=look.theme.ink, linewidth=1.8, zorder=5,
                        label=artist_name("roof_ms", label))  # fmt: skip
    if measure(name).unit == "ratio":
        axes.axvline(1.0, color=look.theme.ink, linestyle="--", linewidth=1.0, zorder=2)
    else:
        axes.set_xlim(left=0)
    axes.set_title(panel_title(name, group.cells))
    axes.set_xlabel(_LATENCY_AXES[measure(name).unit])


def _rows(group: Group) -> list[tuple[CellResult, int, str]]:
    return [(cell, row, group.cell_label(cell)) for row, cell in enumerate(group.cells)]


def _tick_key(label: str, colour: str, **style: Any) -> Line2D:
    return Line2D([], [], color=colour, marker="|", linestyle="none", label=label, **style)


_PARTS = (
    ("peak_load_bytes", "weights", "grid", ""),
    ("plain_activation_bytes", "activations and vision", "grid", "////"),
    ("kv_stored_bytes", "KV stored", "ink", ""),
)  # greys, since every colour is a policy's
_REST = ("rest", "statistics and all else", "muted", "\\\\\\\\")
_PHASES = (
    ("peak_vision_bytes", "vision", "$V$", "muted"),
    ("peak_prefill_bytes", "prefill", "$P$", "ink"),
    ("peak_settle_bytes", "compression", "$C$", "muted"),
    ("peak_decode_bytes", "decode", "$D$", "ink"),
)
_KV = ("kv_stored_bytes", "kv_valid_bytes", "kv_theoretical_bytes")


def memory_figure(group: Group, look: Look) -> Figure | None:
    """Draw the panels whose numbers any cell has."""
    group = narrowed(group, look)
    has_load = bool(measured(group.cells, "peak_load_bytes"))
    wanted: tuple[tuple[object, Callable[[Axes, Group, _Marks, Look], None]], ...] = (
        (has_load and measured(group.cells, "peak_memory_bytes"), _peak_parts),
        (has_load and measured(group.cells, *(name for name, *_ in _PHASES)), _phases),
        (measured(group.cells, *_KV), _kv),
    )
    shown = list(fitting(look, [draw for names, draw in wanted if names], row_inches(group, look)))
    if not shown:
        return None
    figure, panels = row_figure(group, look, len(shown))
    marks = marks_of(group, look.palette)
    for axes, draw in zip(panels, shown, strict=True):
        draw(axes, group, marks, look)
        axes.set_xlim(left=0)
    footnote(figure, group, look, "bytes are observed once (n = 1)")
    theme = look.theme
    keys: list[Line2D | Patch] = []
    if _peak_parts in shown:
        keys += [Patch(facecolor=getattr(theme, colour), hatch=hatch, edgecolor=theme.paper, label=label)
                 for _, label, colour, hatch in (*_PARTS, _REST)]  # fmt: skip
        keys.append(_tick_key("measured peak", theme.ink, markersize=10, markeredgewidth=1.8))
    if _phases in shown:
        keys += [Line2D([], [], color=getattr(theme, colour), marker=marker, linestyle="none", label=f"peak, {label}",
                        markeredgewidth=0.1)
                 for _, label, marker, colour in _PHASES]  # fmt: skip
    if _kv in shown:
        keys.append(_tick_key("right: KV stored (bar), in theory (tick)", theme.ink))
    keys_above(figure, keys, look, {"page": 5, "double": 3, "single": 2}, handlelength=1.6, columnspacing=1.4)
    return figure


def _peak_parts(axes: Axes, group: Group, marks: _Marks, look: Look) -> None:
    """Draw what a peak is made of; without a peak and weights there are no parts.

    Activations are those of the model without a cache, KV is what is stored at the end. They need not be alive
    at the peak, so the parts may be more than the peak, and the rest is then 0.
    """
    scale = axis_scale("peak_memory_bytes", group.cells)
    for cell, row, label in _rows(group):
        peak = cell.estimate("peak_memory_bytes")
        if peak is None or cell.estimate("peak_load_bytes") is None:
            status_text(axes, row, cell, look)
            continue
        parts = {name: found.value for name, *_ in _PARTS if (found := cell.estimate(name))}
        parts |= {"rest": max(0.0, peak.value - sum(parts.values()))}
        left = 0.0
        for name, _, colour, hatch in (*_PARTS, _REST):
            width = parts.get(name, 0.0) / scale.factor
            axes.barh(row, width, left=left, height=0.6, color=getattr(look.theme, colour), hatch=hatch, zorder=2,
                      edgecolor=look.theme.paper, linewidth=0.5, label=artist_name(name, label))  # fmt: skip
            left += width
        axes.vlines([peak.value / scale.factor], [row - 0.42], [row + 0.42], color=look.theme.ink, linewidth=1.8,
                    zorder=5, label=artist_name("peak_memory_bytes", label))  # fmt: skip
    axes.set_title("Parts of the peak")
    axes.set_xlabel(scale.label)


def _phases(axes: Axes, group: Group, marks: _Marks, look: Look) -> None:
    """Draw how far each phase's peak is above the weights, which are in all of them."""
    above = {
        (cell.key, name): found.value - load.value
        for cell in group.cells if (load := cell.estimate("peak_load_bytes"))
        for name, *_ in _PHASES if (found := cell.estimate(name))
    }  # fmt: skip
    factor, unit = printed_scale("peak_memory_bytes", max(above.values(), default=0.0))
    for cell, row, label in _rows(group):
        peaks = {phase: above[cell.key, phase[0]] / factor for phase in _PHASES if (cell.key, phase[0]) in above}
        if not peaks:
            status_text(axes, row, cell, look)
            continue
        axes.hlines([row], [0], [max(peaks.values())], color=look.theme.grid, linewidth=2.0, zorder=1.5)
        for (name, _, marker, colour), value in peaks.items():
            axes.plot([value], [row], linestyle="none", marker=marker, markersize=6.5, markeredgewidth=0.1,
                      color=getattr(look.theme, colour), zorder=3, label=artist_name(name, label))  # fmt: skip
    axes.set_title("Peak of each phase")
    axes.set_xlabel(f"{unit} above the weights, lower is better")


def _kv(axes: Axes, group: Group, marks: _Marks, look: Look) -> None:
    scale = axis_scale(measured(group.cells, *_KV)[0], group.cells)
    stored, _, theory = _KV
    for cell, row, label in _rows(group):
        found = {name: estimate.value / scale.factor for name in _KV if (estimate := cell.estimate(name))}
        if not found:
            status_text(axes, row, cell, look)
        if stored in found:
            colour = marks[group.series_label(cell)].colour
            axes.barh(row, found[stored], height=0.55, color=colour, alpha=0.75, zorder=2,
                      label=artist_name(stored, label))  # fmt: skip
        if theory in found:
            axes.plot([found[theory]], [row], color=look.theme.ink, marker="|", markersize=11, markeredgewidth=1.5,
                      zorder=4, linestyle="none", label=artist_name(theory, label))  # fmt: skip
    axes.set_title("KV cache")
    axes.set_xlabel(scale.label)


RATE, _LARGEST, _RATE_THERE = "throughput_tokens_per_s", "capacity_prompts", "capacity_throughput_tokens_per_s"
_Lines = Mapping[tuple[str, str], list[tuple[float, Estimate]]]


def capacity_figure(group: Group, look: Look) -> Figure | None:
    """Draw throughput over batch where it was measured at several, and the largest batches."""
    found: dict[tuple[str, str], list[tuple[float, Estimate]]] = {}
    for cell in group.cells:
        found.setdefault((group.series_label(cell), cell.budget), []).extend(rates_of(cell))
    lines = {key: sorted(rates, key=lambda one: (one[0], one[1].value)) for key, rates in found.items() if rates}
    batches = {batch for rates in lines.values() for batch, _ in rates}
    largest = bool(measured(group.cells, _LARGEST))
    if len(batches) < 2 and not largest:
        return None
    return labelled(lambda legend: _capacity(group, look, lines, legend, largest))


def rates_of(cell: CellResult) -> list[tuple[float, Estimate]]:
    """Return (prompts together, throughput): of the speed pass at its batch size, and at the largest batch."""
    task: Any = cell.settings.get("task")
    speed: Any = task.get("speed") if isinstance(task, dict) else None
    size = speed.get("batch_size") if isinstance(speed, dict) else None
    found: list[tuple[float, Estimate]] = []
    if (rate := cell.estimate(RATE)) and isinstance(size, int) and size > 0:
        found.append((float(size), rate))
    if (rate := cell.estimate(_RATE_THERE)) and (most := cell.estimate(_LARGEST)):
        found.append((most.value, rate))
    return found


def _capacity(group: Group, look: Look, lines: _Lines, legend: bool, largest: bool) -> DirectLabels:
    figure, panels = new_figure(
        look, bool(lines) + largest, {"page": 3.4, "double": 2.6, "single": 1.9}[look.width], columns=2
    )
    labels = DirectLabels(figure=figure, look=look)
    marks = marks_of(group, look.palette)
    if lines:
        ends = _throughput(panels[0], lines, marks, look)
        panels[0].set_title(panel_title(RATE if measured(group.cells, RATE) else _RATE_THERE, group.cells))
        if not legend:
            labels.right_of(panels[0], ends)
    if largest:
        ends = _largest(panels[-1], group, marks, look)
        if not legend:
            labels.right_of(panels[-1], ends)
    if legend:
        legend_above(figure, marks, look)
    return labels


def _throughput(axes: Axes, lines: _Lines, marks: _Marks, look: Look) -> list[Named]:
    axes.set_xscale("log", base=2)
    ends = []
    for (label, budget), points in lines.items():
        mark = marks[label]
        xs, ys = [batch for batch, _ in points], [rate.value for _, rate in points]
        text = label if budget == "-" else f"{label}, {budget.removesuffix(' tokens kept')}"
        axes.vlines(xs, [rate.bounds[0] for _, rate in points], [rate.bounds[1] for _, rate in points],
                    color=mark.colour, linewidth=1.3, label=artist_name(RATE, text))  # fmt: skip
        axes.plot(xs, ys, linestyle=mark.line, linewidth=1.4, label=artist_name(RATE, text),
                  **style_of(mark, look.theme))  # fmt: skip
        ends.append(Named(text=text, x=xs[-1], y=ys[-1], colour=mark.colour))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("prompts together (batch)")
    axes.set_ylabel("tokens/s, higher is better")
    return ends


def _largest(axes: Axes, group: Group, marks: _Marks, look: Look) -> list[Named]:
    """Draw the largest batch of every cell over its budget setting; full as a reference line."""
    budgets = list(group.by_budget)
    axes.set_xlim(-0.5, max(len(budgets), 1) - 0.5)
    ends = []
    for label, cells in group.by_series().items():
        mark, title = marks[label], artist_name(_LARGEST, label)
        found = [(cell, size.value) for cell in cells if (size := cell.estimate(_LARGEST))]
        if not found:
            continue
        if cells[0].is_full:
            x, y = axes.get_xlim()[1], found[0][1]
            axes.axhline(y, color=mark.colour, linestyle=mark.line, linewidth=1.4, label=title)
        else:
            xs, ys = [float(budgets.index(cell.budget)) for cell, _ in found], [size for _, size in found]
            axes.plot(xs, ys, linestyle=mark.line, linewidth=1.2, label=title, **style_of(mark, look.theme))
            x, y = xs[-1], ys[-1]
        ends.append(Named(text=label, x=x, y=y, colour=mark.colour))
    axes.set_xticks(range(len(budgets)), [budget.removesuffix(" tokens kept") for budget in budgets])
    axes.set_ylim(bottom=0)
    axes.set_title("Largest batch that fits")
    axes.set_xlabel("budget")
    axes.set_ylabel("prompts, higher is better")
    return ends
