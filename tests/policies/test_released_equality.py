"""The policies as released hold what the released code holds, after every forward, on random tensors."""

from __future__ import annotations

import random

import pytest

from kvbench.cache import Budget
from kvbench.policies.released.elastic import ElasticReleased
from kvbench.policies.released.h2o_elastic import H2OElasticRelease
from kvbench.policies.released.local_elastic import LocalElasticRelease
from kvbench.policies.released.streaming_llm import StreamingLLMReleased
from tests.policies.released_code import ElasticCode, H2OCode, LocalCode, WindowCode
from tests.policies.released_driving import Drive, compare

RATIOS = (0.015, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def drives(number: int, *, longest: int = 80) -> list[tuple[float, Drive]]:
    draw = random.Random(number)
    return [
        (
            draw.choice(RATIOS),
            Drive(
                prompt=draw.randint(3, longest),
                steps=draw.randint(5, 40),
                layers=draw.randint(1, 3),
                heads=draw.randint(1, 2),
                group=draw.randint(1, 2),
                seed=draw.randrange(2**32),
            ),
        )
        for _ in range(number)
    ]


def kept(ratio: float) -> Budget:
    return Budget(fraction=round(1 - ratio, 6))


@pytest.mark.few(1)
@pytest.mark.parametrize("fixed_point", [25, 3])
def test_elastic_is_its_code(fixed_point: int) -> None:
    compared = [
        compare(
            ElasticReleased(fixed_point=fixed_point),
            kept(ratio),
            ElasticCode(ratio=ratio, distance=-fixed_point),
            drive,
        )
        for ratio, drive in drives(10 + fixed_point % 5)
    ]
    assert sum(compared) > 120


def test_elastic_with_four_sinks_is_its_code() -> None:
    policy, code = ElasticReleased(num_sinks=4), ElasticCode(ratio=0.5, start=4)
    assert compare(policy, kept(0.5), code, Drive(prompt=90, steps=30, layers=2)) == 31


def test_its_h2o_is_its_code() -> None:
    assert sum(compare(H2OElasticRelease(), kept(r), H2OCode(ratio=r), drive) for r, drive in drives(11)) > 150


def test_its_h2o_outlives_the_prompts_scores() -> None:
    """More tokens than the prompt left behind: the last ones start from nothing."""
    drive = Drive(prompt=20, steps=60, layers=2)
    assert compare(H2OElasticRelease(), kept(0.5), H2OCode(ratio=0.5), drive) == 61


def test_its_local_cache_is_its_code() -> None:
    assert sum(compare(LocalElasticRelease(), kept(r), LocalCode(ratio=r), drive) for r, drive in drives(9)) > 100


@pytest.mark.parametrize(("start", "recent"), [(1, 20), (4, 16), (0, 9), (1, 1)])
def test_streaming_llm_is_its_code(start: int, recent: int) -> None:
    policy, code = StreamingLLMReleased(num_sinks=start), WindowCode(start=start, recent=recent)
    for prompt in (1, 12, 70):
        assert compare(policy, Budget(tokens=start + recent), code, Drive(prompt=prompt, steps=30)) == 31


def test_streaming_llm_has_one_sink_and_255_recent_tokens_at_its_own_size() -> None:
    policy, code = StreamingLLMReleased(), WindowCode(start=1, recent=255)
    assert compare(policy, Budget(tokens=256), code, Drive(prompt=1, steps=300, layers=1, heads=1)) == 301
