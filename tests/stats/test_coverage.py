"""Intervals that say 95 % hold the truth in 93 to 97 % of simulated experiments, and A/A raises few alarms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvbench.stats.paired import Inference, PairedSums, infer
from kvbench.stats.tests import verdict_of
from tests.stats.worlds import SHAPES, Floats, by_cluster, passages, right_or_wrong, scores, unequal_clusters


def holds(found: Inference, truth: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    return found.low <= truth <= found.high


def coverage(shape: str, sizes: tuple[int, ...], num: int, seed: int) -> float:
    draw, truth = SHAPES[shape]
    rng = np.random.default_rng(seed)
    return float(np.mean([holds(infer(scores(draw(rng, n))), truth) for n in sizes for _ in range(num)]))


@pytest.mark.long
@pytest.mark.cover("one")
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_of_scores_cover(shape: str) -> None:
    assert 0.93 <= coverage(shape, (20, 40, 80), 500, seed=1) <= 0.97


@pytest.mark.long
@pytest.mark.parametrize("num_clusters", [20, 32, 50, 100, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_intervals_of_scores_cover_at_every_size(shape: str, num_clusters: int) -> None:
    # 4,000 experiments: three standard errors are 1 %.
    assert 0.93 - 0.01 <= coverage(shape, (num_clusters,), 4000, seed=2) <= 0.97 + 0.01


@pytest.mark.long
def test_perplexity_on_shared_passages_covers_only_by_passage() -> None:
    rng = np.random.default_rng(3)
    by_passage, by_question = [], []
    for number in range(800):
        rows, cluster = passages(rng, 30, 0.05)
        by_passage.append(holds(infer(by_cluster(rows, cluster)), 0.05))
        if number < 100:
            by_question.append(holds(infer(by_cluster(rows, np.arange(len(rows)))), 0.05))
    assert 0.93 <= np.mean(by_passage) <= 0.97
    assert np.mean(by_question) < 0.8, "questions on one passage are no independent evidence"


@pytest.mark.long
@pytest.mark.cover("one")
@pytest.mark.parametrize("shape", ["normal", "heavy tails", "two kinds"])
def test_two_names_of_one_policy_are_rarely_called_different(shape: str) -> None:
    draw, truth = SHAPES[shape]
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(800):
        found = infer(scores(draw(rng, 32) - truth))
        assert found.low is not None
        assert found.high is not None
        assert found.p_value is not None
        verdict = verdict_of(found.low, found.high, higher_is_better=True, margin=None, p_value=found.p_value)
        alarms += verdict in ("better", "worse")
    assert alarms <= 0.08 * 800


@pytest.mark.long
def test_the_minimum_detectable_difference_is_found_in_four_of_five() -> None:
    rng = np.random.default_rng(5)
    sizes = [infer(scores(rng.normal(0, 0.1, 32))).minimum_detectable or 0.0 for _ in range(200)]
    detectable = float(np.mean(sizes))
    found = [infer(scores(rng.normal(detectable, 0.1, 32))) for _ in range(800)]
    assert 0.72 <= np.mean([one.low is not None and one.low > 0 for one in found]) <= 0.86


@pytest.mark.cover("one")
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("num_clusters", [20, 32, 64])
def test_losses_that_hardly_any_sample_shows_are_not_called_harmless(share: float, num_clusters: int) -> None:
    rng = np.random.default_rng(6)
    truth = -share * 2 / 7
    missed = plain = 0
    for _ in range(400):
        differences = -0.5 * (rng.random(num_clusters) < share) * 2 * rng.beta(2, 5, num_clusters)
        rows = scores(differences)
        rows.columns[:, 0] += 0.5  # full scores 1, as against its own answer
        rows.columns[:, 2] += 0.5
        guarded, bare = infer(rows, scale=(-1, 0)), infer(rows)
        assert guarded.low is not None
        assert bare.low is not None
        missed += guarded.low > truth
        plain += bare.low > truth
    assert missed <= 0.05 * 400
    assert share > 0.05 or plain > 0.08 * 400, "the guard is needed"


@pytest.mark.cover("one")
@pytest.mark.parametrize(("known", "lost", "num"), [(0.5, 0.03, 64), (0.2, 0.04, 32), (0.03, 0.03, 64)])
def test_a_loss_is_bounded_by_what_one_answer_can_lose_not_by_the_other_arms_mean(
    known: float, lost: float, num: int
) -> None:
    rng = np.random.default_rng(7)
    assert missed(lambda: right_or_wrong(rng, num, known, lost), -lost) <= 0.05


@pytest.mark.cover("one")
@pytest.mark.parametrize("lost", [0.2, 0.3])
def test_a_loss_in_the_largest_clusters_is_not_taken_for_one_in_any(lost: float) -> None:
    rng = np.random.default_rng(8)
    assert missed(lambda: unequal_clusters(rng, 30, 3, lost), -lost * 60 / 87) <= 0.05


def missed(draw: Callable[[], Floats], truth: float, num: int = 400) -> float:
    """Return how often the lower bound lies above the truth."""
    pairs = (PairedSums(columns=rows, num_samples=len(rows)) for rows in (draw() for _ in range(num)))
    found = [infer(one, scale=(-1, 1)) for one in pairs]
    return float(np.mean([one.low is not None and one.low > truth + 1e-9 for one in found]))
