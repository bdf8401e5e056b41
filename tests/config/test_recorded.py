"""From a record back to its cell: every setting as it was recorded, or one line that names what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.config.recorded import recorded_cell
from kvbench.errors import ConfigError
from kvbench.results.record import BODY_SCHEMA, MEASURED, read_record

REPO = Path(__file__).parents[2]
H2O = "924061a2578e40da"  # of the published default sweep
WORDS = {
    "its own settings": ["policy=h2o", "policy.recent_fraction=0.25", "+policy.every_tokens=4", "positions=in_cache"],
    "parts from groups": ["policy=h2o", "+policy/allocation=pyramid", "+policy/merge=d2o", "budget=tokens"],
    "a part that two groups name": ["policy=h2o", "+policy/merge=d2o"],
    "a part of the yaml's": ["policy=adakv", "policy.allocation.alpha=0.4"],
    "a span": ["policy=h2o", "+policy.protect=question", "query_visible=true"],
    "a hidden question": ["policy=h2o", "query_visible=false", "batch_size=auto", "model.dtype=bfloat16"],
    "as the yaml has it": ["policy=snapkv", "budget.fraction=0.3"],
    "data": ["policy=full", "dataset.num_samples=5", "dataset.split=validation", "task.generation.max_new_tokens=7"],
}

NUM_QUICK = 4  # of these, the others are left to `make test-all`


def body_of(*words: str) -> dict[str, Any]:
    """Return what a record says of the cell that `words` ask for."""
    (composed,) = compose_grid(["task=generation", "device=cpu", *words], multirun=False, config_dir=None)
    cell = build_cell(composed)
    body = {"schema": BODY_SCHEMA, "key": cell.key, "cell": dict(cell.settings), "labels": dict(cell.labels)}
    whole: dict[str, Any] = json.loads(json.dumps(body | {"environment": {"git_commit": "0123abc"}}))
    return whole


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=[] if number < NUM_QUICK else pytest.mark.long)
        for number, words in enumerate(WORDS.values())
    ],
    ids=WORDS,
)
def test_the_same_cell_is_built_again(words: list[str]) -> None:
    body = body_of(*words)
    assert recorded_cell(body, "generation", []).settings == body["cell"]


def published() -> Iterator[Path]:
    yield from sorted((REPO / "results" / "published").glob("*/cells/*/record.json"))


@pytest.mark.long
@pytest.mark.parametrize("folder", sorted({path.parents[2].name for path in published()}))
def test_published_answers_are_of_cells_that_can_be_built_again(folder: str) -> None:
    for path in published():
        body = read_record(path) if path.parents[2].name == folder else {}
        if (
            body
            and body["schema"] == BODY_SCHEMA
            and body["status"] in MEASURED
            and "generation" in body["cell"]["task"]
        ):
            try:
                cell = recorded_cell(body, "generation", [])
            except ConfigError as error:
                if "kvbench fetch" not in str(error):  # the model is on this machine
                    raise
                continue
            assert cell.settings["policy"] == body["cell"]["policy"]
            assert cell.labels["policy"] == body["labels"]["policy"]


def h2o() -> dict[str, Any]:
    return read_record(REPO / "results" / "published" / "default-sweep" / "cells" / H2O / "record.json")


def test_only_the_answers_are_measured_and_step_by_step_where_they_were() -> None:
    cell = recorded_cell(h2o(), "generation", [])
    assert list(cell.tasks) == ["generation"]
    assert (cell.setting.engine, cell.device) == ("eager", "cpu")
    assert (cell.labels["policy"], cell.labels["budget"]) == ("h2o", "20 % of seen")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "code": (
        {"policy": {"source": "0000"}},
        r"the record's policy.source is '0000' and here '\w+', so another .*: check out 217939d57",
    ),
    "protocol": ({"task": {"generation": {"protocol": "greedy_v1"}}}, r"'greedy_v1' and here .* code has changed"),
    "cache": ({"cache_semantics": 0}, r"cache_semantics is 0 and here 1, .* code has changed since"),
    "weights": ({"model": {"fingerprint": "0"}}, r"model.fingerprint is '0' and here '\w+…, .* give what was measured"),
    "a setting of another version": ({"policy": {"gone": 3}}, r"policy.gone is no setting of H2O"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_differs_is_named_in_one_line(case: str) -> None:
    changes, match = REFUSED[case]
    body = h2o()
    for name, value in changes.items():
        if not isinstance(value, dict):
            body["cell"][name] = value
        elif name == "task":
            body["cell"]["task"]["generation"] |= value["generation"]
        else:
            body["cell"][name] |= value
    with pytest.raises(ConfigError, match=match) as caught:
        recorded_cell(body, "generation", [])
    assert "\n" not in str(caught.value)


def test_what_is_given_is_taken_and_told_if_it_is_not_what_was_measured() -> None:
    with pytest.raises(ConfigError, match=r"dataset.num_samples is 24 and here 3"):
        recorded_cell(h2o(), "generation", ["dataset.num_samples=3"])


@pytest.mark.parametrize(
    ("group", "name", "match"),
    [
        ("model", "mine", r"the record's model is 'mine', .* add model=local model.checkpoint=FOLDER, or --config-dir"),
        (
            "policy",
            "mine",
            r"the record's policy is 'mine', .* add policy=NAME, or --config-dir DIR with DIR/policy/mine",
        ),
        ("policy", "h2o+mine", r"has the part 'mine', and no yaml of that name"),
    ],
)
def test_a_name_that_no_yaml_has_is_told(group: str, name: str, match: str) -> None:
    body = h2o()
    body["labels"][group] = name
    with pytest.raises(ConfigError, match=match):
        recorded_cell(body, "generation", [])


def test_a_record_of_the_first_schema_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has schema 1, .* measure the cell again"):
        recorded_cell(h2o() | {"schema": 1}, "generation", [])
