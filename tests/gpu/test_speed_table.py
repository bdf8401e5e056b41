"""The tables of docs/speed.md are what the published records give, GPU by GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu import speed_table
from tests.gpu.speed_table import BEGIN, END, PAGE, published_folders, speed_tables, with_tables

H100 = Path(__file__).parents[2] / "results" / "published" / "speed_h100"


def test_the_page_shows_what_the_records_give() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page, speed_tables(published_folders())), "python -m tests.gpu.speed_table --write"


def test_a_row_is_its_record() -> None:
    lines = [line for line in speed_tables([H100]).splitlines() if line.startswith("| 7B B16 1,024+64 | h2o ")]
    bodies = [json.loads(path.read_text(encoding="utf-8"))["body"] for path in H100.glob("cells/*/record.json")]
    (body,) = (
        one for one in bodies if (one["labels"]["policy"], one["labels"]["model"][:12]) == ("h2o", "llava-1.5-7b")
    )
    found = body["measurements"]
    (line,) = lines
    assert f"| {found['tpot_ms']['value']:.2f} ms |" in line
    assert f"| {found['ttft_ratio_to_full']['value']:.3f} [" in line
    assert f"| {found['peak_memory_bytes']['value'] / 2**30:.2f} GiB |" in line


def test_a_share_is_of_the_roof_by_the_fastest_copy_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed_table.load_results

    def one_slow(folder: Path) -> object:
        results = real(H100)
        object.__setattr__(results, "records", results.records[:2])
        for cell, own, share in zip(results.records, (4e12, 2e12), (1.2, 0.9), strict=True):
            found = cell.measurements
            changed = {"copy_bandwidth_bytes_per_s": 3e12, "roof_share_fraction": share}  # by the median of the two
            told = {name: replace(found[name], value=number) for name, number in changed.items()}
            object.__setattr__(cell, "measurements", {**found, **told})
            object.__setattr__(cell, "own_bandwidth", own)
        return results

    monkeypatch.setattr(speed_table, "load_results", one_slow)
    rows = [line for line in speed_tables([H100]).splitlines() if "GiB" in line]
    assert sorted(line.split("|")[7].strip() for line in rows) == ["68 %", "90 %"]


def test_every_gpu_has_a_table_under_its_name_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = speed_table.load_results

    def on_an_h200(folder: Path) -> object:
        results = real(H100)
        if folder == tmp_path:
            for cell in results.records:
                changed = {**cell.environment, "gpu": "NVIDIA H200", "triton": "3.6.0"}
                object.__setattr__(cell, "environment", changed)
        return results

    monkeypatch.setattr(speed_table, "load_results", on_an_h200)
    text = speed_tables([H100, tmp_path])
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "#### NVIDIA H100 80GB HBM3",
        "#### NVIDIA H200",
    ]
    assert "torch 2.11.0, triton 3.6.0, transformers 5.17.0" in text
    assert "triton not recorded" in text


def test_a_page_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="once each"):
        with_tables(f"{BEGIN} but no end", "tables")
    assert with_tables(f"a {BEGIN} old {END} z", "new\n") == f"a {BEGIN}\n\nnew\n\n{END} z"


def test_a_model_over_several_gpus_has_a_table_of_its_own_with_the_bytes_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = speed_table.load_results

    def over_two(folder: Path) -> object:
        results = real(H100)
        for cell in results.records:
            peak = cell.measurements["peak_memory_bytes"]
            halves = {f"device{n}_peak_memory_bytes": replace(peak, value=(n + 1) * 2**30) for n in (0, 1)}
            object.__setattr__(cell, "measurements", {**cell.measurements, **halves})
            object.__setattr__(cell, "environment", {**cell.environment, "gpus": [cell.environment["gpu"]] * 2})
        return results

    monkeypatch.setattr(speed_table, "load_results", over_two)
    text = speed_tables([tmp_path])
    assert "#### 2 x NVIDIA H100 80GB HBM3" in text
    rows = [line for line in text.splitlines() if line.startswith("| 7B")]
    assert rows
    assert all(line.endswith("GiB (1.00 + 2.00) |") for line in rows)
