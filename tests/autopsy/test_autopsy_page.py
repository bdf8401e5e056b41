from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.autopsy.page import (
    Sample,
    autopsy_section,
    chance_overlap,
    first_freed,
    kept,
    load_autopsy,
    overlap,
    percent,
    sentence,
)
from kvbench.errors import RecordError
from kvbench.report.load import load_results
from kvbench.report.page import render_page
from kvbench.results.files import pack, replace_file
from kvbench.results.record import NEVER, read_autopsy, write_autopsy
from kvbench.results.store import leftovers, verify
from tests.autopsy.autopsies import (
    GRID,
    HEADS,
    LAYERS,
    PROMPT,
    STEPS,
    add_autopsies,
    autopsy_body,
    freed_array,
    patterns,
)
from tests.report.synthetic import body, embedded, write_cell

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Full cache and two policies at one budget, each with an autopsy."""
    write_cell(tmp_path, body(policy="full", budget=None, num_samples=2))
    for policy in ("h2o", "random"):
        write_cell(tmp_path, body(policy=policy, num_samples=2))
    add_autopsies(
        tmp_path,
    )
    return tmp_path


def samples_of(folder: Path, policy: str) -> tuple[Sample, ...]:
    cell = next(cell for cell in load_results(folder).records if cell.policy == policy)
    found = load_autopsy(cell)
    assert found is not None
    return found.samples


def data_of(page: str) -> Any:
    return embedded(page, "autopsy-data")


def test_the_script_gets_what_is_stored(folder: Path) -> None:
    stored = samples_of(folder, "h2o")[0]
    data = data_of(autopsy_section(load_results(folder)))
    assert len(data) == 1
    cell = next(cell for cell in data[0]["cells"] if cell["label"] == "h2o")
    view = cell["views"]["scenes/test/0"]
    for layer in range(LAYERS):
        for head in range(HEADS):
            raw = base64.b64decode(view["freed"]["patterns"][view["freed"]["of"][layer][head]])
            shown = [NEVER if byte == 255 else byte for byte in raw]
            assert shown == stored.freed[layer, head].tolist()
    assert view["statistics"]["entries"] == stored.statistics["entries"].ravel().tolist()
    assert data[0]["items"]["scenes/test/0"]["picture"]["places"] == list(range(GRID**2))
    assert data[0]["budgets"] == ["20 % tokens kept"]


def test_many_steps_take_two_bytes_each(folder: Path) -> None:
    path = next(folder.glob("cells/*/autopsy.json"))
    stored = read_autopsy(path)
    sample = stored["samples"][0]
    steps = 300
    freed = np.full((LAYERS, HEADS, PROMPT + steps), NEVER, dtype=np.uint16)
    freed[0, 0, :2] = (0, 299)
    sample |= {"steps": steps, "tokens": [*sample["tokens"][:PROMPT], *["a"] * steps], "freed": patterns(freed)}
    sample["kinds"] = pack(np.zeros(PROMPT + steps, dtype=np.uint8))
    sample |= {"picture": None, "checkpoints": [0, 6, steps]}
    write_autopsy(path, stored)
    data = data_of(autopsy_section(load_results(folder)))
    views = [view for cell in data[0]["cells"] for view in cell["views"].values() if view["steps"] == steps]
    first = base64.b64decode(views[0]["freed"]["patterns"][views[0]["freed"]["of"][0][0]])
    assert np.frombuffer(first, dtype="<u2")[:3].tolist() == [0, 299, NEVER]


def test_numbers_are_those_of_the_stored_story(folder: Path) -> None:
    sample = samples_of(folder, "h2o")[0]
    found = kept([sample])
    words = [p for p in range(PROMPT) if sample.kinds[p] != 1]
    assert found.text is not None
    assert found.text[0] == pytest.approx(
        np.mean([[row[p] > 0 for p in words] for row in sample.freed.reshape(-1, PROMPT + STEPS)])
    )
    assert found.image is not None
    assert found.image[1] == pytest.approx(sample.statistics["image_kept_permille"][-1].mean() / 1000)
    assert found.merged == (0.0, 0.0)
    assert "of the image patches" in sentence([sample])


def test_overlap_is_one_with_itself_and_near_chance_for_blind_choices(folder: Path) -> None:
    one = samples_of(folder, "h2o")
    assert overlap(one, one) == 1.0
    blind = [replace(one[0], id=str(seed), freed=freed_array(seed)) for seed in range(200)]
    other = [replace(one[0], id=str(seed), freed=freed_array(seed + 1000)) for seed in range(200)]
    found, chance = overlap(blind, other), chance_overlap(blind, other)
    assert found is not None
    assert abs(found - chance) < 0.02
    assert overlap(one, [replace(one[0], id="another")]) is None


def test_the_first_to_go_is_named_as_a_reader_would(folder: Path) -> None:
    sample = samples_of(folder, "h2o")[0]
    freed = np.full_like(sample.freed, NEVER)
    assert first_freed(replace(sample, freed=freed)) == ""
    freed[..., 3 + 5] = 2  # the sixth patch of a grid of four columns
    freed[0, 0, 4 + GRID**2] = 9
    assert first_freed(replace(sample, freed=freed)).endswith("at its 2nd token: patch row 2, column 2.")
    freed[..., 3 + 5] = 0
    assert first_freed(replace(sample, freed=freed)).endswith("at its 9th token: \u201cis\u201d.")


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "none"), (1.0, "all"), (0.001, "under 1 %"), (0.999, "over 99 %"), (0.126, "13 %")]
)
def test_a_share_is_never_rounded_to_none_or_all(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_page_with_autopsies_is_the_same_bytes_when_built_again(folder: Path) -> None:
    first = render_page(load_results(folder), [])
    assert render_page(load_results(folder), []) == first
    assert "What the cache kept" in first
    assert str(folder) not in first


def test_words_of_a_model_never_become_markup(tmp_path: Path) -> None:
    record = body(policy=EVIL, model=EVIL, num_samples=1)
    record["samples"][0]["id"] = EVIL
    write_cell(tmp_path, record)
    stored = autopsy_body(record["key"], ids=(EVIL,), answer=EVIL)
    stored["samples"][0]["tokens"] = [EVIL] * (PROMPT + STEPS)
    stored["left_out"] = [{"id": EVIL, "reason": EVIL}]
    write_autopsy(tmp_path / "cells" / record["key"][:16] / "autopsy.json", stored)
    section = autopsy_section(load_results(tmp_path))
    assert section.count("<script") == 1
    assert "<img" not in section
    assert data_of(section)[0]["cells"][0]["views"][EVIL]["answer"][0] == EVIL


@pytest.mark.parametrize(
    "damage",
    [
        {"tokens": ["a"]},
        {"prompt_tokens": -1},
        {"prompt_tokens": True},
        {"steps": STEPS + 1},
        {"kinds": None},
        {"kinds": pack(np.zeros(3, dtype=np.uint8))},
        {"layers": [0, 7, 9]},
        {"layers": []},
        {"checkpoints": [3, 1]},
        {"freed": {"patterns": pack(np.zeros((1, 4), dtype=np.uint16)), "of": [[0]]}},
        {"freed": {"patterns": pack(np.zeros((1, 4), dtype=np.uint16)), "of": [[99]]}},
        {"statistics": {"entries": pack(np.zeros((1, 1, 1), dtype=np.uint16))}},
        {"attention": {"type": "u1", "shape": [2], "data": "x"}},
        {"picture": {"media": "image/svg+xml", "data": "AAAA"}},
        {"picture": 3},
        {"merged": []},
    ],
)
def test_a_file_that_holds_something_else_costs_its_own_figures_only(folder: Path, damage: dict[str, Any]) -> None:
    path = sorted(folder.glob("cells/*/autopsy.json"))[0]
    key = read_autopsy(path)["key"]
    write_autopsy(path, autopsy_body(key, **damage))
    cell = next(cell for cell in load_results(folder).records if cell.key == key)
    with pytest.raises(RecordError):
        load_autopsy(cell)
    section = autopsy_section(load_results(folder))
    assert f"cells/{key[:16]}/autopsy.json" in section
    assert len(data_of(section)[0]["cells"]) == 2
    assert "Traceback" not in section


@pytest.mark.long
def test_torn_altered_and_foreign_files_are_noticed_at_every_byte(folder: Path) -> None:
    path = sorted(folder.glob("cells/*/autopsy.json"))[0]
    whole = path.read_bytes()
    before = autopsy_section(load_results(folder))
    step = len(whole) // 40
    for cut in range(0, len(whole) - 2, step):
        for changed in (whole[:cut], whole[:cut] + bytes([whole[cut] ^ 1]) + whole[cut + 1 :]):
            replace_file(path, changed)
            assert [problem.path for problem in verify(folder).problems if "autopsy" in problem.path]
            assert len(data_of(autopsy_section(load_results(folder)))[0]["cells"]) == 2
    replace_file(path, whole)
    assert autopsy_section(load_results(folder)) == before
    assert not [problem for problem in verify(folder).problems if "autopsy" in problem.path]


def test_an_autopsy_of_another_cell_is_not_taken_for_this_one(folder: Path) -> None:
    one, other = sorted(folder.glob("cells/*/autopsy.json"))[:2]
    replace_file(one, other.read_bytes())
    assert "belongs to another cell" in autopsy_section(load_results(folder))
    assert any("belongs to the cell" in problem.message for problem in verify(folder).problems)


def test_without_files_the_section_says_how_to_get_them(sweep_folder: Path, tmp_path: Path) -> None:
    assert "autopsy=few" in autopsy_section(load_results(sweep_folder))
    assert autopsy_section(replace(load_results(sweep_folder), records=())) == ""


def test_gc_finds_the_autopsy_of_a_cell_that_never_finished(folder: Path) -> None:
    path = sorted(folder.glob("cells/*/autopsy.json"))[0]
    assert path not in [leftover.path for leftover in leftovers(folder)]
    path.with_name("record.json").unlink()
    assert [leftover.path for leftover in leftovers(folder)] == [path]
    claim = folder / "claims" / f"{path.parent.name}.0"
    claim.parent.mkdir()
    claim.write_text("{}")
    assert path not in [leftover.path for leftover in leftovers(folder)]
