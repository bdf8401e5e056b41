"""`kvbench measures` lists what can be measured, and what it says is what the registry says."""

from __future__ import annotations

import json
import re

import pytest

from kvbench.cli.main import run
from kvbench.measures import MEASURES


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["measures", *words]) == 0
    return capsys.readouterr().out


def test_every_measure_is_listed_with_unit_direction_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys)
    heads = {line.split()[0]: line for line in text.splitlines() if re.match(r"\w+ ", line)}
    for name, known in MEASURES.items():
        own = re.sub(r"turn\d_", "", name)
        assert known.definition in text
        if own == name:
            better = "neither" if known.better == "none" else known.better
            assert re.search(rf" {known.unit} +{better} is better +{re.escape(known.label)}$", heads[name])
        else:
            assert own in text.splitlines()[-1]


def test_words_choose_measures(capsys: pytest.CaptureFixture[str]) -> None:
    def names(*words: str) -> list[str]:
        return [known["name"] for known in json.loads(printed(capsys, *words, "--json"))]

    assert names() == [name for name in MEASURES if not name.startswith("turn")]
    assert names("KL", "ppl") == ["kl_to_full", "ppl", "ppl_released"]
    assert set(names("turn2_exact")) == {"turn2_exact_fraction"}
    assert names("entries") == ["entries_mean", "entries_peak"]


def test_a_word_that_no_measure_has_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measures", "pppl"]) == 2
    assert capsys.readouterr().err == "kvbench: the measure is 'pppl'; did you mean 'ppl'?\n"
