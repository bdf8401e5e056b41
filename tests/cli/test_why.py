"""`kvbench why`: from a record and a sample to what is said of it, and one line for all that goes wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.autopsy.counterfactual import Counterfactual, Evidence, Run
from kvbench.cache.policy import Pin
from kvbench.cli import why
from kvbench.cli.main import run
from kvbench.models import loader
from kvbench.results.record import read_record, write_record

PUBLISHED = Path(__file__).parents[2] / "results" / "published" / "default-sweep"
H2O, ELASTIC, RANDOM, FULL = "924061a2578e40da", "3eb1dd63c74b6647", "32e96827e7afe43e", "10cc44418c707190"
WINDOW = "0325adf4d654ce07"  # streaming_llm at 20 %


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["why", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(["why", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    "record",
    [f"{PUBLISHED}/cells/{WINDOW}", f"{PUBLISHED}/cells/{WINDOW}/record.json", "0325"],
    ids=["folder", "file", "key"],
)
def test_without_a_sample_those_that_differ_are_listed(record: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = told(capsys, record, "--results", str(PUBLISHED)).splitlines()
    assert lines[0].split()[:4] == ["0", "scenes-v2/test/0", "token", "4"]
    assert len(lines) == 38
    assert lines[-1].startswith("37 of 48 answers differ from the full cache's")
    listed = json.loads(told(capsys, record, "--results", str(PUBLISHED), "--json"))
    assert [one["number"] for one in listed] == [int(line.split()[0]) for line in lines[:-1]]
    assert listed[0]["first_divergence_tokens"] == 3


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "a folder that is not there": (("cells/none", "0"), "RECORD is cells/none, which is no key, and there is no such"),
    "a key of several": (("3",), r"the key 3, and of the 13 cells in .* 3 begin with it; give more digits"),
    "a key of none": (("ffff",), r"the key ffff, and of the 13 cells in .* none has it; known: "),
    "a results folder": ((str(PUBLISHED),), r"is a results folder; give one of its cells \(kvbench results list"),
    "a number too high": ((H2O, "48"), "SAMPLE is 48, and the record has 48 samples, from 0 to 47"),
    "an id that is none": ((H2O, "scenes-v2/tset/3"), "which is no id of the record; did you mean 'scenes-v2/test/3'"),
    "a stray word": ((H2O, "0/0", "dataset"), "dataset cannot be read as KEY=VALUE; kvbench why --help says how"),
    "the full cache": ((FULL, "0"), r"the cell 10cc44418c707190 is the full cache's, which lets nothing go"),
    "no evidence": ((H2O, "0", "--top", "0"), "--top is 0; it must be 1 or more"),
    "a policy of its own": ((ELASTIC, "2"), r"Elastic does not choose by a score alone, .* such as h2o or snapkv"),
    "other data": ((H2O, "3", "dataset.split=train"), r"dataset.split is 'test' and here 'train', so another answer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_words_are_told_in_one_line_before_a_model_is_loaded(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load_model", None)
    words, said = WRONG[case]
    assert re.search(said, refused(capsys, *words, "--results", str(PUBLISHED)))


def copied(folder: Path, key: str, **changes: Any) -> Path:
    """Write a published record with other fields; return its file."""
    body = read_record(PUBLISHED / "cells" / key / "record.json")
    path = folder / "cells" / key / "record.json"
    path.parent.mkdir(parents=True)
    write_record(path, body | changes)
    return path


def test_records_without_greedy_answers_are_refused_by_what_they_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = read_record(PUBLISHED / "cells" / H2O / "record.json")
    tasks = body["cell"]["task"]
    scored = copied(tmp_path / "a", H2O, cell=body["cell"] | {"task": {"perplexity": tasks["perplexity"]}})
    assert "measured perplexity and holds no answers; choose one with task=generation" in refused(
        capsys, str(scored), "0"
    )
    drawn = tasks | {"generation": tasks["generation"] | {"temperature": 0.7}}
    assert "drew its answers (task.generation.temperature=0.7)" in refused(
        capsys, str(copied(tmp_path / "b", H2O, cell=body["cell"] | {"task": drawn})), "0"
    )
    ended = copied(tmp_path / "c", H2O, status="oom")
    assert "ended as oom and holds no answer; choose one that is ok" in refused(capsys, str(ended), "0")
    torn = tmp_path / "record.json"
    shutil.copy(ended, torn)
    torn.write_bytes(torn.read_bytes()[:-40])
    assert str(torn) in refused(capsys, str(torn), "0")


@pytest.mark.long
def test_a_record_that_this_machine_does_not_give_again_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = read_record(PUBLISHED / "cells" / H2O / "record.json")
    rows = [row | {"text": "Two objects."} for row in body["samples"]]
    said = refused(capsys, str(copied(tmp_path, H2O, samples=rows)), "1")
    assert "the policy answers 'B3 cyan diamond.' to scenes-v2/test/0/0, where the record has 'Two objects.'" in said
    assert "was measured by torch 2.13.0+cpu on AMD EPYC: replay it there" in said


@pytest.mark.long
def test_a_published_record_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{PUBLISHED}/cells/{RANDOM}", "0", "--controls", "1"]
    text = told(capsys, *words)
    assert "The answers part at token 10: the full cache says “2”, the policy “3”." in text
    assert "“A” of the answer" in text
    assert "The full cache's word is back with 1 (layer 1, head 2); 1 (everywhere); 0 of 1 drawn" in text
    found = json.loads(told(capsys, *words, "--json"))
    assert found["evidence"][0]["rank"] == found["evidence"][0]["num_ranked"]
    assert [one["brings_back"] for one in found["runs"]] == [True, True]
    assert found["runs"][0]["pins"] == [{"position": found["evidence"][0]["position"], "layer": 0, "head": 1}]


SCORES = {"needles_recalled_fraction": 0.0, "rougeL_vs_full": 0.5}
BASE = Run(kept="nothing: as recorded", pins=(), text="a red dot", token=" dot", probability=0.25, brings_back=False,
           scores=SCORES, first_divergence_tokens=2)  # fmt: skip
BACK = replace(BASE, kept="1 (everywhere)", pins=(Pin(position=5),), token=" kettle", text="a red kettle",
               probability=0.9, brings_back=True, first_divergence_tokens=None)  # fmt: skip
KEPT = replace(BASE, kept="1 (layer 2, head 1)")
EVIDENCE = Evidence(position=5, name="“kettle” in “the red kettle”", layer=1, head=0, attention_fraction=0.123,
                    left_at=3, missing_fraction=0.5, rank=9, num_ranked=9, num_kept=8)  # fmt: skip
FOUND = Counterfactual(id="recall/1", question="Here is a red", reference="kettle", at=2,
                       full=replace(BACK, kept="everything: full cache", pins=()), policy=BASE, evidence=(EVIDENCE,),
                       runs=(KEPT, BACK), controls=(replace(KEPT, kept="drawn: “dot” (everywhere)"),),
                       num_missing=30)  # fmt: skip


def lines(found: Counterfactual) -> str:
    cell: Any = SimpleNamespace(name="h2o at 20 % tokens kept")
    return "\n".join(why._lines({"labels": {"model": "smollm2-135m"}}, cell, found))


def test_a_reader_is_told_where_the_evidence_went_and_what_came_back() -> None:
    text = lines(FOUND)
    assert "The answers part at token 3: the full cache says “kettle”, the policy “dot”." in text
    assert (
        "12.3% of what the full cache attends to there in layer 2, head 1; it left at answer token 3, ranked 9" in text
    )
    assert "gone from 50% of layers and heads" in text
    back = next(line for line in text.splitlines() if line.strip().startswith("1 (everywhere)"))
    assert back.split()[2:] == ["“kettle”", "0.900", "0.0", "%", "0.500", "a", "red", "kettle"]
    assert text.endswith(
        "The full cache's word is back with 1 (everywhere); 0 of 1 drawn entries, kept everywhere, do so too. "
        "The whole answer is the full cache's with 1 (everywhere)."
    )


def test_what_does_not_help_is_said_as_plainly() -> None:
    assert lines(replace(FOUND, runs=(KEPT,))).endswith(
        "Keeping it does not bring the word back; 0 of 1 drawn entries, kept everywhere, do so too."
    )
    held = replace(FOUND, runs=(replace(KEPT, is_held=False),), controls=())
    assert "(could not be held: sinks and recent tokens take the whole budget)" in lines(held)
    assert lines(held).endswith("Keeping it does not bring the word back, where it could be held at all.")
    elsewhere = replace(FOUND, runs=(replace(KEPT, token=None, probability=None),))
    assert "(elsewhere)" in lines(elsewhere)
    assert "no kept entry can be the reason" in lines(replace(FOUND, evidence=(), runs=(), controls=()))


def test_equal_answers_are_told_from_wrong_ones() -> None:
    same = replace(FOUND, at=None, policy=FOUND.full, evidence=(), runs=(), controls=())
    assert lines(same).endswith("token for token; what differs from the reference is not the cache.")
    assert lines(replace(same, reference="a red kettle")).endswith("token for token, and the reference.")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["help", "why"])
    assert "example: kvbench why results/published/default-sweep/cells/" in capsys.readouterr().out
