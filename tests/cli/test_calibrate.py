"""`kvbench calibrate` from its words to the cell that reads what it wrote; one line for all that goes wrong."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from kvbench.cache import Calibrated
from kvbench.cache.artefact import artefact_bytes, read_artefact
from kvbench.cli.main import run
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError
from kvbench.models.spec import BUNDLED_FOLDER
from kvbench.sweep.cell import Cell

FEW = ("dataset.num_samples=2", "batch_size=2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kvbench calibrate q_filters` leaves for the bundled model."""
    path = tmp_path_factory.mktemp("written") / "q.safetensors"
    assert run(["calibrate", "q_filters", *FEW, "--out", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cell_of(*words: str) -> Cell:
    (composed,) = compose_grid(["policy=q_filters", "task=perplexity", *FEW, *words], multirun=False, config_dir=None)
    return build_cell(composed)


def refused(match: str, *words: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        cell_of(*words)
    assert "\n" not in str(caught.value)


def test_it_is_found_again_in_the_cache_folder_and_its_hash_is_in_the_key(
    written: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused("QFilters needs an artefact, and .* run `kvbench calibrate q_filters model=tiny-llava dataset=NAME`")
    assert run(["calibrate", "q_filters", *FEW]) == 0
    told = capsys.readouterr()
    (file,) = (path for path in cache.rglob("*.safetensors"))
    assert str(file) in told.out
    assert "2 prompts" in told.err
    assert file.read_bytes() == written.read_bytes()
    found = cell_of()
    assert isinstance(found.setting.policy, Calibrated)
    assert found.setting.policy.artefact == str(file)
    assert found.settings["policy"]["artefact"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_where_a_file_lies_is_in_no_key_and_what_is_in_it_is(written: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(written, moved)
    first, second = cell_of(f"policy.artefact={written}"), cell_of(f"policy.artefact={moved}")
    assert first.key == second.key
    stored = read_artefact(written)
    layers = [{"filter": stored.tensors[f"layers.{n}.filter"]} for n in range(len(stored.tensors))]
    moved.write_bytes(artefact_bytes(layers, {**stored.about, "num_prompts": 99}))
    assert cell_of(f"policy.artefact={moved}").key != first.key


def test_it_says_what_it_was_made_of_and_from(written: Path) -> None:
    about = read_artefact(written).about
    assert about["policy"] == "kvbench:QFilters"
    assert about["num_prompts"] == 2
    assert about["dataset_name"] == "scenes"
    assert {"model", "source", "dataset", "dtype"} <= about.keys()
    assert {"kvbench", "torch", "transformers"} <= about["versions"].keys()


def test_another_model_is_refused(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BUNDLED_FOLDER, other)
    (other / "note.txt").write_text("another model")
    refused("is of the model .* and this one, other", f"model.checkpoint={other}", f"policy.artefact={written}")


def test_what_another_policy_or_its_older_source_learnt_is_refused(written: Path, tmp_path: Path) -> None:
    stored, path = read_artefact(written), tmp_path / "older.safetensors"
    layers = [{"filter": stored.tensors[f"layers.{n}.filter"]} for n in range(len(stored.tensors))]
    path.write_bytes(artefact_bytes(layers, {**stored.about, "source": "0123456789abcdef"}))
    refused("made by kvbench:QFilters of source 0123456789abcdef, and QFilters is now", f"policy.artefact={path}")
    path.write_bytes(artefact_bytes(layers, {**stored.about, "policy": "Mine"}))
    refused("made by Mine of source", f"policy.artefact={path}")


def test_a_missing_and_a_torn_file_are_refused_before_a_model_is_loaded(written: Path, tmp_path: Path) -> None:
    refused("is not there; run `kvbench calibrate q_filters", f"policy.artefact={tmp_path / 'none'}")
    torn = tmp_path / "torn"
    torn.write_bytes(written.read_bytes()[:-5])
    refused("not a whole file", f"policy.artefact={torn}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["h2o"], "policy=h2o reads no artefact"),
        (["q_filter"], "did you mean 'q_filters'"),
        (["model=tiny-llava"], "stands where the policy's name belongs"),
        (["q_filters", "scenes"], "cannot be read as KEY=VALUE"),
        ([], "POLICY"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["calibrate", "--help"])
    assert "safetensors" in capsys.readouterr().out
