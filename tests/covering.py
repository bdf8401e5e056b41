"""What `make test` takes of a product of parameters: a small cover of it; `make test-all` takes the product.

    @pytest.mark.cover("one")     # one of them
    @pytest.mark.cover            # each value of each parameter at least once
    @pytest.mark.cover("pairs")   # each pair of values of two parameters at least once
    @pytest.mark.cover("mechanisms")   # as values, but of policies: each mechanism of the cache that one uses
    @pytest.mark.cover(whole="pairs")      # values, and in `make test-all` pairs: where the product has hundreds, or
                                           # each case takes seconds
    @pytest.mark.parametrize("line", one_in(3, LINES))    # about one in three of many alike
    @pytest.mark.few(3)           # the first three cases

A test of the fixture `policy` and of another parameter needs no mark to be covered by values; `cover("all")` says that
its whole product runs by default. The choice is greedy, and ties are broken by a checksum of the test's name: the same
in every process and on every machine, but another one for another test, so that over all tests each policy meets each
position mode. A new yaml, family or dtype is a new value, so one of its tests runs by default with nothing to
register. Of random examples a default run takes a sixth (`share_of`).

A rule that is costly and about the cache rather than about a score is tried with policies that together use every
mechanism (`mechanisms_of`): a yaml of known parts adds nothing to such a test, one of a new part a case.

This file imports nothing heavy: the process that only hands tests to workers reads it too.
"""

from __future__ import annotations

import heapq
import itertools
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TOLD = ("oracle",)  # works only where a task tells it the future: tests/tasks/test_task.py
YAMLS = sorted(path for path in (Path(__file__).parents[1] / "conf" / "policy").glob("*.yaml") if path.stem not in TOLD)
HARD = ("middle_first", "ragged", "blocks")  # `tests.contract.middle_first` makes them
HARDER = ("divided", "ragged_blocks")  # in `make test-all`
POSITIONS = ("original", "in_cache", "released")
_STRENGTH = {("one",): 0, (): 1, ("values",): 1, ("mechanisms",): 1, ("pairs",): 2, ("all",): None}


exhaustive = False
"""Whether this run takes everything; set before tests are imported."""


def share_of(count: int) -> int:
    """Return how many of `count` random examples a test tries: all in `make test-all`, a sixth by default."""
    return count if exhaustive else max(1, count // 6)


def one_in(number: int, values: Iterable[Any]) -> list[Any]:
    """Return parameters of which a default run takes the first and about one in `number`, by a checksum of the text."""
    return [
        pytest.param(value, marks=pytest.mark.long if place and zlib.crc32(repr(value).encode()) % number else ())
        for place, value in enumerate(values)
    ]


def cover(product: Mapping[str, Mapping[str, str]], strength: int) -> set[str]:
    """Names from `product` (name -> parameter -> value) in which each `strength`-tuple of values occurs that it has."""
    parts = {
        name: set(itertools.combinations(sorted(values.items()), min(strength, len(values))))
        for name, values in product.items()
    }
    missing = set().union(*parts.values())
    chosen: set[str] = set()
    ranks = {name: rank for rank, name in enumerate(sorted(parts, key=lambda name: (zlib.crc32(name.encode()), name)))}
    best_first = [(-len(part), -ranks[name], name) for name, part in parts.items()]
    heapq.heapify(best_first)
    while missing:
        number, rank, name = heapq.heappop(best_first)
        adds = len(parts[name] & missing)
        if adds < -number:  # of what it had, something was chosen since
            heapq.heappush(best_first, (-adds, rank, name))
            continue
        missing -= parts[name]
        chosen.add(name)
    return chosen


@cache
def mechanisms_of(policy: Any) -> dict[str, str]:
    """Return what a yaml's policy asks of the cache, by name; of any other value, and of a wrong yaml, itself."""
    if not isinstance(policy, Path):
        return {"policy": repr(policy)}
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from kvbench.cache import Calibrated, Needs, ScorePolicy
    from kvbench.cache.policy import keeps_ring, needs_of, steps_between_cuts
    from kvbench.cache.released import Departures, departures_of

    try:
        made = instantiate(OmegaConf.load(policy), _convert_="object")
        parts = {name: type(getattr(made, name, None)).__name__ for name in ("allocation", "merge")}
        return {
            **parts,
            **{f"need {need.name}": "yes" for need in Needs if need in needs_of(made)},
            "when": repr(made.when),
            "scores": str(isinstance(made, ScorePolicy)),
            "blocks": str((steps_between_cuts(made) or 1) > 1),
            "departs": str(departures_of(made) != Departures()),
            "learns": str(isinstance(made, Calibrated)),
            "ring": str(keeps_ring(made)),
        }
    except Exception:  # the contract says what is wrong with it
        return {"policy": repr(policy)}


def _values_of(item: pytest.Item, whole: bool) -> dict[str, str]:
    """Return what a test is a case of, as text by name."""
    params = dict(item.callspec.params)
    mark = item.get_closest_marker("cover")
    asked = () if mark is None else (mark.kwargs.get("whole"),) if whole else mark.args
    by_mechanism = asked == ("mechanisms",)
    mechanisms = mechanisms_of(params.pop("policy")) if by_mechanism else {}
    return {**{name: repr(value) for name, value in params.items()}, **mechanisms}


def _strength_of(item: pytest.Item, whole: bool) -> int | None:
    """Return the strength of the cover that `item` is chosen for; None where it runs in any case."""
    if not hasattr(item, "callspec") or item.get_closest_marker("gpu"):
        return None
    mark = item.get_closest_marker("cover")
    if whole:
        return None if mark is None or "whole" not in mark.kwargs else _STRENGTH[mark.kwargs["whole"],]
    if item.get_closest_marker("long"):
        return None
    if mark is not None:
        return _STRENGTH[mark.args]
    return 1 if "policy" in item.callspec.params and len(item.callspec.params) > 1 else None


def outside_the_cover(items: Iterable[pytest.Item], *, whole: bool = False) -> list[pytest.Item]:
    """Return the tests that a cover of their function's product does without; never one that needs a GPU.

    whole: those that even `make test-all` does without.
    """
    functions: dict[tuple[str, int], dict[str, Any]] = defaultdict(dict)
    for item in items:
        strength = _strength_of(item, whole)
        if strength is not None:
            functions[item.nodeid.partition("[")[0], strength][item.nodeid] = item
    left: list[pytest.Item] = []
    for (_, strength), tests in functions.items():
        chosen = cover({name: _values_of(item, whole) for name, item in tests.items()}, strength)
        left.extend(item for name, item in tests.items() if name not in chosen)
    return left


def beyond_the_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return the cases of functions marked `few(n)` after their first n, which are left to `make test-all`."""
    number: Counter[str] = Counter()
    left = []
    for item in items:
        mark = item.get_closest_marker("few")
        if mark is not None:
            function = item.nodeid.partition("[")[0]
            number[function] += 1
            if number[function] > mark.args[0]:
                left.append(item)
    return left
