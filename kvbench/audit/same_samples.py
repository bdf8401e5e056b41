"""R4: compared cells have the same samples, and a sample is the same in each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.measures import MAX_TURNS

_SAME = (
    *("cluster", "reference", "full_text", "num_compared_tokens"),
    *(f"turn{turn}_{part}" for turn in range(1, MAX_TURNS + 1) for part in ("question", "reference", "full_text")),
)
_LENGTHS = ("max_new_tokens", "max_turns")


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    if _digest(cell) is not None and _digest(cell) != _usual_digest(peers):
        yield "its prompts are not those of the other cells (prompts.digest)"
    usual = _usual_ids(peers)
    missing, added = sorted(usual - set(cell.rows)), sorted(set(cell.rows) - usual)
    if missing:
        yield f"{len(missing)} samples of the other cells are not here, {missing[0]} for one"
    if added:
        yield f"{len(added)} samples are in no other cell, {added[0]} for one"
    for identity, row in cell.rows.items():
        said = _usual_rows(peers, _limits(cell))[identity]
        different = [name for name in _SAME if name in row and row[name] != said[name]]
        if different:
            yield f"{identity}: {different[0]} is not that of the other cells"
            break


def _digest(cell: Cell) -> str | None:
    prompts = cell.body.get("prompts")
    return str(prompts.get("digest")) if isinstance(prompts, dict) else None


@lru_cache(maxsize=8)
def _usual_digest(peers: Peers) -> str | None:
    found = Counter(digest for cell in peers.usable if cell.samples and (digest := _digest(cell)) is not None)
    return found.most_common(1)[0][0] if found else None


@lru_cache(maxsize=8)
def _usual_ids(peers: Peers) -> frozenset[str]:
    return Counter(frozenset(cell.rows) for cell in peers.usable if cell.samples).most_common(1)[0][0]


@lru_cache(maxsize=8)
def _usual_rows(peers: Peers, limits: tuple[object, ...]) -> dict[str, dict[str, object]]:
    """Return what most cells with the same limits of length say; of equally many the full cache's."""
    said: dict[str, dict[str, Counter[object]]] = {}
    for cell in peers.usable:
        if _limits(cell) == limits:
            for identity, row in cell.rows.items():
                counters = said.setdefault(identity, {name: Counter() for name in _SAME})
                for name in _SAME:
                    counters[name].update([row[name]] if name in row else ())
    return {
        identity: {name: most[0][0] for name, counter in counters.items() if (most := counter.most_common(1))}
        for identity, counters in said.items()
    }


def _limits(cell: Cell) -> tuple[object, ...]:
    tasks = [cell.task(task) or {} for task in ("Generation", "Fidelity", "MultiTurn")]
    return tuple(task.get(name) for task in tasks for name in _LENGTHS)


SAMPLES_CHECK = Check(
    id="R4",
    title="compared cells hold the same samples",
    meaning="numbers of different samples are compared, or samples were exchanged",
    applies=lambda cell, peers: (
        cell.usable and bool(cell.samples) and sum(bool(other.samples) for other in peers.usable) > 1
    ),
    problems=_problems,
)
