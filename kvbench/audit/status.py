"""R2: the status agrees with what the record holds."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.audit.check import Check
from kvbench.audit.evidence import Cell, Peers
from kvbench.audit.steps import ENTRIES, steps_taken
from kvbench.stats.noise import noise_reason

# What each task gives in every cell that did not fail; generation that takes a step gives its entries too.
GIVEN_BY = {
    "Perplexity": ("ppl",),
    "PerplexityReleased": ("ppl_released",),
    "Generation": ("rougeL_vs_full", "length_ratio"),
    "Fidelity": ("kl_to_full", "top1_agreement_fraction"),
    "MultiTurn": ("turn1_rougeL_vs_full", "turn1_length_ratio", "turn1_realised_budget_fraction"),
    "Speed": ("ttft_ms", "tpot_ms", "throughput_tokens_per_s"),
    "Memory": ("peak_memory_bytes", "kv_stored_bytes"),
    "Capacity": ("capacity_prompts",),
}


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
    for task, names in GIVEN_BY.items():
        counted = ENTRIES if task == "Generation" and steps_taken(cell) else ()
        missing = [name for name in (*names, *counted) if name not in cell.body["measurements"]]
        if cell.task(task) is not None and missing:
            yield f"status is {status}, but {missing[0]} was asked for and is not there"


def _noise(cell: Cell, status: str) -> Iterator[str]:
    """Say where status and noise gate disagree; older records hold nothing of the gate, and none of them is noisy."""
    values = [
        cell.value(name) for name in ("tpot_spread_fraction", "reference_drift_fraction", "foreign_gpu_processes")
    ]
    reason = noise_reason(values[0], values[1], None if values[2] is None else int(values[2]))
    if (status == "noisy") != bool(reason):
        yield f"status is {status}, but {reason or 'the machine was quiet while the cell was timed'}"


CHECK = Check(
    id="R2",
    title="the status agrees with the content",
    meaning="a cell that failed is shown as if it had not, or the other way round",
    applies=lambda cell, peers: True,
    problems=_problems,
)
