from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

import kvbench.config.compose as compose_module
from kvbench.cache import Needs
from kvbench.cache.policy import needs_of
from kvbench.config.build import build_cell
from kvbench.config.compose import Composed, SharingLoader, compose_grid
from kvbench.errors import ConfigError
from tests.covering import one_in

REPO = Path(__file__).parents[2]


def cells(*overrides: str, multirun: bool = False, config_dir: Path | None = None) -> list[tuple[str | None, float]]:
    grid = compose_grid(list(overrides), multirun=multirun, config_dir=str(config_dir) if config_dir else None)
    return [(one.choices["policy"], one.config.budget.fraction) for one in grid]


def test_no_override_is_one_cell_of_the_full_cache() -> None:
    assert cells() == [("full", 0.2)]


def test_a_sweep_is_every_combination_in_order() -> None:
    found = cells("policy=h2o,elastic", "budget.fraction=0.1,0.3", multirun=True)
    assert found == [("h2o", 0.1), ("h2o", 0.3), ("elastic", 0.1), ("elastic", 0.3)]


def test_the_default_experiment_has_five_policies_at_three_budgets() -> None:
    """More would take `make run` over its three minutes."""
    found = cells("+experiment=default")
    names = ["full", "random", "streaming_llm", "h2o", "elastic"]
    assert sorted(found) == sorted((name, fraction) for name in names for fraction in (0.1, 0.2, 0.5))


def test_the_default_experiment_describes_scenes_and_asks_about_them_and_takes_other_data_as_well() -> None:
    one_cell = ["+experiment=default", "hydra.mode=RUN", "policy=h2o"]
    (asked,), (other,) = (
        compose_grid([*one_cell, *words], multirun=False, config_dir=None) for words in ([], ["dataset=synthetic"])
    )
    examples = build_cell(asked).dataset.examples()
    assert [example.one_answer for example in examples] == [False, True] * 24
    assert "ask" not in other.config.dataset


def swept(name: str) -> dict[str, list[str]]:
    """What an experiment sweeps over, as its file says."""
    params = OmegaConf.load(REPO / "conf" / "experiment" / f"{name}.yaml").hydra.sweeper.params
    return {str(key): str(values).split(",") for key, values in params.items()}


def test_positions_are_swept_over_what_is_described_and_what_is_released() -> None:
    pairs = ["streaming_llm", "local_elastic_release", "h2o", "h2o_elastic_release", "elastic", "elastic_released"]
    assert swept("positions") == {
        "dataset": ["frankenstein", "lectures"],
        "policy": ["full", *pairs],
        "positions": ["original", "in_cache", "released"],
        "budget.fraction": ["0.2", "0.5"],
    }
    words = ["+experiment=positions", "policy=elastic_released", "positions=released"]
    grid = compose_grid(words, multirun=False, config_dir=None)
    assert [one.config.budget.fraction for one in grid] == [0.2, 0.5] * 2
    assert all(one.config.task.generation.released_rouge for one in grid)
    assert swept("positions_gpu") == {"dataset": ["frankenstein_long", "lectures_long"]}


def test_the_parts_of_elastic_are_taken_out_one_by_one_and_together() -> None:
    grid = compose_grid(["+experiment=elastic_parts", "dataset=lectures_long"], multirun=False, config_dir=None)
    parts = {
        (one.config.policy.merge, one.config.policy.fixed_point, one.config.policy.recent_fraction) for one in grid
    }
    assert parts == set(product(("both", "values", "keys", "none"), (25, 1_000_000), (0.0, 0.5)))
    assert {(one.choices["policy"], one.config.positions, one.config.dataset.num_samples) for one in grid} == {
        ("elastic", "original", 48)
    }


@pytest.mark.parametrize(("name", "task"), [("paper_ppl", "perplexity_released"), ("paper_rouge", "generation")])
def test_the_papers_experiments_have_its_caches_at_nine_budgets(name: str, task: str) -> None:
    shares = ["1.0", "0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2"]
    policies = ["full", "elastic_released", "h2o_elastic_release", "local_elastic_release"]
    assert swept(name) == {"policy": policies, "budget.fraction": shares}
    words = [f"+experiment={name}", "dataset=conversation", "dataset.path=detail_1k.json", "policy=elastic"]
    grid = compose_grid([*words, "budget.fraction=0.5"], multirun=False, config_dir=None)
    (one,) = grid
    assert (one.choices["policy"], one.choices["model"]) == ("elastic", "llava-1.5-7b")
    assert (one.config.budget.fraction, one.config.batch_size) == (0.5, 1)
    assert task in one.config.task


def test_an_experiment_changes_settings_and_overrides_win() -> None:
    (first, second) = compose_grid(["+experiment=quick", "dataset.num_samples=7"], multirun=False, config_dir=None)
    assert (first.choices["policy"], second.choices["policy"]) == ("full", "h2o")
    assert (first.config.sweep, first.config.dataset.num_samples, first.config.task.speed.num_blocks) == ("quick", 7, 1)


def test_a_composed_cell_carries_nothing_of_hydra() -> None:
    (cell,) = compose_grid([], multirun=False, config_dir=None)
    assert isinstance(cell, Composed)
    assert "hydra" not in cell.config


@pytest.mark.parametrize("name", ["conf", "with space", "it's, one=odd [name]"])
def test_yamls_of_a_folder_of_ones_own_are_found(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "policy"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("_target_: mine.Mine\n")
    assert cells("policy=full,mine", multirun=True, config_dir=tmp_path / name) == [("full", 0.2), ("mine", 0.2)]


def test_an_unknown_policy_is_compared_with_ones_own_too(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "mine.yaml").write_text("_target_: mine.Mine\n")
    with pytest.raises(ConfigError, match="did you mean 'mine'"):
        cells("policy=mien", config_dir=tmp_path)


def by_hydra(overrides: list[str]) -> tuple[object, dict[str, str | None]]:
    with initialize_config_module("kvbench.conf", version_base="1.3"):
        config = hydra.compose("config", overrides=overrides, return_hydra_config=True)
    choices = {str(name): value for name, value in config.hydra.runtime.choices.items()}
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return OmegaConf.to_container(config, resolve=False), choices


@pytest.mark.parametrize(
    "words",
    one_in(
        3,
        [
            ["policy=h2o", "budget.fraction=0.3", "seed=3"],
            ["budget=tokens", "policy=elastic", "budget.tokens=77", "dataset.num_samples=null", "task=quality"],
            [
                "task=quality",
                "task.generation.max_new_tokens=5",
                "~task.fidelity",
                "++task.generation.released_rouge=true",
            ],
            ["~task.fidelity", "task.perplexity={_target_:a.B}", "sweep='a b'", "results=${oc.env:HOME}/r"],
            ["+mine.a=1", "mine.a=2"],
            ["weights=random", "model=llava-1.5-7b", "model.config.text_config.num_hidden_layers=1"],
            ["+experiment=default", "dataset.num_samples=2", "hydra.mode=RUN", "hydra/launcher=supervised"],
        ],
    ),
)
def test_a_cell_is_what_hydra_composes(words: list[str]) -> None:
    swept = ["budget.fraction=0.4,0.25" if word == "budget.fraction=0.3" else word for word in words]
    grid = compose_grid(swept, multirun=swept != words, config_dir=None)
    assert len(grid) == 1 + (swept != words)
    for one, fraction in zip(grid, (0.4, 0.25), strict=False):
        alone = [f"budget.fraction={fraction}" if word == "budget.fraction=0.3" else word for word in words]
        assert (OmegaConf.to_container(one.config, resolve=False), one.choices) == by_hydra(alone)


@pytest.mark.parametrize(
    "words",
    one_in(
        3,
        [
            ["policy=h2o", "budget.fraction=0.3", "seed=3"],
            ["budget.fraction=0.2", "policy=streaming_llm", "policy.num_sinks=4"],
            ["budget=tokens", "policy=elastic", "budget.tokens=77", "dataset.num_samples=null", "task=quality"],
            ["+experiment=default", "budget.fraction=0.5", "hydra.job.name=mine", "sweep='a b'"],
            ["budget.fraction=0.5", "seed=3", "hydra.job.config.override_dirname.exclude_keys=[seed]"],
            ["~task.fidelity", "task.perplexity={_target_:a.B}", "results=${oc.env:HOME}/r"],
        ],
    ),
)
def test_a_job_of_a_sweep_is_what_hydra_makes_of_it_notes_and_all(words: list[str]) -> None:
    with initialize_config_module("kvbench.conf", version_base="1.3"):
        plain = GlobalHydra.instance().config_loader()
        # A sweep is asked for with its experiment: Hydra 1.4 refuses a job that brings another sweeper than it has.
        whole = ["hydra.sweep.dir=there", *(word for word in words if word.startswith("+experiment="))]
        sweep = plain.load_configuration("config", whole, run_mode=RunMode.MULTIRUN)
        sharing = SharingLoader(plain, sweep)
        for job_words in (words, [word.replace("fraction=0.", "fraction=0.1") for word in words], words):
            ours, theirs = sharing.load_sweep_config(sweep, job_words), plain.load_sweep_config(sweep, job_words)
            assert OmegaConf.to_container(ours, resolve=False) == OmegaConf.to_container(theirs, resolve=False)
            assert OmegaConf.is_struct(ours) == OmegaConf.is_struct(theirs)
            assert OmegaConf.is_readonly(ours.hydra) == OmegaConf.is_readonly(theirs.hydra)
            assert sharing.take(job_words) == ours


def test_jobs_of_a_sweep_that_choose_alike_are_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep of 200 cells would begin half a minute later otherwise."""
    asked: list[object] = []
    with initialize_config_module("kvbench.conf", version_base="1.3"):
        plain = GlobalHydra.instance().config_loader()
        sweep = plain.load_configuration("config", [], run_mode=RunMode.MULTIRUN)
        real = plain.load_sweep_config
        monkeypatch.setattr(plain, "load_sweep_config", lambda *given: asked.append(given) or real(*given))
        sharing = SharingLoader(plain, sweep)
        for share in range(1, 10):
            words = ["policy=h2o", f"budget.fraction=0.{share}", f"seed={share}"]
            assert sharing.load_sweep_config(sweep, words).seed == share
    assert len(asked) == 1


def test_a_job_that_was_checked_is_taken_once_and_jobs_of_the_same_words_share_nothing() -> None:
    words = ["policy=h2o", "seed=3"]
    with initialize_config_module("kvbench.conf", version_base="1.3"):
        plain = GlobalHydra.instance().config_loader()
        sharing = SharingLoader(plain, plain.load_configuration("config", [], run_mode=RunMode.MULTIRUN))
        checked = [sharing.load_sweep_config(OmegaConf.create(), words) for _ in range(2)]
        taken = [sharing.take(words) for _ in range(2)]
    assert taken[0] is checked[1]
    taken[0].seed = 4
    assert (taken[0].seed, taken[1].seed, checked[0].seed) == (4, 3, 3)


def test_what_cells_choose_alike_is_composed_once_and_no_cell_changes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[list[str]] = []
    real = compose_module._composed

    def counted(overrides: list[str]) -> object:
        composed.append(overrides)
        return real(overrides)

    monkeypatch.setattr(compose_module, "_composed", counted)
    budgets = [round(0.01 * number, 2) for number in range(1, 51)]
    swept = ["policy=h2o,elastic", f"budget.fraction={','.join(map(str, budgets))}", "seed=7,8"]
    grid = compose_grid([*swept, "task.speed.new_tokens=4"], multirun=True, config_dir=None)
    assert [(one.choices["policy"], one.config.budget.fraction, one.config.seed) for one in grid] == [
        (policy, budget, seed) for policy in ("h2o", "elastic") for budget in budgets for seed in (7, 8)
    ]
    assert len(composed) == 1 + 2, "Hydra's own settings, and each policy once"
    grid[0].config.task.speed.new_tokens = 5
    grid[0].choices["policy"] = "mine"
    assert (grid[1].config.task.speed.new_tokens, grid[1].choices["policy"]) == (4, "h2o")


def test_an_unknown_key_that_is_set_in_every_cell_is_still_told_with_close_matches() -> None:
    with pytest.raises(ConfigError, match=r"budget\.fracton is no setting; did you mean 'budget\.fraction'"):
        compose_grid(["policy=h2o", "budget.fracton=0.1,0.2"], multirun=True, config_dir=None)


@pytest.mark.long
def test_composing_a_grid_imports_no_torch() -> None:
    code = (
        "import sys; from kvbench.config.compose import compose_grid; "
        "n = len(compose_grid(['+experiment=default'], multirun=False, config_dir=None)); "
        "sys.exit(n != 15 or bool({'torch', 'transformers', 'wandb', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@pytest.mark.long
def test_speed_h100_is_every_workload_with_every_policy_and_each_can_be_run_alone() -> None:
    grid = compose_grid(["+experiment=speed_h100"], multirun=False, config_dir=None)
    shapes = {
        (one.choices["model"], one.config.task.speed.batch_size, one.config.dataset.prompt_tokens)
        for one in grid
        if one.config.task.memory.batch_size == one.config.task.speed.batch_size == one.config.dataset.num_examples
    }
    assert shapes == {
        ("llava-1.5-13b", 8, 1024),
        ("llava-1.5-13b", 16, 624),
        ("llava-1.5-7b", 16, 1024),
        ("llava-1.5-7b", 48, 624),
        ("llama-3.1-8b", 1, 32768),
        ("llama-3.1-8b", 1, 131072),
    }
    assert len(grid) == 6 * 5
    assert all(one.config.model.weights == "random" and one.config.task.speed.num_warmups >= 3 for one in grid)
    (alone,) = compose_grid(
        ["+experiment=speed_h100", "workload=7b_b48_624", "policy=h2o"], multirun=False, config_dir=None
    )
    assert (alone.config.task.speed.batch_size, alone.choices["policy"]) == (48, "h2o")


def test_random_weights_choose_the_data_set_without_text_unless_another_is_asked_for() -> None:
    for words, expected in ((["weights=random"], "synthetic"), (["weights=random", "dataset=scenes"], "scenes")):
        (one,) = compose_grid(words, multirun=False, config_dir=None)
        assert (one.choices["dataset"], one.config.model.weights) == (expected, "random")


def test_a_glob_sweeps_over_the_names_of_its_group_and_over_ones_own(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "h2o_mine.yaml").write_text("_target_: mine.Mine\n")
    swept = "policy=glob([h2o*,fu*],exclude=*release*)"
    assert cells(swept, multirun=True) == [("full", 0.2), ("h2o", 0.2), ("h2o_mean", 0.2)]
    found = cells(swept, multirun=True, config_dir=tmp_path)
    assert found == [("full", 0.2), ("h2o", 0.2), ("h2o_mean", 0.2), ("h2o_mine", 0.2)]


def test_a_glob_of_an_experiment_is_swept_too(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    lines = [
        "# @package _global_",
        "hydra:",
        "  mode: MULTIRUN",
        "  sweeper:",
        "    params:",
        "      policy: glob(h2o*)",
    ]
    (tmp_path / "experiment" / "mine.yaml").write_text("\n".join(lines))
    found = cells("+experiment=mine", config_dir=tmp_path)
    assert [name for name, _ in found] == ["h2o", "h2o_elastic_release", "h2o_mean", "h2o_released"]


@pytest.mark.parametrize("word", ["policy=glob(zzz*)", "batch_size=range(3,1)", "batch_size=glob(*)"])
def test_a_sweep_over_nothing_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="stands for no value at all"):
        cells(word, multirun=True)


def test_of_a_sweeper_that_chooses_while_it_runs_what_its_jobs_have_in_common_is_composed(tmp_path: Path) -> None:
    (tmp_path / "hydra" / "sweeper").mkdir(parents=True)
    (tmp_path / "hydra" / "sweeper" / "odd.yaml").write_text("_target_: odd.Sweeper\n")
    words = ["policy=h2o,full", "budget.fraction=0.3", "hydra/sweeper=odd"]
    (one,) = compose_grid(words, multirun=True, config_dir=str(tmp_path))
    assert (one.choices["policy"], one.config.budget.fraction, one.is_search) == ("full", 0.3, True)
    (alone,) = compose_grid(["policy=h2o", "hydra/sweeper=odd"], multirun=False, config_dir=str(tmp_path))
    assert (alone.choices["policy"], alone.is_search) == ("h2o", False)


def test_a_folder_of_ones_own_stands_beside_a_search_path_that_was_given(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "policy").mkdir(parents=True)
        (tmp_path / name / "policy" / f"{name}.yaml").write_text("_target_: mine.Mine\n")
    words = ["policy=one,two", f"hydra.searchpath=[file://{tmp_path / 'two'}]"]
    assert cells(*words, multirun=True, config_dir=tmp_path / "one") == [("one", 0.2), ("two", 0.2)]


def test_the_text_experiment_measures_the_sample_that_was_meant_on_a_cpu_and_on_a_gpu() -> None:
    policies = ["full", "random", "streaming_llm", "h2o", "elastic", "snapkv"]
    small = {"dataset": ["frankenstein", "recall"], "policy": policies, "budget.fraction": ["0.1", "0.2", "0.5"]}
    assert swept("text") == small
    large = swept("text_gpu")
    assert large.pop("policy")[0].startswith("glob(*")
    assert large == {"dataset": ["frankenstein_long", "recall_many"]}
    for name, windows, texts in (("text", (512, 64, 8), 20), ("text_gpu", (1024, 256, 48), 100)):
        grid = compose_grid(
            [f"+experiment={name}", "policy=h2o", "budget.fraction=0.2"], multirun=False, config_dir=None
        )
        novel, recall = (one.config.dataset for one in grid)
        assert (novel.prompt_tokens, novel.scored_tokens, novel.num_samples) == windows
        assert recall.num_samples == texts
        assert {one.choices["model"] for one in grid} == {"smollm2-135m"}
        assert set(grid[0].config.task) == {"perplexity", "generation"}


def test_the_text_experiment_on_a_gpu_takes_every_policy_that_text_alone_can_have() -> None:
    left_out = ",".join(swept("text_gpu")["policy"]).partition("exclude=[")[2].rstrip("])").split(", ")
    yamls = {path.stem: OmegaConf.load(path) for path in (REPO / "conf" / "policy").glob("*.yaml")}
    needs = {name: needs_of(hydra.utils.instantiate(content)) for name, content in yamls.items()}
    assert {name for name, one in needs.items() if one & (Needs.PICTURE | Needs.QUESTION)} == set(left_out)
