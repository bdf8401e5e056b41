"""The simulated figures of docs/statistics.md: `python -m tests.stats.figures`, about three minutes."""

from __future__ import annotations

import numpy as np

from kvbench.stats.intervals import ratio_interval
from kvbench.stats.paired import infer, noise_reason, spread_fraction
from tests.stats.test_coverage import coverage, holds, missed
from tests.stats.test_power import LADDER, search
from tests.stats.worlds import (
    SHAPES,
    VirtualClock,
    by_cluster,
    passages,
    right_or_wrong,
    scores,
    two_sizes_of_loss,
    unequal_clusters,
)

SIZES = (20, 32, 50, 100, 200)


def intervals() -> None:
    print("| differences |", " | ".join(f"n = {n}" for n in SIZES), "|\n|---|" + "---|" * len(SIZES))
    for shape in SHAPES:
        print(f"| {shape} |", " | ".join(f"{coverage(shape, (n,), 2000, seed=11):.1%}" for n in SIZES), "|", flush=True)
    rng, found, naive = np.random.default_rng(12), [], []
    for _ in range(1000):
        rows, cluster = passages(rng, 30, 0.05)
        found.append(holds(infer(by_cluster(rows, cluster)), 0.05))
        if len(naive) < 300:
            naive.append(holds(infer(by_cluster(rows, np.arange(len(rows)))), 0.05))
    print(f"log-loss, 30 passages: by passage {np.mean(found):.1%}, by question {np.mean(naive):.1%}")
    alarms = [(infer(scores(rng.normal(0, 0.1, 32))).p_value or 0) <= 0.05 for _ in range(4000)]
    print(f"A/A false alarms, 32 samples: {np.mean(alarms):.1%}")


def rare_losses() -> None:
    rng = np.random.default_rng(16)
    for known, lost, num in ((0.5, 0.03, 64), (0.2, 0.04, 32), (0.03, 0.03, 64)):
        wrong = missed(lambda k=known, one=lost, n=num: right_or_wrong(rng, n, k, one), -lost, 2000)
        print(f"bound wrong, full right in {known:.0%}, n = {num}, {lost:.0%} lost: {wrong:.1%}", flush=True)
    wrong = missed(lambda: unequal_clusters(rng, 30, 3, 0.3), -0.3 * 60 / 87, 2000)
    print(f"bound wrong, the 3 clusters with 20 questions lose: {wrong:.1%}")
    wrong = missed(lambda: two_sizes_of_loss(rng, 64, 0.05), -0.05 * 0.109, 2000)
    print(f"bound wrong, one loss in ten whole, n = 64: {wrong:.1%}")


def times() -> None:
    def abba(clock: VirtualClock, slower: float, num: int = 4000) -> np.ndarray:
        rng = np.random.default_rng(13)
        found = [ratio_interval(*clock.abba(rng, slower)) for _ in range(num)]
        return np.array([[one.low, one.value, one.high] for one in found], dtype=np.float64)

    quiet = VirtualClock()
    for sd in (0.005, 0.01, 0.015, 0.02, 0.03):
        clock = VirtualClock(launch_sd=sd)
        same, slow, fast = abba(clock, 1.0), abba(clock, 1.03), abba(clock, 0.97)
        alarms = np.mean((same[:, 0] > 1) | (same[:, 2] < 1))
        power = f"+3 % found {np.mean(slow[:, 0] > 1):.1%}, -3 % found {np.mean(fast[:, 2] < 1):.1%}"
        print(f"launches spread by {sd:.1%}: A/A alarms {alarms:.1%}, {power}", flush=True)
    print(f"drift of 5 %: bias {np.mean(abba(VirtualClock(drift=0.05), 1.0)[:, 1]) - 1:+.3%}")
    rng = np.random.default_rng(14)
    for name, clock in (("quiet", quiet), ("neighbour", VirtualClock(neighbour_share=0.3))):
        noisy = [bool(noise_reason(spread_fraction(*clock.abba(rng, 1.2)), 0.0)) for _ in range(4000)]
        print(f"called noisy, {name}: {np.mean(noisy):.1%}")


def searches() -> None:
    for num in (48, 128):
        for steepness in (1.0, 4.0):
            rng, share_of = np.random.default_rng(15), (1 - LADDER) ** steepness
            safe = share_of * 2 / 7 < 0.1
            claims = [search(rng, num, 0.1, share_of) for _ in range(1000)]
            false = np.mean([claim < len(LADDER) and not safe[claim] for claim in claims])
            rungs = np.mean([claim - int(np.argmax(safe)) for claim in claims])
            print(
                f"search, n = {num}, steepness {steepness:g}: false {false:.1%}, {rungs:+.1f} rungs above truth",
                flush=True,
            )


if __name__ == "__main__":
    intervals()
    rare_losses()
    times()
    searches()
