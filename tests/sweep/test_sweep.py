"""A sweep with workers that need no torch: reuse, force, other owners, records, sinks, being stopped."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from kvbench.results.claims import Claims
from kvbench.results.store import PartialStore, RecordStore
from kvbench.sinks import SinkGroup
from kvbench.sweep.cell import Attempt
from kvbench.sweep.supervisor import Ticket, WorkerPlan, WorkerSettings
from kvbench.sweep.sweep import Progress, StopRequest, Sweep
from kvbench.tasks.perplexity import Perplexity
from tests.tasks.benches import cell_of

OK = ["done ok"]


class Shown:
    """A sink that keeps what it is shown."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def open(self, sweep: str, num_cells: int) -> None:
        self.calls.append(f"open {sweep} {num_cells}")

    def record(self, body: dict[str, Any]) -> None:
        self.calls.append(str(body["status"]))

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture(autouse=True)
def _fake_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def plan(self: WorkerSettings, tickets: Any, *, results: Path, sweep: str) -> WorkerPlan:
        from kvbench.sweep.process import Limits

        return WorkerPlan(
            results=results,
            sweep=sweep,
            share_prompts=True,
            limits=Limits(timeout_s=None, silence_s=60.0),
            num_retries=1,
            slots=[{}],
            entry="tests.sweep.fake_worker",
        )

    monkeypatch.setattr(WorkerSettings, "plan", plan)
    return None


def sweep_of(folder: Path, *scripts: list[str], force: bool = False, **settings: Any) -> tuple[Sweep, Shown]:
    tickets = []
    for number, script in enumerate(scripts):
        cell = cell_of(dict.fromkeys("ab", Perplexity()), number=number)
        body = Attempt(cell=cell, sweep="s", phase=None).body({})
        tickets.append(Ticket(cell=cell, spec={"config": {"script": script, "body": body}, "choices": {}}))
    shown = Shown()
    sweep = Sweep(
        name="s",
        results=folder,
        tickets={ticket.cell.key: ticket for ticket in tickets},
        workers=WorkerSettings(**settings),
        sinks=SinkGroup([shown]),
        claims=Claims(folder, owner="test", lease_s=5.0),
        force=force,
    )
    sweep.open()
    return sweep, shown


def fresh(body_scripts: tuple[list[str], ...], folder: Path, **options: Any) -> tuple[Sweep, Shown]:
    sweep, shown = sweep_of(folder, *body_scripts, **options)
    sweep.run(StopRequest())
    return sweep, shown


def test_what_failed_runs_again_and_what_is_done_is_left_alone(tmp_path: Path) -> None:
    first, shown = fresh((OK, ["done crash"], OK), tmp_path)
    assert list(first.statuses.values()) == ["ok", "crash", "ok"]
    assert (first.num_failed, first.num_reused) == (1, 0)
    assert shown.calls == ["open s 3", "ok", "crash", "ok", "close"]
    second, shown = fresh((OK, OK, OK), tmp_path)
    assert (second.num_failed, second.num_reused, shown.calls) == (0, 2, ["open s 3", "ok", "close"])
    third, shown = fresh((["signal 9"], OK, OK), tmp_path)
    assert (third.num_reused, shown.calls) == (3, []), "nothing is started and no sink is opened"
    assert not list((tmp_path / "claims").glob("[!.]*")), "every claim is given back"


def test_a_noisy_cell_is_measured_and_left_alone(tmp_path: Path) -> None:
    first, shown = fresh((["done noisy"], OK), tmp_path)
    assert (list(first.statuses.values()), first.num_failed) == (["noisy", "ok"], 0)
    again, shown = fresh((["signal 9"], OK), tmp_path)
    assert (list(again.statuses.values()), again.num_reused, shown.calls) == (["noisy", "ok"], 2, [])


def test_force_measures_again_and_the_newer_record_counts(tmp_path: Path) -> None:
    before, _ = fresh((OK,), tmp_path)
    (key,) = before.tickets
    PartialStore(tmp_path, key).commit(0, {"old": 1})
    forced, _ = fresh((OK,), tmp_path, force=True)
    assert forced.num_reused == 0
    assert not PartialStore(tmp_path, key).batches()
    attempts = RecordStore(tmp_path).attempts(key)
    accepted = RecordStore(tmp_path).accepted(key)
    assert accepted is not None
    assert (len(attempts), accepted["attempt"]) == (2, attempts[-1]["attempt"])


@pytest.mark.parametrize("script", [["done crash"], ["exit 3"], ["done timeout"]])
def test_a_forced_cell_that_fails_is_told_and_keeps_the_measurement_it_had(tmp_path: Path, script: list[str]) -> None:
    before, _ = fresh((OK,), tmp_path)
    (key,) = before.tickets
    kept = RecordStore(tmp_path).accepted(key)
    forced, shown = fresh((script,), tmp_path, force=True)
    assert forced.num_failed == 1, "the sweep says that it failed"
    assert RecordStore(tmp_path).accepted(key) == kept
    again, shown = fresh((["signal 9"],), tmp_path)
    assert (again.num_reused, shown.calls) == (1, []), "and nothing has to be measured again"


def test_both_tries_of_a_killed_cell_are_kept(tmp_path: Path) -> None:
    sweep, shown = fresh((["once signal 9", "done ok"],), tmp_path)
    (key,) = sweep.tickets
    assert {body["status"] for body in RecordStore(tmp_path).attempts(key)} == {"killed", "ok"}
    assert shown.calls == ["open s 1", "ok", "close"], "sinks see the end only"
    assert sweep.num_failed == 0


def test_a_cell_that_another_process_holds_is_waited_for_and_not_measured_twice(tmp_path: Path) -> None:
    sweep, _ = sweep_of(tmp_path, OK, OK)
    first, second = sweep.tickets
    other = Claims(tmp_path, owner="other")
    claim = other.take(second)
    assert claim is not None

    def finish() -> None:
        time.sleep(0.5)
        RecordStore(tmp_path).commit(Attempt(cell=sweep.tickets[second].cell, sweep="other", phase=None).body({}))
        claim.release()

    thread = threading.Thread(target=finish)
    thread.start()
    sweep.run(StopRequest())
    thread.join()
    assert sweep.statuses == {first: "ok", second: "ok"}
    (body,) = RecordStore(tmp_path).attempts(second)
    assert body["sweep"] == "other"


def when_active(monkeypatch: pytest.MonkeyPatch, wanted: str, work: Callable[[], object]) -> None:
    """Do `work` once, as soon as the sweep hears that a worker is at this cell."""
    show, todo = Progress.show, [work]

    def noting(progress: Progress, key: str) -> None:
        show(progress, key)
        if key == wanted and todo:
            todo.pop()()

    monkeypatch.setattr(Progress, "show", noting)


def test_few_cells_are_claimed_at_once_where_machines_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, _ = sweep_of(tmp_path, ["beat 0", "done ok"], OK, OK, group_cells=1)
    keys = list(sweep.tickets)
    free: list[bool] = []

    def look() -> None:
        for key in keys[1:]:
            claim = Claims(tmp_path, owner="other").take(key)
            free.append(claim is not None)
            if claim is not None:
                claim.release()

    when_active(monkeypatch, keys[0], look)
    sweep.run(StopRequest())
    assert free == [True, True]
    assert list(sweep.statuses.values()) == ["ok"] * 3


@pytest.mark.cover("one")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR2, 140)])
def test_a_signal_ends_the_sweep_cleanly_and_the_next_one_goes_on(
    tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, shown = sweep_of(tmp_path, OK, ["beat 0", "sleep 3000"], OK)
    when_active(monkeypatch, list(sweep.tickets)[1], lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with StopRequest().watching() as stop:
        sweep.run(stop)
    assert (stop.number, stop.exit_code, signal.getsignal(number)) == (number, code, before)
    assert list(sweep.statuses.values()) == ["ok", "preempted"]
    assert shown.calls == ["open s 3", "ok", "preempted", "close"]
    assert sweep.num_failed == 2
    again, _ = fresh((OK, OK, OK), tmp_path)
    assert (again.num_reused, again.num_failed) == (1, 0)


def test_jobs_elsewhere_are_judged_by_what_they_left(tmp_path: Path) -> None:
    sweep, _ = sweep_of(tmp_path, OK, OK, OK, OK)
    ok, failed, lost, alive = sweep.tickets
    known = sweep.attempt_ids
    store = RecordStore(tmp_path)
    store.commit(Attempt(cell=sweep.tickets[ok].cell, sweep="s", phase=None).body({}))
    store.commit(Attempt(cell=sweep.tickets[failed].cell, sweep="s", phase="load", status="oom").body({}))
    other = Claims(tmp_path, owner="other").take(alive)
    sweep.gather(known)
    assert sweep.statuses == {ok: "ok", failed: "oom", lost: "killed"}
    assert sweep.num_failed == 3
    assert store.attempts(lost)[0]["error"]["type"] == "JobLost"
    assert not store.attempts(alive)
    assert other is not None
    other.release()


def attempt(sweep: Sweep, key: str, status: str, year: int) -> dict[str, Any]:
    """An attempt by a machine whose clock is in `year`."""
    started = datetime(year, 1, 1, tzinfo=UTC)
    return Attempt(cell=sweep.tickets[key].cell, sweep="s", phase="load", status=status, started=started).body({})


@pytest.mark.parametrize("year", [2001, 2101])
def test_what_a_job_left_is_told_by_its_name_whatever_the_clocks_say(tmp_path: Path, year: int) -> None:
    sweep, _ = sweep_of(tmp_path, OK, OK, OK)
    crashed, requeued, lost = sweep.tickets
    store = RecordStore(tmp_path)
    store.commit(attempt(sweep, lost, "oom", 2050))
    known = sweep.attempt_ids
    store.commit(attempt(sweep, crashed, "crash", year))
    for status, when in (("preempted", 2050), ("crash", year)):  # one job, twice, on two machines
        store.commit(attempt(sweep, requeued, status, when))
    sweep.gather(known)
    assert sweep.statuses == {crashed: "crash", requeued: "crash", lost: "killed"}


def test_a_forced_cell_is_judged_by_its_new_attempt_only(tmp_path: Path) -> None:
    sweep, _ = sweep_of(tmp_path, OK, OK, force=True)
    failed, measured = sweep.tickets
    store = RecordStore(tmp_path)
    for key in sweep.tickets:
        store.commit(attempt(sweep, key, "ok", 2020))
    known = sweep.attempt_ids
    store.commit(attempt(sweep, failed, "oom", 2010))
    store.commit(attempt(sweep, measured, "ok", 2010))
    sweep.gather(known)
    assert sweep.statuses == {failed: "oom", measured: "ok"}


def test_a_sink_is_shown_a_cell_before_the_next_one_is_timed(tmp_path: Path) -> None:
    sweep, shown = sweep_of(tmp_path, OK, ["timed second", "done ok"])
    timed: list[bool] = []
    shown.record = lambda body: timed.append((tmp_path / "second").exists())  # type: ignore[method-assign]
    sweep.run(StopRequest())
    assert timed == [False, True]
