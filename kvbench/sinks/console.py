"""One line per finished cell in the terminal, printed above any progress bar.

[3/13] ok         h2o            20 % tokens kept  PPL 1.234  ROUGE-L vs full 0.912  TPOT 2.26 ms  12.3 s
[4/13] oom        full           -              prefill: OutOfMemoryError: tried to allocate 2 GiB
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

from kvbench.measures import budget_words, format_value, measure
from kvbench.results.record import MEASURED
from kvbench.results.redaction import printable

_HEADLINES = (
    *("ppl", "rougeL_vs_full", "turn1_rougeL_vs_full", "turn2_rougeL_vs_full", "objects_recalled_fraction"),
    *("needles_recalled_fraction", "answers_right_fraction", "tpot_ms", "kv_stored_bytes"),
)


def say(line: str) -> None:
    """Print one line to stdout without breaking a progress bar: no secrets, and "?" for control characters."""
    clean = printable(line)
    try:
        from tqdm import tqdm
    except ImportError:
        sys.stdout.write(clean + "\n")
    else:
        tqdm.write(clean, file=sys.stdout)


class ConsoleSink:
    """Prints status, policy, budget and headline numbers of each cell as it finishes."""

    is_instant: ClassVar[bool] = True

    def __init__(self) -> None:
        self._num_cells = 0
        self._num_finished = 0

    def open(self, sweep: str, num_cells: int) -> None:
        """Start counting the `num_cells` cells of `sweep`."""
        self._num_cells, self._num_finished = num_cells, 0

    def record(self, body: dict[str, Any]) -> None:
        """Print the line of one cell."""
        self._num_finished += 1
        say(f"[{self._num_finished}/{self._num_cells}] {cell_line(body)}")

    def close(self) -> None:
        """Do nothing; every line is out already."""


def cell_line(body: dict[str, Any]) -> str:
    """Return the line for one record body: numbers if it has some, else what went wrong."""
    labels = body["labels"]
    status = body["status"] + ("*" if body.get("tries", 1) > 1 else "")  # it took a second try
    head = f"{status:<10} {labels.get('policy', '?'):<14} {budget_words(labels.get('budget', '-')):<16}"
    if body["status"] in MEASURED:
        # Without intervals, which are in the table at the end: a line has no room for them.
        values = {name: body["measurements"].get(name, {}).get("value") for name in _HEADLINES}
        shown = [f"{measure(name).label} {format_value(name, one)}" for name, one in values.items() if one is not None]
    else:
        error = body["error"] or {}
        first_line = str(error.get("message", "")).strip().partition("\n")[0][:160]
        failure = ": ".join(part for part in (body["phase"], error.get("type"), first_line) if part)
        shown = [failure] if failure else []
    return "  ".join([head if shown else head.rstrip(), *shown, f"{body['duration_s']:.1f} s"])
