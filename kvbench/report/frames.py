"""Two frames for whoever wants the numbers: one row per cell, and one row per cell and sample.

Both are written as CSV and Parquet with the same bytes for the same records. Text that a spreadsheet
would run as a formula is made harmless in CSV; numbers are untouched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from kvbench.measures import MEASURES
from kvbench.report.load import CellResult, Results

_LABELS = ("model", "dataset", "policy", "budget", "budget_fraction", "budget_tokens", "positions", "variant")
_RUN = ("status", "phase", "error", "sweep", "key", "started_utc", "duration_s")
_SAMPLE_LABELS = (*_LABELS, "status", "key")
_NUMBERS = ("budget_fraction", "budget_tokens", "duration_s")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def cells_frame(results: Results) -> pd.DataFrame:
    """Return one row per cell: labels, status, then value, _low, _high and _n of every measurement."""
    rows = [_cell_row(cell) for cell in results.records]
    measured = [f"{name}{suffix}" for name in MEASURES for suffix in ("", "_low", "_high", "_n")]
    frame = pd.DataFrame(rows, columns=[*_LABELS, *_RUN, *measured])
    return _typed(frame, numbers={*_NUMBERS, *measured})


def quality_frame(results: Results) -> pd.DataFrame:
    """Return the columns of `cells_frame` that a sweep gives again wherever, whenever and however often it is run."""
    names = [name for name, measure in MEASURES.items() if measure.reproduces]
    measured = [f"{name}{suffix}" for name in names for suffix in ("", "_low", "_high", "_n")]
    return cells_frame(results)[[*_SAMPLE_LABELS, *measured]]


def csv_text(frame: pd.DataFrame) -> str:
    """Return `frame` as CSV; numbers in their shortest exact form, text safe for spreadsheets."""
    return str(_harmless(frame).to_csv(index=False, lineterminator="\n"))


def samples_frame(results: Results) -> pd.DataFrame:
    """Return one row per cell and sample, with every field that a sample of any cell has."""
    rows = [
        {**{name: getattr(cell, name) for name in _SAMPLE_LABELS}, **_sample_row(sample)}
        for cell in results.records
        for sample in cell.samples
    ]
    fields = dict.fromkeys(name for row in rows for name in row)
    columns = [*_SAMPLE_LABELS, *sorted(set(fields) - set(_SAMPLE_LABELS))]
    frame = pd.DataFrame(rows, columns=columns)
    numbers = {name for name in columns if all(_is_number(row.get(name)) for row in rows) and rows}
    return _typed(frame, numbers=numbers | set(_NUMBERS))


def parquet_bytes(frame: pd.DataFrame) -> bytes:
    """Return `frame` as a Parquet file."""
    return bytes(frame.to_parquet(None, engine="pyarrow", index=False))


def csv_and_parquet(results: Results) -> dict[str, bytes]:
    """Return what table.csv, table.parquet, samples.csv and samples.parquet hold, by these names."""
    files: dict[str, bytes] = {}
    for name, frame in (("table", cells_frame(results)), ("samples", samples_frame(results))):
        files |= {f"{name}.csv": csv_text(frame).encode(), f"{name}.parquet": parquet_bytes(frame)}
    return files


def _cell_row(cell: CellResult) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(cell, name) for name in (*_LABELS, *_RUN)}
    # A failed cell may have got some numbers before it failed; the status column says how to take them.
    for name, found in cell.measurements.items():
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_n": found.n}
    return row


def _sample_row(sample: Mapping[str, Any]) -> dict[str, object]:
    """Sample fields that would hide a label get a prefix; nested values become JSON text."""
    return {
        f"sample_{name}" if name in _SAMPLE_LABELS else str(name): (
            json.dumps(value, sort_keys=True, ensure_ascii=False) if isinstance(value, dict | list) else value
        )
        for name, value in sample.items()
    }


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _typed(frame: pd.DataFrame, *, numbers: set[str]) -> pd.DataFrame:
    """Give every column one type, float64 or text, so that both formats write any mixture."""
    for name in frame.columns:
        if name in numbers:
            frame[name] = pd.to_numeric(frame[name]).astype("float64")
        else:
            texts = [None if pd.isna(value) else str(value) for value in frame[name]]
            frame[name] = pd.Series(texts, index=frame.index, dtype="string")
    return frame


def _harmless(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a copy whose text cells a spreadsheet does not evaluate; a lone "-" is no formula and stays."""
    safe = frame.copy()
    for name in map(str, safe.select_dtypes("string").columns):
        risky = safe[name].str.startswith(_FORMULA_STARTS).fillna(False) & (safe[name].str.len() > 1).fillna(False)
        safe.loc[risky, name] = "'" + safe.loc[risky, name]
    return safe
