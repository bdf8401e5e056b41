"""The page's negative samples: which items collapse under which policy, at every budget, with links to the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvbench.report.cell import CellResult
from kvbench.report.collapses import Loss, losses_of, rule_text
from kvbench.report.judged import Judged
from kvbench.report.page_markup import Head, escaped, number_cell, prose, row_head, table, text_cell
from kvbench.report.page_sample_links import sample_link, short_name
from kvbench.report.standing import asked_budget, budgets_in
from kvbench.units import format_value, measure

MOST_ROWS = 32
_MOST_LINKS = 8
_COLLAPSED = "\u2715"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Item:
    """One sample at one budget, under every policy that has it."""

    sample: str
    losses: Mapping[str, Loss]

    @property
    def num_collapsed(self) -> int:
        return sum(loss.collapsed for loss in self.losses.values())

    @property
    def mean_loss(self) -> float:
        return sum(loss.loss for loss in self.losses.values()) / len(self.losses)


def failures_html(judged: Judged) -> str:
    """Return a part per budget, or "" where samples carry no score."""
    if judged.primary is None:
        return ""
    parts = [
        _budget(judged, [cell for cell in cells if not cell.failed], judged.primary)
        for cells in budgets_in(judged).values()
    ]
    drawn = "".join(part for part in parts if part)
    return f"<p>{prose(rule_text(judged.primary))} Every sample links to the answers.</p>{drawn}" if drawn else ""


def _budget(judged: Judged, cells: Sequence[CellResult], name: str) -> str:
    items = _items(judged, cells, name)
    if not items:
        return ""
    shown = items[:MOST_ROWS]
    cut = f", the {len(shown)} of {len(items)} that lose most" if len(shown) < len(items) else ""
    caption = f"{measure(name).label} of every sample at {cells[0].budget}{cut}; {_COLLAPSED} marks a collapse"
    heads = [
        Head(label="sample", kind="text"),
        Head(label="collapses under", note=f"of {len(cells)}"),
        Head(label="full"),
        *(Head(label=judged.group.series_label(cell)) for cell in cells),
    ]
    rows = (f"<tr>{''.join(_row(judged, item, cells, name))}</tr>" for item in shown)
    is_open = " open" if cells[0].budget == asked_budget(judged) else ""
    return (
        f"<details{is_open}><summary>At {escaped(cells[0].budget)}: {_counts(judged, items, cells)}</summary>"
        f"{_everywhere(judged, items, cells)}{table(caption, heads, rows, classes='losses')}</details>"
    )


def _items(judged: Judged, cells: Sequence[CellResult], name: str) -> list[_Item]:
    by_sample: dict[str, dict[str, Loss]] = {}
    for cell in cells:
        for loss in losses_of(judged.group, cell, name):
            by_sample.setdefault(loss.sample, {})[cell.key] = loss
    items = [_Item(sample=sample, losses=losses) for sample, losses in by_sample.items()]
    return sorted(items, key=lambda item: (-item.num_collapsed, -item.mean_loss, item.sample))


def _counts(judged: Judged, items: Sequence[_Item], cells: Sequence[CellResult]) -> str:
    counted = (
        (sum(cell.key in item.losses and item.losses[cell.key].collapsed for item in items), cell) for cell in cells
    )
    parts = [f"`{judged.group.series_label(cell)}` collapses on {count}" for count, cell in counted]
    return prose(f"{', '.join(parts)} of {len(items)} samples")


def _everywhere(judged: Judged, items: Sequence[_Item], cells: Sequence[CellResult]) -> str:
    every = [item for item in items if item.num_collapsed == len(cells)]
    none = sum(item.num_collapsed == 0 for item in items)
    if len(cells) < 2:
        return ""
    links = ", ".join(sample_link(judged.group, cells[0], item.sample) for item in every[:_MOST_LINKS])
    more = f" and {len(every) - _MOST_LINKS} more" if len(every) > _MOST_LINKS else ""
    under_all = (
        f"{len(every)} collapse under all {len(cells)} policies ({links}{more})"
        if every
        else (f"no sample collapses under all {len(cells)} policies")
    )
    rest = f"{none} of {len(items)} under none" if none else "every sample collapses under at least one"
    return f"<p>{under_all[0].upper()}{under_all[1:]}; {rest}.</p>"


def _row(judged: Judged, item: _Item, cells: Sequence[CellResult], name: str) -> Iterator[str]:
    yield row_head(short_name(judged.group, item.sample))
    yield number_cell(str(item.num_collapsed), value=item.num_collapsed)
    full = next(iter(item.losses.values())).full
    yield number_cell(_score(name, full), value=full)
    for cell in cells:
        loss = item.losses.get(cell.key)
        yield text_cell("-", sort="", kind="") if loss is None else _scored(judged, cell, loss, name)


def _scored(judged: Judged, cell: CellResult, loss: Loss, name: str) -> str:
    link = sample_link(judged.group, cell, loss.sample, _score(name, loss.score))
    mark = f" <span class=mark>{_COLLAPSED}</span>" if loss.collapsed else ""
    kind = " class=collapsed" if loss.collapsed else ""
    return f'<td{kind} data-v="{loss.score!r}">{link}{mark}</td>'


def _score(name: str, score: float) -> str:
    return f"{score:.3f}" if name == "ppl" else format_value(name, score)
