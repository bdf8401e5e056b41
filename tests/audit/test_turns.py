"""A conversation is checked turn by turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.audit import audit
from tests.audit.folders import Body, honest, rekey, summarise, write_folder

TEXTS = ("a red circle", "a big blue square", "one")


@pytest.fixture
def bodies() -> dict[str, Body]:
    """Return a full cache and a policy that each hold conversations of three turns, the policy's answers shorter."""
    found = {name: body for name, body in honest().items() if name in ("full", "h2o 0.2")}
    for name, body in found.items():
        body["cell"]["task"] = {
            "conversation": {"_target_": "kvbench.tasks.generation.MultiTurn", "max_new_tokens": 9, "max_turns": 3}
        }
        body["curves"], body["measurements"] = {}, {}
        body["samples"] = [_row(row, is_full=name == "full") for row in body["samples"]]
        for turn in (1, 2, 3):
            body["measurements"][f"turn{turn}_rougeL_vs_full"] = {"unit": ""}
        summarise(body)
        rekey(body)
    return found


def _row(row: Body, *, is_full: bool) -> Body:
    fields: Body = {"id": row["id"], "cluster": row["cluster"]}
    for turn, full in enumerate(TEXTS, start=1):
        text = full if is_full or turn == 3 else full.rpartition(" ")[0]
        fields |= {f"turn{turn}_text": text, f"turn{turn}_full_text": full, f"turn{turn}_question": "What?"}
        shared, words = len(text.split()), len(full.split())
        fields[f"turn{turn}_rougeL_vs_full"] = 2 * shared / (shared + words)
    return fields


def failed(folder: Path, bodies: dict[str, Body]) -> set[str]:
    return {outcome.id for outcome in audit(write_folder(folder, list(bodies.values()))).failed} & {"R3", "R4", "R5"}


def test_an_honest_conversation_passes(tmp_path: Path, bodies: dict[str, Body]) -> None:
    assert not failed(tmp_path, bodies)


def test_a_full_cache_that_is_not_itself_in_a_later_turn_is_caught(tmp_path: Path, bodies: dict[str, Body]) -> None:
    for row in bodies["full"]["samples"]:
        row["turn2_rougeL_vs_full"] = 0.75
    summarise(bodies["full"])
    assert failed(tmp_path, bodies) == {"R5"}


def test_another_answer_of_the_full_cache_in_a_later_turn_is_caught(tmp_path: Path, bodies: dict[str, Body]) -> None:
    bodies["full"]["samples"][0]["turn3_text"] = "two"
    assert failed(tmp_path, bodies) == {"R5"}


def test_a_turn_that_is_left_out_is_caught(tmp_path: Path, bodies: dict[str, Body]) -> None:
    row = bodies["h2o 0.2"]["samples"][0]
    for name in [name for name in row if name.startswith("turn3_")]:
        del row[name]
    summarise(bodies["h2o 0.2"])
    assert failed(tmp_path, bodies) == {"R3"}


@pytest.mark.parametrize("part", ["full_text", "question"])
def test_a_turn_that_is_compared_with_something_else_is_caught(
    tmp_path: Path, bodies: dict[str, Body], part: str
) -> None:
    bodies["h2o 0.2"]["samples"][0][f"turn2_{part}"] = "a big"
    assert failed(tmp_path, bodies) == {"R4"}
