"""The smallest safe budget of every policy, with where the true one may lie, and every budget that was looked at."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from kvbench.measures import measure
from kvbench.report.ability import Ability
from kvbench.report.frontier import Frontier, Search
from kvbench.report.load import Group
from kvbench.report.plots_axes import artist_name, sparse
from kvbench.report.plots_policies import Mark
from kvbench.report.plots_style import Look, listed, new_figure, shortened, style_of

_LOG_FROM = 32.0
_MORE_HELD = 0.01
_LOOKS: dict[str, tuple[str, Any]] = {
    "safe": ("o", "full"),
    "worse": ("x", "full"),
    "undecided": ("o", "none"),
    "failed": ("_", "full"),
}


def frontier_figure(group: Group, look: Look) -> Figure | None:
    """Draw a panel per search file that has this model and data set."""
    ability = Ability(group)
    found = [
        (frontier, searches)
        for frontier in look.frontiers
        if (searches := [search for search in frontier.searches if _is_of(search, group)])
        and (not look.measures or frontier.measure in look.measures)
        and not ability.reason(frontier.measure)
    ]
    if not found:
        return None
    rows = max(len(searches) for _, searches in found)
    figure, panels = new_figure(look, len(found), 1.2 + 0.045 * look.font_points * max(rows, 2), columns=1)
    for axes, (frontier, searches) in zip(panels, found, strict=True):
        _panel(axes, frontier, searches, look)
    _keys(figure, look)
    return figure


def _is_of(search: Search, group: Group) -> bool:
    """Tell whether a search is of the group, by its cells: groups add settings to names that several of them share."""
    keys = {search.full_key, *(one.key for one in search.looks)}
    return any(cell.key in keys for cell in group.cells)


def _panel(axes: Axes, frontier: Frontier, searches: list[Search], look: Look) -> None:
    factor = 100.0 if frontier.budget_setting == "fraction" else 1.0
    axes.set_ylim(len(searches) - 0.5, -0.5)
    several = len({search.policy for search in searches}) < len(searches)
    names = [shortened(f"{one.policy} ({one.positions})" if several else one.policy) for one in searches]
    axes.set_yticks(range(len(searches)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    for row, search in enumerate(searches):
        mark = look.palette.mark(search.policy, search.positions)
        _looks(axes, row, search, factor, look)
        _answer(axes, row, search, mark, frontier, factor, look)
    rungs = [rung * factor for rung in frontier.ladder]
    is_log = rungs[-1] / rungs[0] >= _LOG_FROM
    if is_log:
        axes.set_xscale("log")
    axes.set_xlim(*((rungs[0] / 1.2, rungs[-1] * 2) if is_log else (rungs[0] - 0.04 * rungs[-1], 1.17 * rungs[-1])))
    axes.xaxis.set_major_locator(FixedLocator(rungs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels(
        sparse([(rung, f"{rung:g}") for rung in rungs], is_log, 0.1 if look.width == "single" else 0.045)
    )
    axes.set_xlabel(f"budget ({'% of tokens' if factor > 1 else 'entries per layer and KV head'}), smaller is better")
    unit = {"ppl": " nats/token"}.get(measure(frontier.measure).unit, "")
    counts = {one.num_samples for search in searches for one in search.looks if one.num_samples}
    n_text = f" (n = {listed(map(str, sorted(counts)))})" if counts else ""
    axes.set_title(f"{measure(frontier.measure).label} at most {frontier.margin:g}{unit} worse than full{n_text}")


def _looks(axes: Axes, row: int, search: Search, factor: float, look: Look) -> None:
    for outcome, (marker, fill) in _LOOKS.items():
        places = [one.budget * factor for one in search.looks if one.outcome == outcome]
        if places:
            axes.plot(places, [row + 0.27] * len(places), linestyle="none", marker=marker, markersize=4,
                      fillstyle=fill, color=look.theme.muted, zorder=3,
                      label=artist_name(outcome, search.policy))  # fmt: skip


def _answer(axes: Axes, row: int, search: Search, mark: Mark, frontier: Frontier, factor: float, look: Look) -> None:
    """Draw the smallest safe budget and from where on the true one may lie; text where it lies above the ladder."""
    top = max(frontier.ladder)
    end = top if search.smallest_safe is None else search.smallest_safe
    title = artist_name("smallest_safe", search.policy)
    if search.budget_low is not None:
        axes.hlines([row - 0.05], [search.budget_low * factor], [end * factor], color=mark.colour, linewidth=3.0,
                    alpha=0.6, zorder=2, label=title)  # fmt: skip
    if search.smallest_safe is not None:
        axes.plot([end * factor], [row - 0.05], linestyle="none", zorder=4, label=title,
                  **style_of(mark, look.theme, size=8))  # fmt: skip
    axes.annotate(_words(search, top, factor), (end * factor, row - 0.05), xytext=(8, 0), textcoords="offset points",
                  va="center", fontsize=look.small_points, zorder=6)  # fmt: skip


def _words(search: Search, top: float, factor: float) -> str:
    """Return the answer in words: the budget, what is really held where that is clearly more, and what was odd."""
    unit = " %" if factor > 1 else ""
    found, seen = search.smallest_safe, search.look
    text = f"above {top * factor:g}{unit}" if found is None else f"{found * factor:g}{unit}"
    held = seen.realised_budget if seen is not None and factor > 1 else None
    if held is not None and found is not None and held >= found + _MORE_HELD:
        text += f" (holds {held * factor:.0f} %)"
    return f"{text}, not monotone" if search.status == "not monotone" else text


def _keys(figure: Figure, look: Look) -> None:
    theme = look.theme
    keys = [Line2D([], [], color=theme.muted, linewidth=3.0, alpha=0.6, label="where the true one may lie")]
    keys += [
        Line2D([], [], color=theme.muted, marker=marker, fillstyle=fill, linestyle="none", markersize=4,
               label=f"looked at: {outcome}") for outcome, (marker, fill) in _LOOKS.items()
    ]  # fmt: skip
    columns = {"page": 5, "double": 3, "single": 1}[look.width]
    figure.legend(handles=keys, loc="outside upper left", ncols=columns, handlelength=1.5, columnspacing=1.2)
