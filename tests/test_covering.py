"""The rule by which a default run leaves tests out: what must occur does, whatever the parameters are."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.covering import YAMLS, cover, mechanisms_of, one_in, outside_the_cover, share_of

SIZES = {"policy": 12, "positions": 3, "budget": 6}
PRODUCT = {
    "-".join(map(str, values)): dict(zip(SIZES, map(str, values), strict=True))
    for values in itertools.product(*map(range, SIZES.values()))
}


@pytest.mark.parametrize(("strength", "least", "most"), [(0, 1, 1), (1, 12, 12), (2, 72, 90), (3, 216, 216)])
def test_a_cover_has_every_combination_of_so_many_values_in_few_tests(strength: int, least: int, most: int) -> None:
    chosen = cover(PRODUCT, strength)
    assert least <= len(chosen) <= most
    for names in itertools.combinations(SIZES, strength):
        wanted = {tuple(values[name] for name in names) for values in PRODUCT.values()}
        assert {tuple(PRODUCT[one][name] for name in names) for one in chosen} == wanted
    assert cover(dict(reversed(PRODUCT.items())), strength) == chosen, "the order of collection decides nothing"


def test_pairs_that_do_not_exist_are_not_waited_for() -> None:
    odd = {"a": {"x": "1", "y": "1"}, "b": {"x": "2", "y": "2"}, "c": {"x": "1"}}
    assert cover(odd, 2) == {"a", "b", "c"}
    assert cover({}, 1) == set()


def collected(name: str, *marks: pytest.Mark, **parameters: str) -> list[Any]:
    """What pytest would collect of a function with these parameters, a letter for each value."""
    found = []
    for values in itertools.product(*parameters.values()):
        params = dict(zip(parameters, values, strict=True))
        by_name = {mark.name: mark for mark in marks}
        item = SimpleNamespace(nodeid=f"tests/a.py::{name}[{'-'.join(values)}]", get_closest_marker=by_name.get)
        if params:
            item.callspec = SimpleNamespace(params=params)
        found.append(item)
    return found


def test_tests_of_a_policy_and_more_are_covered_without_a_mark_and_marks_are_heeded() -> None:
    mark, product = pytest.mark, {"policy": "abcd", "size": "123"}
    items = [
        *collected("unmarked", **product),
        *collected("all", mark.cover("all").mark, **product),
        *collected("one", mark.cover("one").mark, **product),
        *collected("values", mark.cover.mark, size="123", shape="12345"),
        *collected("pairs", mark.cover("pairs").mark, **product),
        *collected("alone", policy="abcd"),
        *collected("no_policy", size="123", shape="12"),
        *collected("gpu", mark.gpu.mark, **product),
        *collected("plain"),
    ]
    left = outside_the_cover(items)
    kept = Counter(item.nodeid.partition("::")[2].partition("[")[0] for item in items if item not in left)
    assert kept == {
        **{"unmarked": 4, "all": 12, "one": 1, "values": 5, "pairs": 12},
        **{"alone": 4, "no_policy": 6, "gpu": 12, "plain": 1},
    }


def test_what_has_hundreds_of_cases_is_covered_in_the_whole_run_too() -> None:
    mark, product = pytest.mark, {"policy": "abcd", "size": "123", "dtype": "xy"}
    items = [
        *collected("pairs", mark.cover(whole="pairs").mark, **product),
        *collected("long_values", mark.cover(whole="values").mark, mark.long.mark, **product),
        *collected("all", **product),
        *collected("gpu", mark.gpu.mark, mark.cover(whole="values").mark, **product),
    ]
    left = outside_the_cover(items, whole=True)
    kept = Counter(item.nodeid.partition("::")[2].partition("[")[0] for item in items if item not in left)
    assert kept == {"pairs": 12, "long_values": 4, "all": 24, "gpu": 24}
    by_default = Counter(item.nodeid.partition("::")[2].partition("[")[0] for item in outside_the_cover(items))
    assert by_default == {"pairs": 20, "all": 20}, "what is marked as long is not chosen from"


def test_a_cover_of_mechanisms_uses_each_at_least_once_in_a_third_of_the_policies(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("_target_: nowhere.at_all")
    of_yamls = {path: mechanisms_of(path) for path in YAMLS}
    used = {one for found in of_yamls.values() for one in found.items()}
    chosen = cover({path.stem: found for path, found in of_yamls.items()}, 1)
    assert {one for path, found in of_yamls.items() if path.stem in chosen for one in found.items()} == used
    assert len(chosen) < 25
    assert ("allocation", "Pyramid") in used
    assert ("need MASS", "yes") in used
    assert [mechanisms_of(one) for one in (wrong, "hard")] == [{"policy": repr(wrong)}, {"policy": "'hard'"}]
    items = collected("costly", pytest.mark.cover("mechanisms").mark, policy="ab", size="123")
    assert len(items) - len(outside_the_cover(items)) == 3


def test_of_many_alike_about_one_in_so_many_is_taken() -> None:
    left = [bool(one.marks) for one in one_in(3, [f"line {number}" for number in range(300)])]
    assert 150 < sum(left) < 250


def test_a_share_of_examples_is_never_none() -> None:
    assert share_of(1) == 1
    assert share_of(40) in (6, 40)


def test_the_rule_needs_nothing_heavy() -> None:
    """The process that hands tests to workers reads it, and their conftest, too."""
    for name in ("covering.py", "conftest.py"):
        lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
        imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
        light = {
            "__future__",
            "atexit",
            "collections",
            "functools",
            "gc",
            "heapq",
            "itertools",
            "os",
            "pathlib",
            "pytest",
            "sys",
            "tests",
            "typing",
            "zlib",
        }
        assert imported <= light, name
