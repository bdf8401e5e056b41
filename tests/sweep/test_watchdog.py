from __future__ import annotations

import signal
from pathlib import Path

import pytest

from kvbench.sweep.process import Limits, Watchdog, num_oom_kills, verdict_on


def dog(**limits: float) -> Watchdog:
    given = {"timeout_s": None, "silence_s": None, **limits}
    return Watchdog(limits=Limits(**given), now_s=100.0)


def test_without_limits_nothing_is_ever_wrong() -> None:
    watchdog = dog()
    watchdog.start("a", "load", 101.0)
    assert watchdog.complaint(1e9) is None


def test_silence_counts_from_the_last_message_also_before_the_first() -> None:
    watchdog = dog(silence_s=10.0)
    assert watchdog.complaint(110.0) is None
    assert "silence_s=10" in str(watchdog.complaint(110.1))
    watchdog.hear(109.0)
    assert watchdog.complaint(119.0) is None
    assert watchdog.complaint(119.1) is not None


def test_time_is_counted_for_each_cell_over_all_its_turns() -> None:
    watchdog = dog(timeout_s=10.0)
    watchdog.start("a", "one", 100.0)
    watchdog.start("b", "one", 106.0)
    watchdog.start("a", "two", 109.0)
    assert watchdog.complaint(112.9) is None, "6 + 3.9 seconds"
    assert "timeout_s=10" in str(watchdog.complaint(113.1))
    watchdog.end(111.0)
    assert watchdog.complaint(1000.0) is None
    assert watchdog.spent_s == {"a": 8.0, "b": 3.0}


def test_a_late_reader_does_not_blame_the_worker() -> None:
    watchdog = dog(timeout_s=10.0, silence_s=5.0)
    watchdog.start("a", "one", 100.0)
    for second in range(101, 108):  # read at 200, but said in time
        watchdog.hear(float(second))
    watchdog.end(108.0)
    assert watchdog.spent_s == {"a": 8.0}


def test_what_waits_for_its_parent_is_neither_silent_nor_slow() -> None:
    watchdog = dog(timeout_s=10.0, silence_s=5.0)
    assert watchdog.deadline_s() == 105.0
    watchdog.start("a", "speed", 102.0)
    watchdog.wait()
    assert (watchdog.deadline_s(), watchdog.complaint(1000.0)) == (None, None)
    watchdog.resume(1000.0)
    assert watchdog.deadline_s() == 1005.0
    watchdog.hear(1004.0)
    assert watchdog.deadline_s() == 1009.0
    watchdog.hear(1008.0)
    assert watchdog.deadline_s() == 1010.0, "then ten seconds are spent"
    watchdog.wait()
    watchdog.end(1009.0)
    assert (watchdog.waits, watchdog.deadline_s()) == (False, 1014.0)
    assert dog().deadline_s() is None


def test_a_worker_beats_often_enough_to_be_believed_and_no_more() -> None:
    assert Limits(timeout_s=None, silence_s=900.0).beat_every_s == 45.0
    assert Limits(timeout_s=None, silence_s=5.0).beat_every_s == 0.25
    assert Limits(timeout_s=None, silence_s=None).beat_every_s == 60.0


@pytest.mark.parametrize(
    ("code", "oom_kills", "status", "kind"),
    [
        (0, 0, "crash", "ProcessExit"),
        (1, 5, "crash", "ProcessExit"),
        (-signal.SIGKILL, 0, "killed", "SIGKILL"),
        (-signal.SIGKILL, 1, "oom", "HostOutOfMemory"),
        (-signal.SIGTERM, 1, "killed", "SIGTERM"),
        (-signal.SIGSEGV, 1, "crash", "SIGSEGV"),
        (-signal.SIGBUS, 0, "crash", "SIGBUS"),
        (-63, 0, "killed", "signal 63"),
    ],
)
def test_an_end_is_judged_by_its_code_and_by_kills_for_memory(
    code: int, oom_kills: int, status: str, kind: str
) -> None:
    verdict = verdict_on(code, complaint=None, oom_kills=oom_kills)
    assert (verdict.status, verdict.kind) == (status, kind)


def test_the_watchdogs_own_kill_is_a_timeout_whatever_else_happened() -> None:
    verdict = verdict_on(-signal.SIGKILL, complaint="too slow", oom_kills=1)
    assert (verdict.status, "too slow" in verdict.message) == ("timeout", True)


EVENTS = "low 0\nhigh 3\nmax 9\noom 4\noom_kill {}\noom_group_kill 7\n"


def counted(folder: Path, membership: str, vmstat: str = "") -> int | None:
    (folder / "membership").write_text(membership)
    (folder / "vmstat").write_text(vmstat)
    return num_oom_kills(cgroup=folder, membership=folder / "membership", whole_machine=folder / "vmstat")


def test_the_counter_of_the_own_group_is_read(tmp_path: Path) -> None:
    (tmp_path / "user" / "job").mkdir(parents=True)
    (tmp_path / "memory.events").write_text(EVENTS.format(8))
    assert counted(tmp_path, "0::/user/job\n") == 8, "in a container the own group is the root"
    (tmp_path / "user" / "job" / "memory.events").write_text(EVENTS.format(2))
    assert counted(tmp_path, "0::/user/job\n") == 2


def test_the_first_version_of_control_groups_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "memory" / "slurm").mkdir(parents=True)
    (tmp_path / "memory" / "slurm" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 5\n")
    assert counted(tmp_path, "9:cpu,cpuacct:/x\n7:memory:/slurm\n") == 5


def test_without_control_groups_the_machine_is_asked(tmp_path: Path) -> None:
    assert counted(tmp_path, "", "nr_free 3\noom_kill 6\n") == 6
    assert counted(tmp_path, "", "nr_free 3\n") is None
