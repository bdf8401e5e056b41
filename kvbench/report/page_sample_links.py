"""Links from a number to the answer behind it, which the sample browser opens."""

from __future__ import annotations

from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.page_markup import escaped


def sample_link(group: Group, cell: CellResult, sample: str, text: str = "") -> str:
    """Return a link that shows this sample of this cell; without a script it leads to the samples."""
    label = text or short_name(group, sample)
    place = f'data-group="{escaped(group.title)}" data-cell="{escaped(group.cell_label(cell))}"'
    return f'<a href="#samples" {place} data-sample="{escaped(sample)}">{escaped(label)}</a>'


def short_name(group: Group, sample: str) -> str:
    """Return the id without what all ids of the group begin with, up to a slash."""
    first = next((str(one.get("id")) for cell in group.cells for one in cell.samples), "")
    prefix = first.rpartition("/")[0] + "/"
    return sample.removeprefix(prefix) if len(prefix) > 1 and sample.startswith(prefix) else sample
