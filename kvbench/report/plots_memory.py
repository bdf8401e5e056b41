"""Where the bytes are: what the peak is made of, peaks by phase above the weights, and KV nominal against stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kvbench.measures import printed_scale
from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.plots_axes import artist_name, axis_scale, footnote, marks_of, measured
from kvbench.report.plots_policies import Mark
from kvbench.report.plots_rows import row_figure, status_text
from kvbench.report.plots_style import Look

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
