"""R3: no sample is left out silently: expected = scored + left out, in every row of every task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.measures import MAX_TURNS

_FIELDS = {
    "Perplexity": ("nll_sum", "num_scored_tokens"),
    "PerplexityReleased": ("released_nll_sum", "released_num_scored_tokens"),
    "Generation": ("text", "full_text", "num_new_tokens"),
    "Fidelity": ("kl_sum", "num_agreeing_tokens", "num_compared_tokens"),
    "MultiTurn": (),  # as many as the conversation has turns
}


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    twice = [name for name, count in Counter(str(row.get("id")) for row in cell.samples).items() if count > 1]
    if twice:
        yield f"the sample {twice[0]} is there {Counter(str(r.get('id')) for r in cell.samples)[twice[0]]} times"
    scored = len(cell.samples)
    for task, fields in _FIELDS.items():
        if cell.task(task) is None:
            continue
        for row in cell.samples:
            turns = _turn_fields(cell, peers, row) if task == "MultiTurn" else ()
            if lacking := [name for name in (*fields, *turns) if row.get(name) is None]:
                yield f"{row.get('id')} lacks {lacking[0]}, which {task} gives for every sample"
                break
    left_out, most = len(cell.body.get("skipped_items") or ()), _most(peers)
    if scored + left_out < most:
        yield f"{scored} samples scored and {left_out} left out, of {most} that there are"
    counted, items = cell.number("num_skipped_items", "value"), cell.number("num_skipped_items", "n")
    if counted is not None and items is not None and items != counted + scored:
        yield f"{items:g} items in the data set, but {scored} scored and {counted:g} left out"


def _turn_fields(cell: Cell, peers: Peers, row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of every turn that some cell of the same task answered in this conversation, one at least."""
    asked, identity = cell.task("MultiTurn"), str(row.get("id"))
    rows = [other.rows.get(identity, {}) for other in peers.usable if other.task("MultiTurn") == asked]
    said = (turn for turn in range(2, MAX_TURNS + 1) if any(f"turn{turn}_text" in one for one in rows))
    for turn in (1, *said):
        yield from (f"turn{turn}_text", f"turn{turn}_full_text")


def _most(peers: Peers) -> int:
    return max(len(other.samples) + len(other.body.get("skipped_items") or ()) for other in peers.usable)


def _notes(cell: Cell, peers: Peers) -> Iterator[str]:
    asked, scored = cell.setting("dataset", "num_samples"), len(cell.samples)
    left_out = len(cell.body.get("skipped_items") or ())
    if isinstance(asked, int) and scored + left_out == _most(peers) < asked:
        yield f"{scored} samples of {asked} asked for, in every cell: is the data set smaller?"
    if cell.value("num_skipped_items"):
        yield f"{cell.value('num_skipped_items'):g} items were left out"


COUNTS_CHECK = Check(
    id="R3",
    title="every sample asked for is scored or said to be left out",
    meaning="samples, for instance the worst ones, were dropped",
    applies=lambda cell, peers: cell.usable and any(cell.task(task) is not None for task in _FIELDS),
    problems=_problems,
    notes=_notes,
)
