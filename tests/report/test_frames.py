from __future__ import annotations

from pathlib import Path

import pandas as pd

from kvbench.measures import MEASURES
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
    names = ("table", "table_long", "samples")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in names for kind in ("csv", "parquet")]
    csv, parquet = pd.read_csv(paths[0]), pd.read_parquet(paths[1])
    assert csv["ppl"].tolist() == parquet["ppl"].tolist()


def test_no_column_of_the_table_is_empty_and_none_that_is_filled_is_left_out(tmp_path: Path) -> None:
    write_cell(tmp_path, body(policy="full", budget=None))
    write_cell(tmp_path, body(policy="h2o", status="oom"))
    written(tmp_path, tmp_path)
    results = load_results(tmp_path)
    for frame in (pd.read_csv(tmp_path / "table.csv"), pd.read_parquet(tmp_path / "table.parquet")):
        assert not [name for name in frame if (frame[name].isna() | (frame[name] == "")).all()]
        assert {name for cell in results.records for name in cell.measurements} < set(frame)
        assert {"model", "policy", "status", "error", "budget_fraction"} < set(frame)
        assert not {"budget_tokens", "variant", "needles_f1", "tpot_ms_nothing"} & set(frame)


def test_the_long_form_has_a_row_for_every_number_of_the_wide_one(sweep_folder: Path, tmp_path: Path) -> None:
    written(sweep_folder, tmp_path)
    wide, long = (pd.read_csv(tmp_path / f"{name}.csv").set_index("key") for name in ("table", "table_long"))
    assert list(long.columns[-6:]) == ["measure", "value", "low", "high", "n", "unit"]
    assert len(long) == sum(wide[name].notna().sum() for name in MEASURES if name in wide)
    for name, same in long.groupby("measure"):
        assert set(same["unit"]) == {MEASURES[str(name)].unit}
        for part, column in (("value", name), ("low", f"{name}_low"), ("high", f"{name}_high"), ("n", f"{name}_n")):
            beside = wide.loc[same.index, column] if column in wide else same[part] * float("nan")
            assert same[part].fillna(-1).tolist() == beside.fillna(-1).tolist()


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
    for name in ("table", "table_long", "samples"):
        assert pd.read_parquet(tmp_path / f"{name}.parquet").empty
        assert (tmp_path / f"{name}.csv").read_text().startswith("model,dataset,policy,")
