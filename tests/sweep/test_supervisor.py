"""The supervisor with workers that need no torch: who is blamed, who is tried again, who goes on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbench.results.claims import Claims
from kvbench.results.record import encode_record
from kvbench.sweep import supervisor
from kvbench.sweep.cell import Attempt
from kvbench.sweep.process import Begun, Limits, Reserve
from kvbench.sweep.supervisor import Events, HeldClaims, Supervisor, Ticket, WorkerPlan, WorkerSettings
from tests.sweep.simulated import Simulated, simulate
from tests.tasks.benches import cell_of

GOOD = ["beat 0", "done ok"]
ENTRY = "tests.sweep.fake_worker"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids of all processes that begin, in order."""
    pids: list[int] = []

    class Noted(Begun):
        def __init__(self, *of: Any, **options: Any) -> None:
            super().__init__(*of, **options)
            pids.append(self.process.pid)

    monkeypatch.setattr("kvbench.sweep.process.Begun", Noted)
    return pids


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
            entry=ENTRY,
            begins_early=options.pop("begins_early", False),
        )
        self.before = psutil.Process().children()
        self.reserve = Reserve()
        self.tick: Callable[[], bool] = options.pop("tick", lambda: True)
        self.ended: list[tuple[int, dict[str, Any], bool]] = []
        self.active: list[int] = []
        self.number: dict[str, int] = {}

    def run(self, *groups: Sequence[list[str]]) -> list[tuple[int, str, str | None, bool]]:
        tickets = [[self.ticket(script) for script in group] for group in groups]

        def ended(body: dict[str, Any], final: bool) -> None:
            encode_record(body)  # as the store does
            self.ended.append((self.number[body["key"]], body, final))

        events = Events(
            active=lambda key: self.active.append(self.number[key]),
            advance=lambda key, tasks: None,
            batches=lambda key, done, total: None,
            ended=ended,
            tick=self.tick,
        )
        before = self.before or psutil.Process().children()  # such as W&B's service of an earlier test
        Supervisor(self.plan, events, reserve=self.reserve).run(tickets)
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


@pytest.mark.long
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


NO_MESSAGES = (
    *("5", "null", '"done"', "[1, 2]", "{}", '{"event": "beat"}', '{"event": 3, "at_s": 0}', "{", "[" * 100_000),
    *('{"event": "beat", "at_s": "now"}', '{"event": "beat", "at_s": NaN}', '{"event": "beat", "at_s": 1e999}'),
    *('{"event": "active", "key": "k", "phase": "p", "timed": false, "at_s": 1}', '{"event": "active", "at_s": 1}'),
    *('{"event": "done", "at_s": 1}', '{"event": "done", "body": 1, "at_s": 1}', '{"event": "bye", "at_s": true}'),
    *('{"event": "done", "body": {"key": ["k"]}, "at_s": 1}', '{"event": "hello", "environment": [], "at_s": 1}'),
    *('{"event": "advance", "key": "k", "tasks": "many", "at_s": 1}', '{"event": "beat", "at_s": 1' + "0" * 400 + "}"),
)


def test_what_is_no_message_costs_nothing(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    scripts = [[f"raw {line}\n" for line in NO_MESSAGES], ["raw \xff\n", 'raw {"event": "no end'], []]
    told = sweep.run([[*script, *GOOD] for script in scripts])
    assert told == [(0, "ok", None, True), (1, "ok", None, True), (2, "ok", None, True)]


def test_what_is_no_record_is_the_failure_of_its_cell(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    assert sweep.run([["badly"], GOOD]) == [(0, "crash", "report", True), (1, "ok", None, True)]
    assert sweep.body(0)["error"]["type"] == "RecordError"
    assert "the body lacks" in sweep.body(0)["error"]["message"]


def test_what_no_record_can_hold_is_the_failure_of_its_cell_though_its_form_is_right(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    told = sweep.run([[f"unwritable {kind}"] for kind in ("text", "list", "number")], [GOOD])
    assert told == [*((number, "crash", "report", True) for number in range(3)), (3, "ok", None, True)]
    assert "half a surrogate pair" in sweep.body(0)["error"]["message"]


def test_a_worker_that_leaves_without_a_record_is_not_started_for_ever(tmp_path: Path) -> None:
    told = Sweep(tmp_path).run([["bye"], GOOD])
    assert told == [(0, "crash", "phase 0", True), (1, "ok", None, True)]


def test_a_death_after_a_cells_record_costs_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = Sweep(tmp_path).run([["done ok", "signal 11"], GOOD, ["done ok", "signal 9"]])
    assert told == [(0, "ok", None, True), (1, "ok", None, True), (2, "ok", None, True)]
    assert "phase 1 of p at -: the worker process was ended by SIGSEGV; its record is safe" in caplog.text


def test_being_stopped_after_a_cells_record_leaves_it_alone(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.tick = lambda: len(sweep.active) < 2
    assert sweep.run([["done ok", "sleep 300"], GOOD]) == [(0, "ok", None, True)]


def test_the_last_words_are_those_of_the_attempt_and_not_of_an_earlier_one(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.run([["once say the first word", "signal 9"]])
    first, second = (body["error"]["traceback"] for _, body, _ in sweep.ended)
    assert first == "the first word\n"
    assert second == ""
    assert "the first word" in next((tmp_path / "logs").iterdir()).read_text()


@pytest.mark.long
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


def test_a_process_that_has_begun_gets_the_job_and_no_other_is_started(tmp_path: Path, begun: list[int]) -> None:
    sweep = Sweep(tmp_path, slots=[{"CUDA_VISIBLE_DEVICES": "4"}])
    sweep.reserve.begin({"CUDA_VISIBLE_DEVICES": "4"}, entry=ENTRY)
    told = sweep.run([["say its log", "exit 3"]])
    assert told == [(0, "crash", "phase 1", True)]
    assert len(begun) == 1
    assert sweep.body(0)["environment"]["gpu"] == "4"
    assert sweep.body(0)["error"]["traceback"] == "its log\n", "from the job on it writes where any worker does"


def test_the_variables_of_now_are_a_workers_and_not_those_of_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "before")
    sweep = Sweep(tmp_path)
    sweep.reserve.begin({}, entry=ENTRY)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "now")
    sweep.run([["exit 3"]])
    assert sweep.body(0)["environment"]["gpu"] == "now"


def test_a_process_for_another_slot_or_one_that_died_is_not_taken_but_ended(tmp_path: Path, begun: list[int]) -> None:
    sweep = Sweep(tmp_path)
    sweep.reserve.begin({"CUDA_VISIBLE_DEVICES": "4"}, entry=ENTRY)
    sweep.reserve.begin({}, entry=ENTRY)
    psutil.Process(begun[1]).kill()
    psutil.Process(begun[1]).wait()
    assert sweep.run([GOOD]) == [(0, "ok", None, True)]
    assert len(begun) == 3
    assert len(sweep.reserve) == 0


def test_a_process_that_is_never_given_a_job_ends_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    begun = Begun({}, entry=ENTRY)
    assert begun.process.stdin is not None
    begun.process.stdin.close()
    assert begun.process.wait() == 0
    begun.end()
    reserve = Reserve()
    reserve.begin({}, entry=ENTRY)
    reserve.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("begins_early", [True, False])
def test_the_next_groups_process_begins_beside_a_cell_only_where_it_may(
    begins_early: bool, tmp_path: Path, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep(tmp_path, begins_early=begins_early)
    beside: list[list[int]] = []
    begin = sweep.reserve.begin

    def noted(*of: Any, **options: Any) -> None:
        beside.append([pid for pid in begun if psutil.pid_exists(pid)])
        begin(*of, **options)

    monkeypatch.setattr(sweep.reserve, "begin", noted)
    told = sweep.run([["beat 0.3", "done ok"]], [["beat 0.3", "done ok"]])
    assert told == [(0, "ok", None, True), (1, "ok", None, True)]
    assert len(begun) == 2, "one for each group, however early"
    assert beside == ([begun[:1]] if begins_early else [])


def test_nothing_begins_for_a_group_that_is_not_there(tmp_path: Path, begun: list[int]) -> None:
    sweep = Sweep(tmp_path, begins_early=True, slots=[{}, {}])
    sweep.run([["beat 0.2", "done ok"]], [["beat 0.2", "done ok"]])
    assert len(begun) == 2


def test_what_can_be_done_meanwhile_is_done_once_when_the_first_workers_are_there(
    tmp_path: Path, begun: list[int]
) -> None:
    sweep, started = Sweep(tmp_path), []
    tickets = [[sweep.ticket(GOOD)], [sweep.ticket(GOOD)]]
    nothing: Any = lambda *_: None  # noqa: E731
    events = Events(
        active=nothing,
        advance=nothing,
        batches=nothing,
        ended=nothing,
        tick=lambda: True,
        started=lambda: started.append(len(begun)),
    )
    Supervisor(sweep.plan, events).run(tickets)
    assert started == [1]


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
    for _ in range(5000):  # of a tenth of a second, within the limit of pytest
        if not [p for p in psutil.process_iter(["cmdline"]) if _is_worker(p, child)]:
            return
        time.sleep(0.1)
    raise AssertionError("the worker outlived its parent")


def _is_worker(process: psutil.Process, parent: int) -> bool:
    try:
        return process.ppid() == parent
    except psutil.Error:
        return False


def said(pause_s: float, event: str, **content: Any) -> tuple[float, dict[str, Any]]:
    return pause_s, {"event": event, **content}


class Quiet:
    """What a sweep is told by simulated workers, in order; claims with a lease of a minute."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, slots: int = 1, num_cells: int = 3, **limits: Any
    ) -> None:
        self.cells = [cell_of({}, number=number) for number in range(num_cells)]
        self.keys = [cell.key for cell in self.cells]
        self.bodies = [Attempt(cell=cell, sweep="s", phase=None).body({}) for cell in self.cells]
        self.scripts: dict[str, Any] = {}
        self.clock, self.selector = simulate(monkeypatch, self.scripts)
        self.plan = WorkerPlan(
            results=folder,
            sweep="s",
            share_prompts=True,
            limits=Limits(timeout_s=limits.get("timeout_s"), silence_s=limits.get("silence_s", 900.0)),
            num_retries=0,
            slots=[{}] * slots,
        )
        self.claims = HeldClaims(Claims(folder, lease_s=60.0))
        self.told: list[str] = []
        self.beats_s: list[float] = []
        self.waiting: list[str] = []

    def run(self, *groups: Sequence[int]) -> None:
        self.claims.take(self.keys[:1], None)
        tickets = [[Ticket(cell=self.cells[number], spec={}) for number in group] for group in groups]
        events = Events(
            active=lambda key: None,
            advance=lambda key, tasks: None,
            batches=lambda key, done, total: None,
            ended=self._ended,
            tick=self._tick,
            due_s=self.claims.due_s,
            quiet=self._quiet,
        )
        Supervisor(self.plan, events, selector=self.selector).run(tickets)
        self.claims.release_all()

    def _ended(self, body: dict[str, Any], final: bool) -> None:
        self.waiting.append(f"{self.keys.index(body['key'])} {body['status']} at {self.clock.now_s:.0f}")

    def _tick(self) -> bool:
        if self.claims.due_s() == 0.0:
            self.beats_s.append(self.clock.now_s)
        self.claims.beat()
        return True

    def _quiet(self) -> None:
        assert not any(worker.is_timing and not worker.ended for worker in Simulated.all)
        self.told += [f"{what}, shown at {self.clock.now_s:.0f}" for what in self.waiting]
        self.waiting.clear()

    def active(self, pause_s: float, number: int, *, timed: bool = False) -> Any:
        return said(pause_s, "active", key=self.keys[number], phase="p", timed=timed)

    def done(self, pause_s: float, number: int) -> Any:
        return said(pause_s, "done", body=self.bodies[number])


def test_it_sleeps_until_a_message_or_a_deadline_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Quiet(tmp_path, monkeypatch)
    beats = [said(45.0, "beat") for _ in range(10)]
    quiet.scripts[quiet.keys[0]] = [quiet.active(1.0, 0), *beats, quiet.done(1.0, 0), said(0.0, "bye"), (0.5, None)]
    quiet.run([0])
    num_leases = len(quiet.beats_s)
    assert quiet.told == ["0 ok at 452, shown at 452"]
    assert quiet.selector.num_wakes <= 10 + 3 + num_leases + 2, "ten times a second it were 4,520"
    assert num_leases == pytest.approx(452 / 12, abs=2)
    gaps = [after - before for before, after in zip(quiet.beats_s, quiet.beats_s[1:], strict=False)]
    assert max(gaps) < 12.1, "a fifth of the lease"


@pytest.mark.parametrize(
    ("limits", "at_s"), [({"silence_s": 900.0}, 901), ({"silence_s": None, "timeout_s": 70.0}, 71)]
)
def test_it_wakes_up_when_a_worker_is_over_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], at_s: int
) -> None:
    quiet = Quiet(tmp_path, monkeypatch, **limits)
    quiet.scripts[quiet.keys[0]] = [quiet.active(1.0, 0)]
    quiet.run([0])
    assert quiet.told == [f"0 timeout at {at_s}, shown at {at_s}"]
    assert quiet.selector.num_wakes < 5 + at_s / 12 + 1


def test_without_limits_and_leases_it_sleeps_until_it_hears_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Quiet(tmp_path, monkeypatch, silence_s=None)
    monkeypatch.setattr(quiet.claims, "take", lambda keys, most: [])
    quiet.scripts[quiet.keys[0]] = [quiet.active(9e5, 0), quiet.done(1e6, 0), said(0.0, "bye"), (0.0, None)]
    quiet.run([0])
    assert quiet.told == ["0 ok at 1900000, shown at 1900000"]
    assert quiet.selector.num_wakes <= 4


def test_a_worker_begins_to_time_after_what_had_to_wait_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Quiet(tmp_path, monkeypatch, silence_s=50.0, timeout_s=100.0)
    quiet.scripts[quiet.keys[0]] = [
        *(quiet.active(1.0, 0), quiet.done(5.0, 0), quiet.active(0.0, 1, timed=True)),
        *(quiet.done(40.0, 1), said(0.0, "bye"), (0.1, None)),
    ]
    show = quiet._quiet

    def slow() -> None:
        before = len(quiet.told)
        show()
        quiet.clock.now_s += 200.0 * (len(quiet.told) - before)  # W&B does not answer

    monkeypatch.setattr(quiet, "_quiet", slow)
    quiet.run([0, 1])
    assert quiet.told == ["0 ok at 6, shown at 6", "1 ok at 246, shown at 246"], "and its waiting is no silence"


def test_workers_time_one_after_the_other_and_beside_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Quiet(tmp_path, monkeypatch, slots=2)
    quiet.scripts[quiet.keys[0]] = [
        *(quiet.active(1.0, 0), quiet.done(4.0, 0), quiet.active(1.0, 1, timed=True)),
        *(quiet.done(44.0, 1), said(0.0, "bye"), (0.1, None)),
    ]
    quiet.scripts[quiet.keys[2]] = [
        quiet.active(1.0, 2, timed=True),
        quiet.done(29.0, 2),
        said(0.0, "bye"),
        (0.1, None),
    ]
    quiet.run([0, 1], [2])
    # The second worker asked at 1 s, when the first was at work until 6 s; then it went first, and for 29 s.
    assert quiet.told == ["0 ok at 5, shown at 5", "2 ok at 35, shown at 35", "1 ok at 79, shown at 79"]


def test_no_worker_is_started_beside_one_that_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Quiet(tmp_path, monkeypatch, slots=2)
    ends = [said(0.0, "bye"), (0.0, None)]
    quiet.scripts[quiet.keys[0]] = [quiet.active(1.0, 0, timed=True), quiet.done(50.0, 0), *ends]
    quiet.scripts[quiet.keys[1]] = [quiet.active(1.0, 1), quiet.done(9.0, 1), *ends]
    quiet.scripts[quiet.keys[2]] = [quiet.active(2.0, 2), quiet.done(3.0, 2), *ends]
    quiet.run([0], [1], [2])
    assert quiet.told == ["1 ok at 10, shown at 10", "0 ok at 60, shown at 60", "2 ok at 65, shown at 65"]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_what_is_not_timed_is_shared_out_and_takes_its_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    quiet = Quiet(tmp_path, monkeypatch, slots=slots, num_cells=6)
    for number in range(6):  # whichever worker gets a cell first, its script goes on with the cells after it
        size = 6 // slots
        mine = range(number, number + size)
        quiet.scripts[quiet.keys[number]] = [
            *(message for cell in mine if cell < 6 for message in (quiet.active(0.0, cell), quiet.done(100.0, cell))),
            *(said(0.0, "bye"), (0.0, None)),
        ]
    monkeypatch.setattr(supervisor, "slots_of", lambda tickets: [{}] * slots)
    tickets = [Ticket(cell=cell, spec={}) for cell in quiet.cells]
    groups = WorkerSettings().groups(tickets)
    assert [len(group) for group in groups] == [6 // slots] * slots
    quiet.run(*([quiet.cells.index(ticket.cell) for ticket in group] for group in groups))
    assert len(quiet.told) == 6
    assert quiet.clock.now_s == pytest.approx(600 / slots, abs=1.0)
