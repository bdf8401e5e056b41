"""R2: the status agrees with what the record holds."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.steps import ENTRIES, steps_taken
from kvbench.stats.latency import FEWEST_LAUNCHES, noise_reason

# What each task gives in every cell that did not fail; generation that takes a step gives its entries too.
GIVEN_BY = {
    "Perplexity": ("ppl",),
    "PerplexityReleased": ("ppl_released",),
    "Generation": ("rougeL_vs_full", "length_ratio"),
    "Fidelity": ("kl_to_full", "top1_agreement_fraction"),
    "MultiTurn": ("turn1_rougeL_vs_full", "turn1_length_ratio", "turn1_realised_budget_fraction"),
    "Speed": (
        *("ttft_ms", "tpot_ms", "full_ttft_ms", "full_tpot_ms", "throughput_tokens_per_s"),
        *("ttft_ratio_to_full", "tpot_ratio_to_full", "throughput_ratio_to_full"),
    ),
    "Memory": ("peak_memory_bytes", "kv_stored_bytes"),
    "Capacity": ("capacity_prompts",),
}
_COSTS = ("Speed", "Memory", "Capacity")
# What comes from samples is null where nothing was scored, and its own check looks at it.
_OF_SAMPLES = tuple(name for task, names in GIVEN_BY.items() if task not in _COSTS for name in names)
_WITHOUT_NOISE = (None, "abba_v1", "abba_v2")  # older protocols of speed, and none


def _problems(cell: Cell, peers: Peers) -> Iterator[str]:
    status, error, phase = (cell.body[name] for name in ("status", "error", "phase"))
    if not cell.usable:
        if not isinstance(error, dict) or not error.get("type"):
            yield f"status is {status}, and no error says why"
        return
    if error is not None:
        yield f"status is {status}, but the record holds the error {error.get('type')}"
    if phase is not None:
        yield f"status is {status}, but the record says that it ended in {phase}"
    yield from _noise(cell, status)
    for name in _asked_for(cell):
        if name not in cell.body["measurements"] or (name not in _OF_SAMPLES and cell.value(name) is None):
            yield f"status is {status}, but {name} was asked for and is not there"
            return


def _asked_for(cell: Cell) -> Iterator[str]:
    for task, names in GIVEN_BY.items():
        if cell.task(task) is not None:
            yield from names
    if steps_taken(cell):
        yield from ENTRIES
    if (cell.task("Speed") or {}).get("protocol") not in _WITHOUT_NOISE:
        yield "reference_drift_fraction"
        if len(cell.curve("launches_ms", 4)) >= FEWEST_LAUNCHES:
            yield "tpot_spread_fraction"


def _noise(cell: Cell, status: str) -> Iterator[str]:
    """Say where status and noise gate disagree; older records hold nothing of the gate, and none of them is noisy."""
    values = [
        cell.value(name) for name in ("tpot_spread_fraction", "reference_drift_fraction", "foreign_gpu_processes")
    ]
    reason = noise_reason(values[0], values[1], None if values[2] is None else int(values[2]))
    if (status == "noisy") != bool(reason):
        yield f"status is {status}, but {reason or 'the machine was quiet while the cell was timed'}"


STATUS_CHECK = Check(
    id="R2",
    title="the status agrees with the content",
    meaning="a cell that failed is shown as if it had not, or the other way round",
    applies=lambda cell, peers: True,
    problems=_problems,
)
