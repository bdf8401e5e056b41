from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import ConfigError
from kvbench.results import claims as claim_file
from kvbench.results.claims import ClaimFile, Claims, encode_claim, generations, owner_is_dead, parse_claim, read_claim
from kvbench.results.record import cell_key

KEY, OTHER = cell_key({"cell": 1}), cell_key({"cell": 2})
REPO = Path(__file__).parents[2]


class Clock:
    """A steady clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def from_elsewhere(results: Path, key: str = KEY, generation: int = 1, lease_s: float = 10.0) -> Path:
    """Write the claim of an owner on another machine, about whose process nothing is known here."""
    folder = results / "claims"
    folder.mkdir(exist_ok=True)
    content = encode_claim(key, "job 7", lease_s)
    path = folder / f"{key[:16]}.{generation}"
    path.write_bytes(content.replace(claim_file.machine().encode(), b"far-away boot space"))
    assert b"far-away" in path.read_bytes()
    return path


def test_a_claimed_cell_is_refused_until_it_is_released(tmp_path: Path) -> None:
    mine, yours = Claims(tmp_path), Claims(tmp_path)
    claim = mine.take(KEY)
    assert claim is not None
    assert yours.take(KEY) is None
    assert mine.take(KEY) is None
    assert yours.take(OTHER) is not None
    claim.release()
    claim.release()
    assert not claim.beat()
    again = yours.take(KEY)
    assert again is not None
    assert again.beat()
    assert len(generations(tmp_path / "claims", KEY)) == 1


def test_a_claim_from_elsewhere_is_over_when_it_stood_still_for_its_lease(tmp_path: Path) -> None:
    clock = Clock()
    claims = Claims(tmp_path, lease_s=99.0, steady_s=clock)
    old = from_elsewhere(tmp_path, lease_s=10.0)
    assert claims.take(KEY) is None
    clock.now_s += 9.9
    assert claims.take(KEY) is None
    clock.now_s += 0.2
    claim = claims.take(KEY)
    assert claim is not None
    assert not old.exists()
    assert claim.path.name == f"{KEY[:16]}.2"


def test_every_beat_starts_the_lease_anew(tmp_path: Path) -> None:
    clock = Clock()
    claims = Claims(tmp_path, steady_s=clock)
    old = from_elsewhere(tmp_path)
    for count in range(1, 6):
        assert claims.take(KEY) is None
        clock.now_s += 9.0
        with old.open("r+b") as file:
            file.write(claim_file.count_text(count))
    assert claims.take(KEY) is None


def test_the_wall_clock_and_file_times_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    claims = Claims(tmp_path, steady_s=clock)
    old = from_elsewhere(tmp_path)
    for wrong_s in (0.0, time.time() - 10**6, time.time() + 10**6):
        monkeypatch.setattr(time, "time", lambda wrong_s=wrong_s: wrong_s)
        os.utime(old, (wrong_s, wrong_s))
        assert claims.take(KEY) is None
        clock.now_s += 3.0


def test_the_former_owner_learns_that_it_lost_the_cell_and_harms_nobody(tmp_path: Path) -> None:
    clock = Clock()
    slow = Claims(tmp_path, lease_s=1.0).take(KEY)
    assert slow is not None
    content = slow.path.read_bytes()
    slow.path.write_bytes(content.replace(claim_file.machine().encode(), b"far-away boot space"))
    fast = Claims(tmp_path, lease_s=1.0, steady_s=clock)
    assert fast.take(KEY) is None
    clock.now_s += 2.0
    winner = fast.take(KEY)
    assert winner is not None
    before = winner.path.read_bytes()
    assert not slow.beat()
    slow.release()
    assert winner.path.read_bytes() == before
    assert winner.beat()


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"000000000000 {", b"000000000000 []", b"notes to myself\n"])
def test_a_damaged_claim_is_over_after_the_own_lease(tmp_path: Path, content: bytes) -> None:
    clock = Clock()
    claims = Claims(tmp_path, lease_s=5.0, steady_s=clock)
    from_elsewhere(tmp_path).write_bytes(content)
    assert claims.take(KEY) is None
    clock.now_s += 4.9
    assert claims.take(KEY) is None
    clock.now_s += 0.2
    assert claims.take(KEY) is not None


@pytest.mark.parametrize("lease", ["NaN", "-1", "0", "1e300", '"x"', "null"])
def test_a_lease_that_nobody_could_wait_for_is_not_believed(lease: str) -> None:
    content = encode_claim(KEY, "job 7", 60.0).replace(b'"lease_s": 60.0', f'"lease_s": {lease}'.encode())
    assert parse_claim(content) == ClaimFile(content=content)


def test_an_owner_killed_on_this_machine_is_known_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kvbench.results.claims import Claims\n"
        "claim = Claims(Path(sys.argv[1]), lease_s=3600).take(sys.argv[2])\n"
        "print(claim is not None, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), KEY], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "True"
    claims = Claims(tmp_path)
    assert claims.take(KEY) is None
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert claims.take(KEY) is not None, "dead, though its parent has not yet asked for its exit code"
    process.communicate()


def test_a_later_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    found = parse_claim(encode_claim(KEY, "me", 60.0))
    assert not owner_is_dead(found)
    other_start = ClaimFile(content=b"", machine=found.machine, process=f"{os.getpid()}@1")
    assert owner_is_dead(other_start)
    elsewhere = ClaimFile(content=b"", machine="far-away boot space", process=f"{os.getpid()}@1")
    assert not owner_is_dead(elsewhere)


def test_a_taker_that_was_too_slow_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saw a dead owner; before it links, others took the cell over, released it, and a third one came."""
    dead = from_elsewhere(tmp_path)
    dead.write_bytes(dead.read_bytes().replace(b"far-away boot space", claim_file.machine().encode()))
    dead.write_bytes(dead.read_bytes().replace(f'"process": "{os.getpid()}@'.encode(), b'"process": "1@9'))
    slow, kept = Claims(tmp_path), []
    link = os.link

    def meanwhile(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        quick = Claims(tmp_path).take(KEY)
        assert quick is not None
        quick.release()
        kept.append(Claims(tmp_path).take(KEY))
        link(source, target)

    monkeypatch.setattr(os, "link", meanwhile)
    assert slow.take(KEY) is None
    assert kept[0].beat()
    assert generations(tmp_path / "claims", KEY) == [1]


def _race(folder: Path, start: Any, won: Any) -> None:
    claims = Claims(folder, lease_s=0.2)
    start.wait()
    for round_number in range(40):
        key = cell_key({"round": round_number})
        claim = claims.take(key)
        if claim is not None:
            won.put((round_number, claim.path.name))
    start.wait()  # a winner that ended early would look dead to the others


@pytest.mark.cover("one")
@pytest.mark.parametrize("stale", [False, True])
def test_of_racing_takers_exactly_one_wins(tmp_path: Path, stale: bool) -> None:
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(4), context.Queue()
    if stale:
        for round_number in range(40):
            path = from_elsewhere(tmp_path, cell_key({"round": round_number}))
            facts = json.loads(path.read_bytes()[12:]) | {"machine": claim_file.machine(), "process": "1@9"}
            path.write_bytes(b"000000000000 " + json.dumps(facts).encode())
    takers = [context.Process(target=_race, args=(tmp_path, start, won)) for _ in range(4)]
    for taker in takers:
        taker.start()
    wins = [won.get() for _ in range(40)]
    for taker in takers:
        taker.join()
        assert taker.exitcode == 0
    assert won.empty()
    assert sorted(number for number, _ in wins) == list(range(40))


def test_beating_beats_while_the_block_runs(tmp_path: Path) -> None:
    claim = Claims(tmp_path, lease_s=0.1).take(KEY)
    assert claim is not None
    with claim.beating():
        while claim.path.read_bytes().startswith(b"00000000000"):
            time.sleep(0.02)
    count = claim.path.read_bytes()
    time.sleep(0.1)
    assert claim.path.read_bytes() == count
    found = read_claim(tmp_path / "claims", KEY, 1)
    assert found is not None
    assert found.lease_s == 0.1


def test_a_folder_that_cannot_be_written_to_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="writable folder"):
        Claims(tmp_path / "file").take(KEY)
