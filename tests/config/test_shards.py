"""A sweep in shards: every cell in one share, shares of about equal time, groups cut as seldom as can be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_plugins.kvbench_shards import Listing, listing
from kvbench.cli.sweep import App
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid, listed
from kvbench.errors import ConfigError
from kvbench.sweep.cell import Cell

PARTS: dict[str, Any] = {
    "text": {"words": {"model": "a", "dataset": "long", "task": "ppl"}, "small": {"dataset": "short"}, "time": 3.0},
    "asked": {"words": {"model": "a", "dataset": "asked", "query_visible": False}, "time": 1.2},
    "seen": {"words": {"model": "picture", "dataset": "scenes", "dataset.num_samples": 100}, "own_model": True},
}
SWEPT = ("budget.fraction=0.2,0.1", "policy=b,full,a")


def of(*words: str, parts: Any = PARTS, only: Any = "all", shard: str = "1/1", size: str = "large") -> Listing:
    overrides = OverridesParser.create().parse_overrides([*SWEPT, *words])
    return listing(overrides, {"parts": parts, "only": only, "shard": shard, "size": size})


def time_of(job: Sequence[str]) -> float:
    dataset = next(word for word in job if word.startswith("dataset="))
    return {"dataset=long": 3.0, "dataset=asked": 1.2}.get(dataset, 1.0)


@settings(max_examples=12)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3))
def test_every_cell_is_in_one_share_and_shares_take_about_as_long(count: int, policies: int, budgets: int) -> None:
    words = (f"policy=full,{','.join(f'p{n}' for n in range(policies))}", f"budget.fraction={'1,' * budgets}2")
    whole = of(*words).jobs
    shares = [of(*words, shard=f"{number}/{count}") for number in range(1, count + 1)]
    assert [job for share in shares for job in share.jobs] == whole
    assert {share.num_all for share in shares} == {len(whole)}
    total = sum(map(time_of, whole))
    for share in shares:
        assert abs(sum(map(time_of, share.jobs)) - total / count) <= 3.0  # the longest cell


@settings(max_examples=12)
@given(st.integers(1, 12))
def test_a_group_of_cells_is_cut_only_where_a_share_ends(count: int) -> None:
    shares = [of(shard=f"{number}/{count}").jobs for number in range(1, count + 1)]
    groups = [name for share in shares for name, _ in groupby(next(w for w in job if "dataset=" in w) for job in share)]
    assert len(groups) <= len(PARTS) + count - 1


def test_the_full_cache_comes_first_and_once_in_every_part() -> None:
    jobs = of("+policy/allocation=uniform,ada", only=["text"]).jobs
    assert jobs[0] == ["model=a", "dataset=long", "task=ppl", "policy=full"]
    assert [word for job in jobs[1:] for word in job if word.startswith("budget")] == (
        ["budget.fraction=0.2"] * 4 + ["budget.fraction=0.1"] * 4
    )
    assert not any("policy=full" in job for job in jobs[1:])


def test_a_model_that_is_given_is_the_text_model_and_a_setting_that_is_given_counts() -> None:
    jobs = of("model.checkpoint=file", "dataset.num_samples=4").jobs
    for job in jobs:
        assert ("model.checkpoint=file" in job) == ("dataset=scenes" not in job)
        assert "dataset.num_samples=4" in job
        assert "dataset.num_samples=100" not in job
    assert {word for job in of("model=mine").jobs for word in job if word.startswith("model")} == {
        "model=mine",
        "model=picture",
    }


def test_without_a_gpu_the_texts_are_others_and_that_is_said() -> None:
    found = of("device=cpu", size="auto")
    assert found.is_small
    assert "there is no GPU" in found.sentence
    assert {word for job in found.jobs for word in job if word.startswith("dataset=")} == {
        "dataset=short",
        "dataset=asked",
        "dataset=scenes",
    }
    assert not of("device=cuda:1", size="auto").is_small


@pytest.mark.parametrize(
    ("words", "more", "told"),
    [
        ((), {"shard": "3/2"}, "shard is '3/2'; it must be i/n with 1 <= i <= n"),
        ((), {"shard": "half"}, "shard is 'half'; it must be i/n"),
        ((), {"only": ["texts"]}, "parts is 'texts'; did you mean 'text'"),
        ((), {"size": "big"}, "size is 'big'; "),
        (("dataset=scenes",), {}, "dataset=scenes changes what is measured; "),
        (("query_visible=true",), {}, "query_visible=true changes what is measured; "),
    ],
)
def test_a_share_that_is_none_and_words_that_change_a_part_are_one_line(
    words: tuple[str, ...], more: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        of(*words, **more)
    assert told in str(caught.value)


def test_the_leaderboard_has_every_policy_there_is_at_every_budget() -> None:
    found = listed(["+experiment=leaderboard", "leaderboard.size=large"], config_dir=None)
    assert found is not None
    assert found.is_whole
    policies = {path.stem for path in (Path(__file__).parents[2] / "conf" / "policy").glob("*.yaml")}
    for part in ("frankenstein_long", "scenes_asked"):
        jobs = [job for job in found.jobs if f"dataset={part}" in job]
        for share in ("0.2", "0.1", "0.5"):
            at = {word.removeprefix("policy=") for job in jobs if f"budget.fraction={share}" in job for word in job}
            assert policies - {"full"} <= at
        assert "policy=full" in jobs[0]
        assert "budget.fraction=0.2" in jobs[1]
    assert found.num_all == 5 * (1 + 3 * (len(policies) - 1))


def test_the_factorial_has_every_combination_of_parts_beside_full() -> None:
    found = listed(["+experiment=factorial", "factorial.parts=text", "factorial.size=small"], config_dir=None)
    assert found is not None
    kinds = ("policy=", "+policy/allocation=", "+policy/merge=")
    made = [tuple(word for word in job if word.startswith(kinds)) for job in found.jobs]
    assert made[0] == ("policy=full",)
    assert len(set(made)) == len(made) == 1 + 6 * 4 * 3
    assert ("policy=vatp", "+policy/allocation=uniform", "+policy/merge=drop") in made


def factorial(*words: str) -> list[Cell]:
    words = ("+experiment=factorial", "factorial.parts=scenes", *words)
    return [build_cell(composed) for composed in compose_grid(words, multirun=False, config_dir=None)]


def test_a_policy_with_parts_that_do_nothing_is_the_policy_itself() -> None:
    words = ["model=tiny-llava", "dataset=scenes", "dataset.num_samples=100", "task=perplexity", "batch_size=auto"]
    plain = compose_grid([*words, "policy=vatp", "positions=original"], multirun=False, config_dir=None)
    more = ("policy=vatp", "+policy/allocation=uniform", "+policy/merge=drop", "factorial.size=large", "device=cpu")
    (cell,) = factorial(*more)
    assert cell.labels["policy"] == "vatp+uniform+drop"
    assert cell.key == build_cell(plain[0]).key


@pytest.mark.long
def test_each_combination_of_the_factorial_can_be_built() -> None:
    cells = factorial()
    assert len({cell.key for cell in cells}) == len(cells) == 1 + 6 * 4 * 3


def test_what_cannot_run_is_named_and_left_out_only_where_that_was_asked_for(tmp_path: Path) -> None:
    words = ["task=quick", "budget=tokens", "budget.tokens=8", f"results={tmp_path}", "policy=full,snapkv,h2o"]
    grid = compose_grid([*words, "refused=leave_out"], multirun=True, config_dir=None)
    app = App()
    assert [job is None for job in app.take(grid)] == [False, True, False]
    ((reason, names),) = app.left_out.items()
    assert names == ["snapkv at 8 on scenes"]
    for word, told in (("fail", reason), ("skip", "refused is 'skip'; ")):
        for composed in grid:
            composed.config.refused = word
        with pytest.raises(ConfigError, match=re.escape(told)):
            App().take(grid)


def test_where_the_full_cache_cannot_run_nothing_is_left_out(tmp_path: Path) -> None:
    words = ["policy=full,h2o", "dataset=scenes", "model=local", "model.checkpoint=nowhere", "refused=leave_out"]
    with pytest.raises(ConfigError, match="nowhere"):
        App().take(compose_grid([*words, f"results={tmp_path}"], multirun=True, config_dir=None))


def test_a_sweep_without_the_full_cache_is_checked_too(tmp_path: Path) -> None:
    """Every cell of it may be left out; where all are, `kvbench` ends with the reason."""
    words = ["task=quick", "budget=tokens", "budget.tokens=8", "refused=leave_out"]
    for policies, left in (("snapkv,h2o", [True, False]), ("snapkv", [True])):
        grid = compose_grid([*words, f"results={tmp_path}", f"policy={policies}"], multirun=True, config_dir=None)
        assert [job is None for job in App().take(grid)] == left
    with pytest.raises(ConfigError, match="results is ''; it must be the path of a folder"):
        App().take(compose_grid([*words, "results=", "policy=snapkv,h2o"], multirun=True, config_dir=None))
    with pytest.raises(ConfigError, match="sweep has 2 values in one sweep"):
        App().take(compose_grid([*words, "sweep=a,b", "policy=h2o"], multirun=True, config_dir=None))


def test_a_record_states_the_share_that_it_was_measured_in() -> None:
    words = ["+experiment=leaderboard", "leaderboard.parts=scenes", "policy=full,h2o", "budget.fraction=0.2"]
    (one,), (other,) = (
        compose_grid([*words, f"leaderboard.shard={number}/2"], multirun=False, config_dir=None) for number in (1, 2)
    )
    cells = [build_cell(one), build_cell(other)]
    assert [cell.environment()["shard"] for cell in cells] == ["1/2", "2/2"]
    alone = build_cell(compose_grid(words, multirun=False, config_dir=None)[0])
    assert alone.key == cells[0].key
