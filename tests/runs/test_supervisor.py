"""The supervisor with workers that need no torch: who is blamed, who is tried again, who goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbench.records import check_body
from kvbench.runs.cell import Attempt
from kvbench.runs.supervisor import Events, Supervisor, Ticket, WorkerPlan
from kvbench.runs.watchdog import Limits
from tests.runs.benches import cell_of

GOOD = ["beat 0", "done ok"]


class Sweep:
    """Runs scripts and writes down what the supervisor says; times are generous for slow machines."""

    def __init__(self, folder: Path, **options: Any) -> None:
        limits = Limits(timeout_s=options.pop("timeout_s", None), silence_s=options.pop("silence_s", 60.0))
        self.plan = WorkerPlan(
            results=folder,
            sweep="s",
            share_prompts=True,
            limits=limits,
            num_retries=options.pop("num_retries", 1),
            slots=options.pop("slots", [{}]),
            entry="tests.runs.fake_worker",
        )
        self.tick: Callable[[], bool] = options.pop("tick", lambda: True)
        self.ended: list[tuple[int, dict[str, Any], bool]] = []
        self.active: list[int] = []
        self.number: dict[str, int] = {}

    def run(self, *groups: Sequence[list[str]]) -> list[tuple[int, str, str | None, bool]]:
        tickets = [[self.ticket(script) for script in group] for group in groups]

        def ended(body: dict[str, Any], final: bool) -> None:
            check_body(body)
            self.ended.append((self.number[body["key"]], body, final))

        events = Events(
            active=lambda key: self.active.append(self.number[key]),
            advance=lambda key, tasks: None,
            ended=ended,
            tick=self.tick,
        )
        before = psutil.Process().children()  # such as W&B's service of an earlier test
        Supervisor(self.plan, events).run(tickets)
        assert set(psutil.Process().children()) <= set(before), "no worker is left"
        return [(number, body["status"], body["phase"], final) for number, body, final in self.ended]

    def ticket(self, script: list[str]) -> Ticket:
        cell = cell_of({}, number=len(self.number))
        self.number[cell.key] = len(self.number)
        body = Attempt(cell=cell, sweep="s", phase=None).body({})
        return Ticket(cell=cell, spec={"config": {"script": script, "body": body}, "choices": {}})

    def body(self, number: int) -> dict[str, Any]:
        return next(body for ended, body, _ in self.ended if ended == number)


def test_a_group_runs_in_one_worker(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    assert sweep.run([GOOD, GOOD]) == [(0, "ok", None, True), (1, "ok", None, True)]
    assert len(list((tmp_path / "logs").iterdir())) == 1
    assert sweep.active == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("word", "status", "kind", "tries"),
    [
        ("signal 9", "killed", "SIGKILL", 2),
        ("signal 15", "killed", "SIGTERM", 2),
        ("signal 11", "crash", "SIGSEGV", 1),
        ("signal 6", "crash", "SIGABRT", 1),
        ("exit 0", "crash", "ProcessExit", 1),
        ("exit 3", "crash", "ProcessExit", 1),
    ],
)
def test_a_death_costs_the_cell_that_was_active(tmp_path: Path, word: str, status: str, kind: str, tries: int) -> None:
    sweep = Sweep(tmp_path)
    told = sweep.run([GOOD, ["beat 0", word], GOOD])
    last = {number: (told_status, phase) for number, told_status, phase, final in told if final}
    assert last == {0: ("ok", None), 1: (status, "phase 1"), 2: ("ok", None)}
    assert len([1 for number, *_ in told if number == 1]) == tries
    assert sweep.body(1)["error"]["type"] == kind
    assert sweep.body(1)["environment"]["torch"] == "none"


def test_a_cell_that_is_killed_once_passes_at_the_second_try(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    told = sweep.run([["once signal 9", "done ok"], GOOD])
    assert told == [(0, "killed", "phase 0", False), (1, "ok", None, True), (0, "ok", None, True)]
    assert sweep.ended[-1][1]["tries"] == 2


def test_a_cell_that_runs_out_of_memory_by_itself_is_tried_once_more_alone(tmp_path: Path) -> None:
    told = Sweep(tmp_path).run([["done oom"], ["done crash"], GOOD])
    assert [(n, s, final) for n, s, _, final in told] == [
        *((0, "oom", False), (1, "crash", True), (2, "ok", True), (0, "oom", True)),
    ]
    assert Sweep(tmp_path, num_retries=0).run([["done oom"]])[0][3] is True


@pytest.mark.long
def test_a_worker_that_does_nothing_is_stopped_and_its_stacks_are_kept(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, silence_s=5.0)
    told = sweep.run([["say something", "deaf", "sleep 300"], GOOD])
    assert told == [(0, "timeout", "phase 2", True), (1, "ok", None, True)]
    error = sweep.body(0)["error"]
    assert "silence_s=5" in error["message"]
    assert "something" in error["traceback"]
    assert "_do" in error["traceback"]


def test_a_cell_that_takes_too_long_is_stopped_though_it_makes_steps(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, timeout_s=2.0, silence_s=None)
    assert sweep.run([["beat 300"], GOOD]) == [(0, "timeout", "phase 0", True), (1, "ok", None, True)]
    assert "timeout_s=2" in sweep.body(0)["error"]["message"]
    assert sweep.body(0)["duration_s"] >= 0


def test_a_worker_that_cannot_start_is_tried_again_and_then_ends_its_group_only(tmp_path: Path) -> None:
    (tmp_path / "dies-at-start").touch()
    told = Sweep(tmp_path).run([GOOD, GOOD, GOOD])
    assert [(n, s, p) for n, s, p, final in told if final] == [(n, "crash", "load") for n in range(3)]
    assert len(list((tmp_path / "logs").iterdir())) == 2


def test_every_slot_gets_a_worker_with_its_own_environment(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, slots=[{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "5"}])
    sweep.run([["beat 1", "signal 11"]], [["beat 1", "signal 11"]])
    assert sorted(body["environment"]["gpu"] for _, body, _ in sweep.ended) == ["4", "5"]


def test_being_told_to_stop_records_the_active_cell_and_leaves_the_others(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.tick = lambda: 1 not in sweep.active
    told = sweep.run([GOOD, ["sleep 3000"], GOOD], [GOOD])  # which pytest's own limit would end
    assert told == [(0, "ok", None, True), (1, "preempted", "phase 0", True)]


def test_what_fails_in_the_parent_ends_the_workers_too(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)

    def broken() -> bool:
        if sweep.active:
            raise OSError("the disk is gone")
        return True

    sweep.tick = broken
    before = psutil.Process().children()
    with pytest.raises(OSError, match="the disk is gone"):
        sweep.run([["sleep 300"]])
    assert set(psutil.Process().children()) <= set(before)


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            sweep = Sweep(tmp_path)
            sweep.tick = lambda: not sweep.active or os._exit(7)  # type: ignore[func-returns-value]
            sweep.run([["say alive", "sleep 300"]])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for _ in range(300):
        if not [p for p in psutil.process_iter(["cmdline"]) if _is_worker(p, child)]:
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its parent")


def _is_worker(process: psutil.Process, parent: int) -> bool:
    try:
        return process.ppid() == parent
    except psutil.Error:
        return False
