"""What becomes of merged tokens, against a walk along every chain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.autopsy.page import Sample, autopsy_section, kept, living_on, load_autopsy, sentence
from kvbench.errors import RecordError
from kvbench.report.load import load_results
from kvbench.results.record import NEVER, write_autopsy
from tests.autopsy.autopsies import HEADS, LAYERS, PROMPT, STEPS, autopsy_body, merged_array, patterns
from tests.report.synthetic import body, write_cell


def write(folder: Path, merged: Any) -> Path:
    record = body(policy="elastic", num_samples=1)
    path = write_cell(folder, record).with_name("autopsy.json")
    write_autopsy(path, autopsy_body(record["key"], merged=patterns(merged)))
    return folder


def sample_of(folder: Path) -> Sample:
    found = load_autopsy(load_results(folder).records[0])
    assert found is not None
    return found.samples[0]


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """Return a sample in which a third of the prompt is merged, in chains too."""
    return sample_of(write(tmp_path, merged_array(5)))


def walked(sample: Sample, step: int) -> Any:
    assert sample.merged is not None
    found = np.zeros(sample.merged.shape, dtype=bool)
    for layer, head, start in np.ndindex(*found.shape):
        row, into = sample.freed[layer, head], sample.merged[layer, head]
        place, seen = start, set()
        while row[place] <= step and into[place] != NEVER and place not in seen:
            seen.add(place)
            place = int(into[place])
        found[layer, head, start] = place != start and row[place] > step
    return found


@pytest.mark.parametrize("step", [0, 1, STEPS // 2, STEPS])
def test_a_merged_token_lives_on_as_long_as_the_last_entry_of_its_chain(sample: Sample, step: int) -> None:
    found = living_on(sample, step)
    assert (found == walked(sample, step)).all()
    assert found.any()
    assert not living_on(replace(sample, merged=None), step).any()


def test_chains_of_every_length_and_circles_are_followed(sample: Sample) -> None:
    freed = np.zeros((1, 1, PROMPT), dtype=np.uint16)
    chain = np.arange(1, PROMPT + 1, dtype=np.uint16)[None, None]
    chain[..., -1] = NEVER
    freed[..., -1] = 3
    long = replace(sample, freed=freed, merged=chain)
    assert living_on(long, 2).sum() == PROMPT - 1
    assert living_on(long, 3).sum() == 0
    chain[..., -1] = 0
    assert living_on(replace(sample, freed=np.zeros_like(freed), merged=chain), 0).sum() == 0


def test_the_numbers_say_what_is_left_of_merging_at_the_end(sample: Sample) -> None:
    found = kept([sample])
    assert found.merged == pytest.approx((walked(sample, 0).mean(), walked(sample, STEPS).mean()))
    assert found.merged[1] < found.merged[0]
    before, after = (f"{100 * share:.0f} %" for share in found.merged)
    assert f"{before} of the prompt is merged into other entries; at the end {after} of it lives on" in sentence(
        [sample]
    )


def test_the_page_does_not_say_that_merged_tokens_stay(tmp_path: Path) -> None:
    drawn = autopsy_section(load_results(write(tmp_path, merged_array(5))))
    assert "lives on inside another entry, as long as that entry is held" in drawn
    assert "merged into an entry that is held" in drawn


def test_an_entry_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    merged = np.full((LAYERS, HEADS, PROMPT), NEVER, dtype=np.uint16)
    merged[0, 0, 0] = PROMPT
    with pytest.raises(RecordError, match="merged"):
        sample_of(write(tmp_path, merged))
