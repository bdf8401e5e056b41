"""Records that are sealed and hold what no run writes: told as a finding, never a traceback."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.audit import audit, audit_body, badge_line, badge_svg, table_lines
from kvbench.errors import RecordError
from kvbench.results.files import canonical_json
from kvbench.results.record import check_body
from tests.audit.folders import honest, write_folder
from tests.covering import share_of

BODIES = honest()
ODD: list[Any] = [None, True, -1, 0, 1e300, 10**300, "", "text", [], [1], {}, {"a": None}, [[1, 2, 3]]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield (*path, name)
        yield from places(item, (*path, name))


PLACES = [path for path in places(BODIES["h2o 0.2"]) if path[0] not in ("schema", "key", "attempt")]


def changed(path: tuple[Any, ...], odd: Any) -> dict[str, Any]:
    body = copy.deepcopy(BODIES["h2o 0.2"])
    inner = body
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = odd
    return body


@settings(max_examples=share_of(60), deadline=None)
@given(path=st.sampled_from(PLACES), odd=st.sampled_from(ODD))
def test_anything_in_the_place_of_anything_ends_in_a_verdict(path: tuple[Any, ...], odd: Any) -> None:
    body = changed(path, odd)
    try:
        check_body(body)
    except RecordError:
        return
    with tempfile.TemporaryDirectory() as folder:
        result = audit(write_folder(Path(folder), [body, BODIES["full"], BODIES["random 0.2"]]))
    canonical_json(audit_body(result, version="1", sweep=None))
    assert list(table_lines(result))
    assert badge_svg(result)


def test_text_in_the_place_of_a_number_is_a_finding(tmp_path: Path) -> None:
    bodies = honest()
    bodies["h2o 0.2"]["samples"][0]["num_new_tokens"] = "many"
    result = audit(write_folder(tmp_path, list(bodies.values())))
    assert "A3" in {outcome.id for outcome in result.failed}


def test_the_badges_link_holds_no_blank_or_bracket(tmp_path: Path) -> None:
    result = audit(write_folder(tmp_path, list(honest().values())))
    line = badge_line(result, "my results (old)/audit.svg", "my results (old)/audit.json")
    assert "(my%20results%20%28old%29/audit.svg)](my%20results%20%28old%29/audit.json)" in line
