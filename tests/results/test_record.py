from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import ConfigError, KvbenchError, RecordError
from kvbench.results.files import canonical_json
from kvbench.results.record import cell_key, encode_record, read_record, write_record
from tests.results.record_bodies import make_body


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    body = make_body()
    write_record(tmp_path / "new" / "folder" / "r.json", body)
    assert read_record(tmp_path / "new" / "folder" / "r.json") == body
    assert os.listdir(tmp_path / "new" / "folder") == ["r.json"]


def test_an_existing_record_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_record(path, make_body(0))
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_record(path, make_body(1))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_record_torn_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    data = encode_record(make_body(samples=[], curves={}, measurements={}))
    for length in range(len(data) - 1):  # without the last byte, a newline, the record is whole
        path.write_bytes(data[:length])
        with pytest.raises(RecordError, match=r"r\.json"):
            read_record(path)


def test_a_flipped_bit_never_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    body = make_body()
    data = bytearray(encode_record(body))
    num_refused = 0
    for position in range(0, len(data) * 8, 7):
        data[position // 8] ^= 1 << position % 8
        path.write_bytes(data)
        data[position // 8] ^= 1 << position % 8
        try:
            assert read_record(path) == body
        except RecordError:
            num_refused += 1
    assert num_refused > 0.99 * len(data) * 8 / 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "torn"),
        (b"not json", "torn or is not JSON"),
        (b"[1, 2]", "not a kvbench record"),
        (b'{"loss": 1.0}', "not a kvbench record"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 100_000, "torn or is not JSON"),
        (b"1" * 10_000, "torn or is not JSON"),
        (b'{"kvbench_record": 2, "body": {}}', "Update it"),
        (b'{"kvbench_record": 1, "body": 3}', "damaged envelope"),
        (b'{"kvbench_record": 1, "body": {"a": NaN}}', "is nan"),
        (b'{"kvbench_record": 1, "body": {"a": "\\ud800"}}', "surrogate"),
        (b'{"kvbench_record": 1, "body": {"a": 1}}', "bytes"),
    ],
)
def test_a_foreign_file_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_newer_body_schema_asks_for_an_update(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    text = encode_record(make_body()).decode()
    body = json.loads(text)["body"] | {"schema": 99}
    path.write_text(json.dumps(_envelope(body)), encoding="utf-8")
    with pytest.raises(RecordError, match="newer kvbench"):
        read_record(path)


def test_a_folder_or_a_pipe_in_place_of_a_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("folder.json", "pipe.json"):
        with pytest.raises(RecordError, match="is not a file"):
            read_record(tmp_path / name)
    with pytest.raises(RecordError, match="does not exist"):
        read_record(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "it must be one of ok"),
        ({"key": "abc"}, "64 lower-case hex"),
        ({"attempt": "../escape"}, "32 lower-case hex"),
        ({"samples": None}, "samples"),
        ({"measurements": {"ppl": {"value": "low"}}}, "measurement ppl"),
        ({"measurements": {"ppl": {"value": float("inf")}}}, r"value\.measurements\.ppl\.value is inf"),
        ({"duration_s": 2**1024}, r"value\.duration_s is a whole number of 1025 bits; a record holds numbers up to"),
        ({"samples": [{"id": "a", "nll_sum": -(10**400)}]}, r"value\.samples\[0\]\.nll_sum is a whole number of"),
        ({"samples": [{"nll_sum": float("nan")}]}, r"value\.samples\[0\]\.nll_sum is nan"),
        ({"cell": {"path": Path("x")}}, r"value\.cell\.path is a "),
    ],
)
def test_a_wrong_body_is_not_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        write_record(tmp_path / "r.json", make_body(**changes))
    assert os.listdir(tmp_path) == []


def test_a_missing_field_is_named() -> None:
    body = make_body()
    del body["curves"]
    with pytest.raises(RecordError, match="lacks 'curves'"):
        encode_record(body)


def test_canonical_json_does_not_depend_on_order_and_keeps_letters() -> None:
    assert canonical_json({"b": (1, 2), "a": "\u00e9"}) == '{"a":"\u00e9","b":[1,2]}'
    with pytest.raises(RecordError, match="keys must be text"):
        canonical_json({"a": {1: 2}})


def test_the_cell_key_follows_every_setting() -> None:
    settings = {"policy": {"name": "h2o", "budget_fraction": 0.2}, "seed": 0}
    assert cell_key(settings) == cell_key({"seed": 0, "policy": {"budget_fraction": 0.2, "name": "h2o"}})
    assert cell_key(settings) != cell_key({**settings, "seed": 1})
    assert cell_key({"seed": 0}, schema=1) == "cae0110ff43709808251d2c8169ec5881740a4cc7359c0a49629e3e3d2555acd"
    assert cell_key({"seed": 0}) == "e05ca3d91a7ee48a210917ad02ba359fa408a5dc33874e99801bcf00c47ffdd7"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["open", "write", "fsync", "link"])
def test_a_failing_disk_gives_one_line_and_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "r.json"

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(KvbenchError) as caught:
        write_record(path, make_body())
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError if code == errno.EROFS else RecordError)
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: whole(descriptor, bytes(data[:7])))
    write_record(tmp_path / "r.json", make_body())
    assert read_record(tmp_path / "r.json")["status"] == "ok"


def test_a_file_in_place_of_the_folder_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(ConfigError, match="writable folder"):
        write_record(tmp_path / "results" / "r.json", make_body())


def _envelope(body: dict[str, Any]) -> dict[str, Any]:
    import hashlib

    raw = canonical_json(body).encode()
    return {
        "kvbench_record": 1,
        "body_bytes": len(raw),
        "body_sha256": hashlib.sha256(raw).hexdigest(),
        "body": body,
    }
