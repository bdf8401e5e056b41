"""Links from a number to the answer behind it, which the sample browser opens; and which answers a page links to."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from kvbench.report.cell import CellResult
from kvbench.report.load import Group
from kvbench.report.page_markup import escaped

_LINK = re.compile(r'<a href="#samples" data-group="([^"]*)" data-cell="([^"]*)" data-sample="([^"]*)">')


def sample_link(group: Group, cell: CellResult, sample: str, text: str = "") -> str:
    """Return a link that shows this sample of this cell; without a script it leads to the samples."""
    label = text or short_name(group, sample)
    place = f'data-group="{escaped(group.title)}" data-cell="{escaped(group.cell_label(cell))}"'
    return f'<a href="#samples" {place} data-sample="{escaped(sample)}">{escaped(label)}</a>'


def linked_samples(page: str) -> Mapping[tuple[str, str], frozenset[str]]:
    """Return the samples that parts of a page link to, by the title of their group and the label of their cell."""
    found: dict[tuple[str, str], set[str]] = {}
    for link in _LINK.finditer(page):
        title, label, sample = map(html.unescape, link.groups())
        found.setdefault((title, label), set()).add(sample)
    return {place: frozenset(samples) for place, samples in found.items()}


def short_name(group: Group, sample: str) -> str:
    """Return the id without what all ids of the group begin with, up to a slash."""
    first = next((str(one.get("id")) for cell in group.cells for one in cell.samples), "")
    prefix = first.rpartition("/")[0] + "/"
    return sample.removeprefix(prefix) if len(prefix) > 1 and sample.startswith(prefix) else sample
