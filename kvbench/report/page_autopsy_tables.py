"""The autopsy in numbers: what every policy kept, in a table and in words, and how much any two keep alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvbench.report.autopsy_load import Autopsy
from kvbench.report.autopsy_numbers import chance_overlap, kept, overlap, percent, sentence
from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.page_autopsy_data import Pairs
from kvbench.report.page_markup import Head, escaped, number_cell, prose, row_head, table, text_cell


def numbers_html(group: Group, pairs: Pairs) -> str:
    """Return the table of what was kept, the same in words, and overlaps; "" where there is only the full cache."""
    budgeted = [(cell, autopsy) for cell, autopsy in pairs if not cell.is_full]
    if not budgeted:
        return ""
    parts = [_table(group, budgeted), _sentences(group, budgeted)]
    by_budget: dict[str, list[tuple[CellResult, Autopsy]]] = {}
    for cell, autopsy in sorted(budgeted, key=lambda pair: pair[0].budget_order):
        by_budget.setdefault(cell.budget, []).append((cell, autopsy))
    several = {budget: some for budget, some in by_budget.items() if len(some) > 1}
    tables = "".join(_overlaps(group, some, budget) for budget, some in several.items())
    overlaps = f"<details><summary>How much policies keep the same tokens</summary>{tables}</details>" if tables else ""
    left = sorted({text for _, autopsy in pairs for text in autopsy.left_out})
    out = f"<p class=quiet>Left out: {escaped('; '.join(left[:5]))}.</p>" if left else ""
    return "".join([*parts, overlaps, out])


def _table(group: Group, pairs: Pairs) -> str:
    nums = sorted({len(autopsy.samples) for _, autopsy in pairs})
    what = f"{nums[0]} to {nums[-1]} samples" if len(nums) > 1 else "1 sample" if nums == [1] else f"{nums[0]} samples"
    heads = [
        Head(label="policy", kind="text"),
        Head(label="budget", kind="amount"),
        Head(label="after the prompt", group="image patches kept"),
        Head(label="at the end", group="image patches kept"),
        Head(label="after the prompt", group="prompt text kept"),
        Head(label="at the end", group="prompt text kept"),
        Head(label="after the prompt", group="attention held"),
        Head(label="at the end", group="attention held"),
        Head(label="after the prompt", group="merged, in a held entry"),
        Head(label="at the end", group="merged, in a held entry"),
        Head(label="mean age", note="tokens, at the end", group=""),
        Head(label="answer tokens", note="at the end", group=""),
    ]
    rows = (f"<tr>{''.join(_cells(group, cell, autopsy, several=len(nums) > 1))}</tr>" for cell, autopsy in pairs)
    caption = f"What was kept of the prompt, mean over {what}, layers and KV heads; small: lowest and highest layer"
    return table(caption, heads, rows, classes="ap-kept")


def _cells(group: Group, cell: CellResult, autopsy: Autopsy, *, several: bool) -> Iterator[str]:
    found = kept(autopsy.samples)
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    yield row_head(group.series_label(cell), f"n = {len(autopsy.samples)}" if several else "")
    yield text_cell(cell.budget, sort=size)
    for shares, by_layer in (
        (found.image, found.image_by_layer),
        (found.text, None),
        (found.attention, found.attention_by_layer),
        (found.merged, None),
    ):
        for index in (0, 1):
            low, high = (percent(share) for share in by_layer or (0.0, 0.0))
            spread = f"{low} to {high}" if low != high and not index else ""
            value = None if shares is None else shares[index]
            yield number_cell("-" if value is None else f"{100 * value:.0f} %", spread, value=value)
    yield number_cell(f"{found.mean_age_tokens:.0f}", value=found.mean_age_tokens)
    fewest, most = found.steps
    yield number_cell(str(fewest) if fewest == most else f"{fewest} to {most}", value=(fewest + most) / 2)


def _sentences(group: Group, pairs: Pairs) -> str:
    items = "".join(
        f"<li><b>{escaped(group.cell_label(cell))}</b>: {prose(sentence(autopsy.samples))}</li>"
        for cell, autopsy in pairs
    )
    return f"<details><summary>The same in words</summary><ul>{items}</ul></details>"


def _overlaps(group: Group, pairs: Sequence[tuple[CellResult, Autopsy]], budget: str) -> str:
    names = [group.series_label(cell) for cell, _ in pairs]
    rows = []
    for cell, one in pairs:
        cells = [row_head(group.series_label(cell))]
        for other_cell, other in pairs:
            share = 1.0 if cell is other_cell else overlap(one.samples, other.samples)
            chance = f"blind {chance_overlap(one.samples, other.samples):.2f}" if cell is not other_cell else ""
            cells.append(number_cell("-" if share is None else f"{share:.2f}", chance, value=share))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = [Head(label="policy", kind="text"), *(Head(label=name) for name in names)]
    caption = (
        f"At {budget}: tokens that both hold after the prompt over those that either holds (Jaccard), mean over "
        "layers, KV heads and samples; small: two blind choices of the same sizes"
    )
    return table(caption, heads, rows)
