"""Every doctored result is caught, by the check meant for it; the real ones pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbench.audit import CHECKS, Audit, audit
from kvbench.results.record import read_record, write_record
from kvbench.stats.intervals import launch_interval
from tests.audit.doctored import DOCTORED
from tests.audit.folders import Change, honest, rekey, write_folder

GPU = Path(__file__).parents[2] / "results" / "published" / "speed_h100"


def failed(result: Audit) -> set[str]:
    return {outcome.id for outcome in result.failed}


def test_the_real_sweep_passes_every_check(tmp_path: Path) -> None:
    result = audit(write_folder(tmp_path, list(honest().values())))
    assert [(o.id, o.findings) for o in result.failed] == []
    assert {o.verdict for o in result.outcomes if o.id not in ("A1", "A2")} == {"passed"}


def one_of_each_check() -> list[Any]:
    """All of them; a default run takes the first that is meant for a check."""
    first = {meant: change for change, meant, _ in reversed(DOCTORED)}
    return [
        pytest.param(*row, id=row[0].__name__, marks=() if first[row[1]] is row[0] else pytest.mark.long)
        for row in DOCTORED
    ]


@pytest.mark.parametrize(("change", "meant", "too"), one_of_each_check())
def test_a_doctored_result_is_caught_by_the_check_meant_for_it(
    tmp_path: Path, change: Change, meant: str, too: set[str]
) -> None:
    bodies = honest()
    change(bodies)
    result = audit(write_folder(tmp_path, list(bodies.values())))
    assert failed(result) == {meant, *too}


def test_there_is_a_doctored_result_for_every_check() -> None:
    by_seal = {"R1"}
    assert {check.id for check in CHECKS} == {meant for _, meant, _ in DOCTORED} | by_seal


def test_a_gpu_that_reads_faster_than_a_copy_is_caught(tmp_path: Path) -> None:
    bodies = [read_record(path) for path in sorted(GPU.glob("cells/*/record.json"))]
    body = next(body for body in bodies if body["labels"]["policy"] == "h2o")
    for row in body["curves"]["launches_ms"]:
        row[1] /= 4
    share = launch_interval([body["measurements"]["roof_ms"]["value"] / r[1] for r in body["curves"]["launches_ms"]])
    body["measurements"]["roof_share_fraction"] |= share.as_measurement()
    result = audit(write_folder(tmp_path, bodies))
    texts = [one.text for outcome in result.failed if outcome.id == "R11" for one in outcome.findings]
    assert any("faster than reading its bytes once" in text for text in texts)


@pytest.mark.parametrize(("fastest", "is_caught"), [(1.05, True), (1.2, False)])
def test_a_share_above_one_is_a_fault_unless_another_cell_saw_a_copy_so_much_faster(
    tmp_path: Path, fastest: float, is_caught: bool
) -> None:
    """Buffers lie badly in some cells of an H200, whose copies are then a tenth slower."""
    bodies = [read_record(path) for path in sorted(GPU.glob("cells/*/record.json"))]
    bodies = [body for body in bodies if body["labels"]["model"] == bodies[0]["labels"]["model"]]
    bodies = [body for body in bodies if body["labels"]["dataset"] == bodies[0]["labels"]["dataset"]]
    body = next(body for body in bodies if body["labels"]["policy"] == "h2o")
    found = body["measurements"]
    slower = 1.1 / found["roof_share_fraction"]["value"]
    for name in ("roof_ms", "full_roof_ms"):
        found[name]["value"] *= slower
    found["copy_bandwidth_bytes_per_s"]["value"] /= slower
    for name, roof, column in (("roof_share_fraction", "roof_ms", 1), ("full_roof_share_fraction", "full_roof_ms", 3)):
        rows = body["curves"]["launches_ms"]
        found[name] |= launch_interval([found[roof]["value"] / row[column] for row in rows]).as_measurement()
    own = found["copy_bandwidth_bytes_per_s"]["value"]
    for other in bodies:
        if other is not body:
            other["measurements"]["copy_bandwidth_bytes_per_s"]["value"] = fastest * own
    result = audit(write_folder(tmp_path, bodies))
    texts = [one.text for outcome in result.failed if outcome.id == "R11" for one in outcome.findings]
    ours = [text for text in texts if "faster than reading its bytes once" in text and text.startswith("roof_share")]
    assert bool(ours) == is_caught


def test_a_record_that_is_no_attempt_is_caught(tmp_path: Path) -> None:
    bodies = honest()
    write_folder(tmp_path, list(bodies.values()))
    body = bodies["h2o 0.2"]
    record = tmp_path / "cells" / body["key"][:16] / "record.json"
    record.unlink()
    body["duration_s"] += 1
    write_record(record, body)
    result = audit(tmp_path)
    assert failed(result) == {"R1"}
    assert "differs from its attempt" in result.failed[0].findings[0].text


def test_a_changed_byte_is_caught(tmp_path: Path) -> None:
    bodies = honest()
    write_folder(tmp_path, list(bodies.values()))
    record = tmp_path / "cells" / bodies["h2o 0.2"]["key"][:16] / "record.json"
    record.write_bytes(record.read_bytes().replace(b"There are", b"There ARE", 1))
    result = audit(tmp_path)
    assert failed(result) == {"R1"}
    assert "checksum" in result.failed[0].findings[0].text
    assert result.num_cells == 4


def test_a_worse_attempt_in_the_place_of_a_good_one_is_caught(tmp_path: Path) -> None:
    bodies = honest()
    write_folder(tmp_path, list(bodies.values()))
    body = bodies["random 0.2"]
    folder = tmp_path / "cells" / body["key"][:16]
    error = {"type": "Timeout", "message": "", "traceback": ""}
    body |= {"attempt": "0" * 32, "status": "timeout", "error": error, "phase": "speed", "measurements": {}}
    write_record(folder / f"attempt-{body['attempt']}.json", body)
    (folder / "record.json").unlink()
    (folder / "record.json").hardlink_to(folder / f"attempt-{body['attempt']}.json")
    assert failed(audit(tmp_path)) == {"R1"}


def test_a_mask_is_caught_where_costs_alone_were_measured(tmp_path: Path) -> None:
    bodies = list(honest().values())
    for body in bodies:
        body["curves"].pop("entries")
        body["samples"] = []
        costs = ("kv_", "peak_", "plain_")
        body["measurements"] = {n: e for n, e in body["measurements"].items() if n.startswith(costs)}
        body["cell"]["task"] = {"memory": body["cell"]["task"]["memory"]}
        rekey(body)
    assert failed(audit(write_folder(tmp_path / "honest", bodies))) == set()
    masked = next(body for body in bodies if body["labels"]["budget_fraction"] == 0.2)
    full = next(body for body in bodies if body["labels"]["policy"] == "full")
    masked["measurements"]["kv_stored_bytes"] = full["measurements"]["kv_stored_bytes"]
    assert "R9" in failed(audit(write_folder(tmp_path / "masked", bodies)))
