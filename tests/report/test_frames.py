from __future__ import annotations

from pathlib import Path

import pandas as pd

from kvbench.report.load import load_results
from kvbench.report.tables import cells_frame, csv_and_parquet, samples_frame
from tests.report.synthetic import body, write_cell


def written(results: Path, folder: Path) -> list[Path]:
    paths = []
    for name, data in csv_and_parquet(load_results(results)).items():
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    return paths


def test_there_is_one_row_per_cell_and_one_per_sample(sweep_folder: Path) -> None:
    results = load_results(sweep_folder)
    assert len(cells_frame(results)) == 13
    assert len(samples_frame(results)) == 13 * 32
    assert {"ppl", "ppl_low", "ppl_high", "ppl_n", "status"} <= set(cells_frame(results))


def test_csv_and_parquet_hold_the_same_numbers(sweep_folder: Path, tmp_path: Path) -> None:
    paths = written(sweep_folder, tmp_path)
    assert [path.name for path in paths] == ["table.csv", "table.parquet", "samples.csv", "samples.parquet"]
    csv, parquet = pd.read_csv(paths[0]), pd.read_parquet(paths[1])
    assert csv["ppl"].tolist() == parquet["ppl"].tolist()


def test_text_that_a_spreadsheet_would_run_is_made_harmless(tmp_path: Path) -> None:
    record = body(num_samples=3)
    for sample, text in zip(record["samples"], ("=1+1", "@SUM(A1)", "plain"), strict=True):
        sample["text"] = text
    record["samples"][0]["nll_sum"] = -1.5
    write_cell(tmp_path, record)
    written(tmp_path, tmp_path)
    frame = pd.read_csv(tmp_path / "samples.csv")
    assert frame["text"].tolist() == ["'=1+1", "'@SUM(A1)", "plain"]
    assert frame["nll_sum"][0] == -1.5
    assert pd.read_parquet(tmp_path / "samples.parquet")["text"][0] == "=1+1"


def test_mixed_and_nested_sample_fields_are_written(tmp_path: Path) -> None:
    record = body(num_samples=2)
    record["samples"][0] |= {"odd": [1, 2], "status": "mine"}
    record["samples"][1]["odd"] = 3
    write_cell(tmp_path, record)
    written(tmp_path, tmp_path)
    frame = pd.read_parquet(tmp_path / "samples.parquet")
    assert frame["odd"].tolist() == ["[1, 2]", "3"]
    assert frame["sample_status"][0] == "mine"


def test_no_record_gives_empty_tables(tmp_path: Path) -> None:
    written(tmp_path, tmp_path)
    assert pd.read_parquet(tmp_path / "table.parquet").empty
