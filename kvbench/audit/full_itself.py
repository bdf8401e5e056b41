"""R5: the full cache against itself scores 1.0 in every answer, of every turn, and has a divergence of exactly 0."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.measures import MAX_TURNS

_EXACT = {"kl_to_full": 0.0, "top1_agreement_fraction": 1.0, "length_ratio": 1.0, "realised_budget_fraction": 1.0} | {
    f"rouge{kind}_vs_full": 1.0 for kind in "12L"
}
_PREFIXES = ("", *(f"turn{turn}_" for turn in range(1, MAX_TURNS + 1)))


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    for name, expected in ((f"{prefix}{name}", one) for prefix in _PREFIXES for name, one in _EXACT.items()):
        value = cell.value(name)
        if value is not None and value != expected:
            yield f"{name} is {value:.6g} and must be {expected:g}"
            return
    for row in cell.samples:
        for prefix in _PREFIXES:
            if row.get(f"{prefix}text") != row.get(f"{prefix}full_text"):
                yield f"{row.get('id')}: its {prefix}text is not the full cache's"
                return
        if row.get("kl_sum", 0.0) != 0.0 or row.get("num_agreeing_tokens") != row.get("num_compared_tokens"):
            yield f"{row.get('id')}: it differs from the full cache"
            return


FULL_ITSELF_CHECK = Check(
    id="R5",
    title="the full cache is equal to itself",
    meaning="the row that everything is compared with is not the full cache's, or the machine computes unreliably",
    applies=lambda cell, peers: cell.usable and cell is peers.full and bool(cell.samples),
    problems=_problems,
)
