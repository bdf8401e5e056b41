"""One cell as the report sees it: labels, status and estimates, checked once so later code can trust them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench.errors import RecordError
from kvbench.measures import MEASURES, bounds_on_scale
from kvbench.report.natural import natural_key
from kvbench.results.record import MEASURED

FULL = "full"
_LARGEST = 1e300
_TEXT_LABELS = ("model", "dataset", "policy", "budget", "positions")


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One measured number in base units with its 95 % interval, where one exists, and sample count."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    method: str

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the interval, or the value twice when there is none."""
        if self.low is None or self.high is None:
            return self.value, self.value
        return self.low, self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class CellResult:
    """The accepted record of one cell.

    `variant` tells cells apart whose labels are equal, and `model` and `dataset` may have got an end that does;
    `labels` holds them as they were recorded. `folder` names the results folder where several are read;
    `cell_folder` is where the record lies, for what lies beside it.
    """

    key: str
    sweep: str
    status: str
    phase: str | None
    error: str
    model: str
    dataset: str
    policy: str
    budget: str
    budget_fraction: float | None
    budget_tokens: int | None
    positions: str
    measurements: Mapping[str, Estimate]
    samples: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    curves: Mapping[str, Any]
    started_utc: str
    duration_s: float
    variant: str = ""
    folder: str = ""
    cell_folder: Path | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """True when no number of this cell may be used; of a noisy one only the times are out."""
        return self.status not in MEASURED

    @property
    def is_full(self) -> bool:
        """True for the cache that keeps everything."""
        return self.policy == FULL

    def estimate(self, name: str) -> Estimate | None:
        """Return the measurement, None if the cell failed or has no such number."""
        return None if self.failed else self.measurements.get(name)

    @property
    def series(self) -> tuple[str, str, str]:
        """Cells with the same series differ in budget only, so a line may join them."""
        return self.policy, self.positions, self.variant

    @property
    def sort_key(self) -> tuple[object, ...]:
        """Order: model, dataset, full first, policy, positions, variant (numbers in names by size), budget."""
        series = (not self.is_full, *map(natural_key, (self.policy, self.positions, self.variant)))
        return natural_key(self.model), natural_key(self.dataset), *series, *self.budget_order, self.key

    @property
    def budget_order(self) -> tuple[object, ...]:
        """Order of budgets whatever the policy: shares before numbers of tokens, the smallest first."""
        budget = self.budget_fraction if self.budget_fraction is not None else self.budget_tokens or 0
        return self.budget_fraction is None, budget, self.budget


def parse_cell(body: Mapping[str, Any]) -> CellResult:
    """Return `body` (a verified record body) as a cell. Raises: RecordError saying which label is wrong."""
    labels = body["labels"]
    for name in _TEXT_LABELS:
        if not isinstance(labels.get(name), str) or not labels[name]:
            raise RecordError(f"label {name} is {labels.get(name)!r:.60}; it must be text. Run the cell again.")
    if any(not isinstance(sample, dict) for sample in body["samples"]):
        raise RecordError("a sample is not a JSON object. Run the cell again.")
    fraction, tokens = _number(labels.get("budget_fraction")), _number(labels.get("budget_tokens"))
    return CellResult(
        **{name: labels[name] for name in _TEXT_LABELS},
        labels={name: labels[name] for name in _TEXT_LABELS},
        **{name: body[name] for name in ("key", "sweep", "status", "phase", "environment", "started_utc")},
        error=_error_text(body["error"]),
        budget_fraction=fraction,
        budget_tokens=None if tokens is None else int(tokens),
        measurements=_estimates(body["measurements"]),
        samples=tuple(body["samples"]),
        settings=body["cell"],
        curves=body["curves"],
        duration_s=float(body["duration_s"]),
    )


def _estimates(measurements: Mapping[str, Mapping[str, Any]]) -> dict[str, Estimate]:
    """Keep known measurements that have a value, in the registry's order."""
    found: dict[str, Estimate] = {}
    for name in MEASURES:
        entry = measurements.get(name, {})
        value, n = _number(entry.get("value")), _number(entry.get("n"))
        if value is None:
            continue
        low, high = _number(entry.get("low")), _number(entry.get("high"))
        if low is not None and high is not None:  # older records hold bounds outside of what the measure can be
            low, high = bounds_on_scale(name, value, low, high)
        found[name] = Estimate(
            value=value,
            low=low,
            high=high,
            n=None if n is None else int(n),
            method=str(entry.get("method") or ""),
        )
    return found


def _error_text(error: Mapping[str, Any] | None) -> str:
    return "" if error is None else f"{error.get('type', 'error')}: {error.get('message', '')}"


def _number(value: object) -> float | None:
    """Return a finite number as float; JSON may also hold integers that no float can."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LARGEST:
        return None
    return float(value)
