"""The page's negative samples: which items collapse under which policy, at every budget, with links to the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvbench.measures import format_value, measure
from kvbench.report.cell import CellResult
from kvbench.report.collapses import Loss, losses_of, rule_text
from kvbench.report.judged import Judged
from kvbench.report.natural import natural_key
from kvbench.report.page_markup import Head, escaped, number_cell, prose, row_head, table, text_cell
from kvbench.report.page_sample_links import sample_link, short_name
from kvbench.report.standing import asked_budget

_MOST_ROWS = 32
_MOST_ROWS_OF_MANY, _MANY_CELLS = 8, 60
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
        for cells in judged.group.by_budget.values()
    ]
    drawn = "".join(part for part in parts if part)
    return f"<p>{prose(rule_text(judged.primary))} Every sample links to the answers.</p>{drawn}" if drawn else ""


def _budget(judged: Judged, cells: Sequence[CellResult], name: str) -> str:
    items = _items(judged, cells, name)
    if not items:
        return ""
    many = len(judged.group.cells) > _MANY_CELLS
    shown = items[: _MOST_ROWS_OF_MANY if many else _MOST_ROWS]
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
    return sorted(items, key=lambda item: (-item.num_collapsed, -item.mean_loss, natural_key(item.sample)))


def _counts(judged: Judged, items: Sequence[_Item], cells: Sequence[CellResult]) -> str:
    """Say how many samples each policy loses, of those that it has; the number once where it is the same for all."""
    losses = {cell.key: [item.losses[cell.key] for item in items if cell.key in item.losses] for cell in cells}
    nums = {len(found) for found in losses.values()}
    parts = []
    for cell in cells:
        found, name = losses[cell.key], f"`{judged.group.series_label(cell)}`"
        of = "" if len(nums) == 1 else f" of {len(found)}"
        count = sum(loss.collapsed for loss in found)
        parts.append(f"{name} collapses on {count}{of}" if found else f"{name} has no scores")
    return prose(", ".join(parts) + (f" of {len(items)} samples" if len(nums) == 1 else ""))


def _everywhere(judged: Judged, items: Sequence[_Item], cells: Sequence[CellResult]) -> str:
    """Say which samples collapse under every policy that has them, two at least."""
    shared = [item for item in items if len(item.losses) > 1]
    every = [item for item in shared if item.num_collapsed == len(item.losses)]
    none = sum(item.num_collapsed == 0 for item in items)
    if not shared:
        return ""
    nums = {len(item.losses) for item in items}
    policies = f"all {len(cells)} policies" if nums == {len(cells)} else "every policy that has them"
    links = ", ".join(sample_link(judged.group, _first_with(item, cells), item.sample) for item in every[:_MOST_LINKS])
    more = f" and {len(every) - _MOST_LINKS} more" if len(every) > _MOST_LINKS else ""
    under_all = (
        f"{len(every)} collapse under {policies} ({links}{more})"
        if every
        else f"no sample collapses under {policies.replace('them', 'it')}"
    )
    rest = f"{none} of {len(items)} under none" if none else "every sample collapses under at least one"
    return f"<p>{under_all[0].upper()}{under_all[1:]}; {rest}.</p>"


def _first_with(item: _Item, cells: Sequence[CellResult]) -> CellResult:
    return next(cell for cell in cells if cell.key in item.losses)


def _row(judged: Judged, item: _Item, cells: Sequence[CellResult], name: str) -> Iterator[str]:
    yield row_head(short_name(judged.group, item.sample))
    of = "" if len(item.losses) == len(cells) else f" of {len(item.losses)}"
    yield number_cell(f"{item.num_collapsed}{of}", value=item.num_collapsed)
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
