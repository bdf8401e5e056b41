from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvbench.errors import ConfigError, RecordError
from kvbench.results.record import cell_key
from kvbench.results.store import PartialStore

KEY, OTHER = cell_key({"cell": 1}), cell_key({"cell": 2})


def test_batches_come_back_by_number_as_they_were(tmp_path: Path) -> None:
    payloads = {11: {"nll_sum": [0.1, 1e-300]}, 2: {"text": "caf\u00e9"}, 0: {}}
    for number, payload in payloads.items():
        PartialStore(tmp_path, KEY).commit(number, payload)
    assert PartialStore(tmp_path, KEY).batches() == payloads
    assert list(PartialStore(tmp_path, KEY).batches()) == [0, 2, 11]
    assert PartialStore(tmp_path, OTHER).batches() == {}


def test_the_first_whole_batch_stays(tmp_path: Path) -> None:
    store = PartialStore(tmp_path, KEY)
    store.commit(0, {"value": 1})
    store.commit(0, {"value": 2})
    assert store.batches() == {0: {"value": 1}}
    assert os.listdir(store.folder) == ["0.json"]


def test_a_batch_torn_at_any_byte_is_reported_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PartialStore(tmp_path, KEY)
    store.commit(0, {"value": 1.5})
    store.commit(1, {"value": 2.5})
    path = store.folder / "0.json"
    data = path.read_bytes()
    for length in range(0, len(data) - 1):
        path.write_bytes(data[:length])
        caplog.clear()
        assert store.batches() == {1: {"value": 2.5}}
        assert str(path) in caplog.text
    store.commit(0, {"value": 3.5})
    assert store.batches() == {0: {"value": 3.5}, 1: {"value": 2.5}}


@pytest.mark.parametrize("damage", ["other cell", "other number", "folder", "newer version", "not a batch"])
def test_a_foreign_batch_is_left_out_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    store, other = PartialStore(tmp_path, KEY), PartialStore(tmp_path / "other", OTHER)
    store.commit(0, {"value": 1})
    other.commit(1, {"value": 2})
    wrong = store.folder / "1.json"
    if damage == "other cell":
        os.link(other.folder / "1.json", wrong)
    elif damage == "other number":
        os.link(store.folder / "0.json", wrong)
    elif damage == "folder":
        wrong.mkdir()
    elif damage == "newer version":
        text = (store.folder / "0.json").read_text()
        wrong.write_text(text.replace('"kvbench_batch":1', '"kvbench_batch":2'))
    else:
        wrong.write_text('{"some": "json"}')
    assert store.batches() == {0: {"value": 1}}
    assert str(wrong) in caplog.text
    store.commit(1, {"value": 3})
    assert store.batches() == {0: {"value": 1}, 1: {"value": 3}}


def test_files_that_are_no_batches_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PartialStore(tmp_path, KEY)
    store.commit(0, {})
    (store.folder / ".0.json.x.tmp").write_text("{")
    (store.folder / "damaged-1").write_text("{")
    assert store.batches() == {0: {}}
    assert not caplog.records


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"payload\.value is nan"):
        PartialStore(tmp_path, KEY).commit(0, {"value": float("nan")})


def test_removed_batches_are_gone_and_a_late_one_still_commits(tmp_path: Path) -> None:
    store = PartialStore(tmp_path, KEY)
    store.remove()
    store.commit(0, {})
    store.remove()
    assert store.batches() == {}
    store.commit(1, {})
    assert list(store.batches()) == [1]


def test_a_folder_that_vanishes_under_a_commit_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls = PartialStore(tmp_path, KEY), []
    link = os.link

    def remove_first(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 1:
            store.remove()
        link(source, target)

    monkeypatch.setattr(os, "link", remove_first)
    store.commit(0, {"value": 1})
    assert store.batches() == {0: {"value": 1}}
    assert len(calls) == 2


def test_a_file_in_the_place_of_the_results_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="writable folder"):
        PartialStore(tmp_path / "file", KEY).commit(0, {})
