"""What authors of policies type: the list, a new one, the contract on one, and what a policy learns of a model."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvbench.cache import Calibrated, Policy
from kvbench.cache.artefact import artefact_bytes, read_artefact
from kvbench.cli.main import run
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.contract.catalogue import PAGES, catalogue, facts_of, filled_page, policy_named
from kvbench.contract.trial import RULES, findings
from kvbench.errors import ConfigError
from kvbench.models.spec import BUNDLED_FOLDER
from kvbench.sweep.cell import Cell
from tests.covering import YAMLS

REPO = Path(__file__).parents[2]
NAMES = [path.stem for path in YAMLS]


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of one's own, whose modules are forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert run(list(words)) == code
    shown = capsys.readouterr()
    return shown.err if code == 2 else shown.out


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_has_a_complete_line(name: str) -> None:
    facts = facts_of(name)
    assert len(facts.what) > 10
    assert facts.sources or facts.status == "baseline"
    assert facts.score
    assert facts.cuts in ("prompt and decode", "prompt", "decode", "never")
    assert facts.total in ("exact", "bounded", "data-dependent", "everything")
    assert facts.status in ("as described", "as released", "baseline")


def test_parts_needs_and_sources_are_read_from_yaml_and_class() -> None:
    lines = {name: facts_of(name) for name in ("adakv", "h2o", "elastic", "snapkv_released", "full")}
    assert lines["adakv"].sources == ("2407.11550",)
    assert (lines["adakv"].score, lines["adakv"].allocation, lines["adakv"].needs) == ("SnapKV", "ada", ("WINDOW",))
    assert (lines["h2o"].cuts, lines["h2o"].rhythm, lines["h2o"].merge) == ("prompt and decode", "each token", "drop")
    assert (lines["elastic"].score, lines["elastic"].merge, lines["elastic"].total) == ("own plan", "own", "bounded")
    assert (lines["snapkv_released"].status, lines["full"].cuts) == ("as released", "never")


@pytest.mark.parametrize("page", PAGES)
def test_the_lists_in_the_pages_are_those_of_the_yamls(page: str) -> None:
    text = (REPO / page).read_text(encoding="utf-8")
    assert text.count("<!-- policies: ") == 1
    assert filled_page(text, catalogue()) == text, "run kvbench policies --update ."


def test_the_readme_stays_short() -> None:
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_list_is_printed_as_a_table_as_json_and_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "policies")
    assert all(f" {name} " in text for name in NAMES)
    found = json.loads(said(capsys, "policies", "window", "pyramid", "--json"))
    assert [one["name"] for one in found] == ["pyramidkv"]
    assert said(capsys, "policies", "tova", "--markdown").count("\n") == 3
    assert said(capsys, "policies", "pyramdikv", code=2) == (
        "kvbench: no policy has 'pyramdikv' in its line; did you mean 'pyramidkv'?\n"
    )


@pytest.mark.parametrize("like", [None, *NAMES])
def test_a_new_policy_begins_as_another_and_decides_alike(
    like: str | None, own_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["new-policy", "brand_new", "--config-dir", "conf", *(["--like", like] if like else [])]
    told = said(capsys, *words)
    assert "kvbench check-policy brand_new --config-dir conf" in told
    sys.path.append(str(own_path))
    new = policy_named("brand_new", "conf")
    assert type(new).__name__ == "BrandNew"
    assert facts_of("brand_new", "conf").status == "your own"
    if like is not None:
        old = policy_named(like)
        assert vars(new) == vars(old)
        assert new.needs == old.needs
        assert "class BrandNew" in (own_path / "brand_new.py").read_text()


WRONG_NAMES = {
    "Mine": "it must be a word of small letters",
    "my-policy": "it must be a word of small letters",
    "lambda": "it must be a word of small letters",
    "../mine": "it must be a word of small letters",
    "h2o": "there is a policy h2o already",
    "json": "Python has a module json already",
}


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_name_that_no_policy_can_have_is_refused_in_one_line(
    name: str, own_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = said(capsys, "new-policy", name, "--config-dir", "conf", code=2)
    assert WRONG_NAMES[name] in told
    assert told.count("\n") == 1
    assert list(own_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(own_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_path / "mine.txt").write_text("")
    for folder in ("mine.txt", "mine.txt/conf"):
        assert "mine.txt is no folder" in said(capsys, "new-policy", "mine", "--config-dir", folder, code=2)


def test_a_policy_to_begin_with_is_named_or_guessed_and_nothing_is_written_over(
    own_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = said(capsys, "new-policy", "mine", "--like", "snapvk", "--config-dir", "conf", code=2)
    assert told == "kvbench: --like is 'snapvk'; did you mean 'snapkv'?\n"
    said(capsys, "new-policy", "mine", "--config-dir", "conf")
    (own_path / "mine.py").unlink()
    assert "is there already" in said(capsys, "new-policy", "mine", "--config-dir", "conf", code=2)


def test_a_new_policy_of_a_checkout_lies_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvbench.cli import policies as new_policy

    for folder in ("policies", "conf/policy"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "policies" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(new_policy, "files", lambda package: tmp_path / "conf")
    told = said(capsys, "new-policy", "mine")
    assert "make test" in told
    assert "_target_: kvbench.policies.mine.Mine" in (tmp_path / "conf" / "policy" / "mine.yaml").read_text()
    assert "class Mine(ScorePolicy)" in (tmp_path / "policies" / "mine.py").read_text()
    (tmp_path / "pyproject.toml").unlink()
    assert "add --config-dir conf" in said(capsys, "new-policy", "another", code=2)


HEAD = """\
from dataclasses import dataclass
from typing import ClassVar
import torch
from kvbench import Needs, Plan, Policy, ScorePolicy, View

"""
WRONG = {  # what an author writes, the rule that says so, and a part of its line
    "nan": (
        "def score(self, view): return view.position / 0 * 0",
        "holds_its_budget",
        "score returned NaN in layer 0",
    ),
    "raises": ("def score(self, view): return view.nothing", "holds_its_budget", "(wrong.py, line 8)"),
    "undeclared": ("def score(self, view): return view.mass", "holds_its_budget", "Needs.MASS"),
    "pads": (
        "def score(self, view): return (view.position - view.position.amin(-1, keepdim=True)).float() % 5 "
        "+ view.position / 100",
        "sees_no_pads",
        "pads on its left keeps other entries than alone",
    ),
    "writes": (
        "def score(self, view): view.keys.mul_(1.01); return view.position.float()",
        "leaves_its_view_alone",
        "view.keys is changed in layer 0",
    ),
    "waits": (
        "def score(self, view): return view.position.float() * float(view.keys.mean() > -9)",
        "waits_for_nothing",
        "waits for the device",
    ),
    "draws": (
        "def score(self, view): return torch.rand(view.position.shape)",
        "repeats_itself",
        "keeps other entries of the same tokens",
    ),
    "not_frozen": ("def score(self, view): return view.position.float()", "is_frozen", "is no frozen dataclass"),
}
OVER = """
@dataclass(frozen=True, kw_only=True)
class Wrong(Policy):
    def plan(self, view):
        return Plan(keep=view.valid)
    def victim(self, view):
        return view.position.argmin(-1)
"""


def wrong_policy(folder: Path, name: str) -> Policy:
    from kvbench.contract.catalogue import policy_in_module

    frozen = "" if name == "not_frozen" else "@dataclass(frozen=True, kw_only=True)\n"
    text = OVER if name == "over" else f"{frozen}class Wrong(ScorePolicy):\n    {WRONG[name][0]}\n"
    (folder / "wrong.py").write_text(HEAD + text)
    sys.path.append(str(folder))
    return policy_in_module(folder / "wrong.py")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_policy_breaks_the_rule_that_is_meant_for_it(name: str, own_path: Path) -> None:
    _, rule_name, line = WRONG[name]
    (finding,) = findings(wrong_policy(own_path, name), [rule for rule in RULES if rule.name == rule_name])
    assert finding.outcome == "broken"
    assert line in finding.line
    assert "\n" not in finding.line


def test_a_plan_over_the_budget_is_told_with_what_was_allowed(own_path: Path) -> None:
    (finding,) = findings(wrong_policy(own_path, "over"), [rule for rule in RULES if rule.name == "holds_its_budget"])
    assert "keeps [[24, 24]] entries (rows x heads); allowed per row: 1 to [1]" in finding.line


def test_a_part_that_is_no_frozen_dataclass_of_its_own_is_told(own_path: Path) -> None:
    """Its settings would be no settings: a dataclass's base takes none of them."""
    from kvbench.cache import Allocation
    from kvbench.policies.h2o import H2O

    class Loose(Allocation):
        share: float = 0.5

    (finding,) = findings(H2O(allocation=Loose()), [rule for rule in RULES if rule.name == "is_frozen"])
    assert finding.line == "Loose is no frozen dataclass; write @dataclass(frozen=True)"


def test_a_yaml_of_ones_own_may_name_its_parts_by_hydras_defaults(
    own_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_path / "mine.py").write_text(OWN)
    for place, text in {
        "mine": "# Mine: parts of its own\ndefaults:\n  - allocation: first\n  - merge: newest\n_target_: mine.Mine\n",
        "allocation/first": "_target_: mine.FirstLayers\n",
        "merge/newest": "_target_: mine.IntoTheNewest\n",
    }.items():
        path = own_path / "conf" / "policy" / f"{place}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    few(monkeypatch)
    told = said(capsys, "check-policy", "mine", "--config-dir", "conf", "--contract-only")
    assert "mine: 2 rules hold, 0 broken" in told
    (found,) = json.loads(said(capsys, "policies", "FirstLayers", "--config-dir", "conf", "--json"))
    assert (found["allocation"], found["merge"]) == ("FirstLayers", "IntoTheNewest")
    (own_path / "conf" / "policy" / "wrong.yaml").write_text("_target_: mine.Mine\nallocation: first\n")
    told = said(capsys, "check-policy", "wrong", "--config-dir", "conf", "--contract-only", code=2)
    assert told == (
        "kvbench: policy.allocation is 'first'; it must be an Allocation: in a yaml a mapping with a _target_, on the "
        "command line +policy/allocation=NAME\n"
    )


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the contract be two rules."""
    from kvbench.contract import trial

    chosen = [rule for rule in RULES if rule.name in ("is_frozen", "leaves_its_view_alone")]
    monkeypatch.setattr(trial.findings, "__defaults__", (tuple(chosen),))


def test_check_policy_says_what_holds_and_ends_with_one_where_something_does_not(
    own_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    wrong_policy(own_path, "writes")
    told = said(capsys, "check-policy", "wrong.py", code=1)
    assert "holds      it is a frozen dataclass" in told
    assert "BROKEN     it changes nothing that it is shown" in told
    assert "wrong: 1 rules hold, 1 broken, 0 not asked of it" in told
    found: Any = json.loads(said(capsys, "check-policy", "tova", "--contract-only", "--json"))
    assert [rule["outcome"] for rule in found["rules"]] == ["holds", "holds"]
    for words, line in (
        (["tovaa"], "policy is 'tovaa'; did you mean 'tova'?"),
        (["nowhere.py"], "there is no such file or folder"),
        (["conf/mine.yaml"], "there is no such file or folder"),
    ):
        assert line in said(capsys, "check-policy", *words, code=2)


def test_a_policy_that_keeps_the_contract_passes_where_the_scenes_are_nothing_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvbench.contract import comparison
    from kvbench.policies.kvzip import KVzip

    def costs(policy: Policy, loaded: object) -> None:
        assert isinstance(policy, KVzip)
        raise ConfigError("KVzip has the prompt repeated as text,\nand it shows pictures")

    few(monkeypatch)
    monkeypatch.setattr(comparison, "small_model", lambda: None)
    monkeypatch.setattr(comparison, "costs", costs)
    told = said(capsys, "check-policy", "kvzip")
    assert "kvzip: 2 rules hold, 0 broken" in told
    assert "costs and standing are not measured: KVzip has the prompt repeated as text, and it shows pictures" in told


@pytest.mark.long
def test_a_policy_with_an_allocation_and_a_merge_of_its_own_written_from_the_pages_passes(tmp_path: Path) -> None:
    """By someone who has only the package: every rule, costs, and a place beside the others, by the command itself."""
    (tmp_path / "conf" / "policy").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "conf" / "policy" / "mine.yaml").write_text(OWN_YAML)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "kvbench"), "check-policy", "mine", "--config-dir", "conf", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert {rule["outcome"] for rule in told["rules"]} <= {"holds", "not asked"}
    assert sum(rule["outcome"] == "holds" for rule in told["rules"]) >= 19
    assert set(told["standing"]) == {"mine", "full", "h2o", "snapkv", "random"}
    assert told["costs"]["needs"] == ["MASS"]
    assert told["costs"]["statistics_bytes"] > 0


OWN_YAML = """\
# Mine: mass per value, first layers hold more, and what goes joins the newest survivor.
_target_: mine.Mine
num_recent: 4
allocation:
  _target_: mine.FirstLayers
merge:
  _target_: mine.IntoTheNewest
"""
OWN = '''\
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench import Allocation, Merge, Needs, Plan, Room, ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class FirstLayers(Allocation):
    """The first layer takes what the last one gives: nothing beyond what is protected is left there."""

    def layers(self, room: Room, told: Sequence[Tensor]) -> Sequence[int]:
        free = min(room.budget - room.protected, room.tokens - room.budget)
        return [room.budget + free, *[room.budget] * (room.num_layers - 2), room.budget - free]


@dataclass(frozen=True, kw_only=True)
class IntoTheNewest(Merge):
    """What goes joins the newest survivor that is not protected, if there is one."""

    def into(self, view: View, keep: Tensor, protected: Tensor) -> Plan:
        open_to_all = keep & ~protected
        newest = view.position.masked_fill(~open_to_all, -1).argmax(dim=-1, keepdim=True)
        own = view.position.argsort(dim=-1).argsort(dim=-1)
        own = own * 0 + own.new_tensor(range(own.shape[-1]))
        goes = view.valid & ~keep & open_to_all.any(dim=-1, keepdim=True)
        return Plan(keep=keep, merge_into=newest.expand_as(own).where(goes, own))


@dataclass(frozen=True, kw_only=True)
class Mine(ScorePolicy):
    """Attention received, over the size of the value."""

    needs: ClassVar[Needs] = Needs.MASS

    def score(self, view: View) -> Tensor:
        return view.mass / (1 + view.values.float().norm(dim=-1))
'''


FEW = ("dataset.num_samples=2", "batch_size=2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `kvbench calibrate q_filters` leaves for the bundled model."""
    path = tmp_path_factory.mktemp("written") / "q.safetensors"
    assert run(["calibrate", "q_filters", *FEW, "--out", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cell_of(*words: str) -> Cell:
    (composed,) = compose_grid(["policy=q_filters", "task=perplexity", *FEW, *words], multirun=False, config_dir=None)
    return build_cell(composed)


def refused(match: str, *words: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        cell_of(*words)
    assert "\n" not in str(caught.value)


def test_it_is_found_again_in_the_cache_folder_and_its_hash_is_in_the_key(
    written: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused("QFilters needs an artefact, and .* run `kvbench calibrate q_filters model=tiny-llava dataset=NAME`")
    assert run(["calibrate", "q_filters", *FEW]) == 0
    told = capsys.readouterr()
    (file,) = (path for path in cache.rglob("*.safetensors"))
    assert str(file) in told.out
    assert "2 prompts" in told.err
    assert file.read_bytes() == written.read_bytes()
    found = cell_of()
    assert isinstance(found.setting.policy, Calibrated)
    assert found.setting.policy.artefact == str(file)
    assert found.settings["policy"]["artefact"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_where_a_file_lies_is_in_no_key_and_what_is_in_it_is(written: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(written, moved)
    first, second = cell_of(f"policy.artefact={written}"), cell_of(f"policy.artefact={moved}")
    assert first.key == second.key
    stored = read_artefact(written)
    layers = [{"filter": stored.tensors[f"layers.{n}.filter"]} for n in range(len(stored.tensors))]
    moved.write_bytes(artefact_bytes(layers, {**stored.about, "num_prompts": 99}))
    assert cell_of(f"policy.artefact={moved}").key != first.key


def test_it_says_what_it_was_made_of_and_from(written: Path) -> None:
    about = read_artefact(written).about
    assert about["policy"] == "kvbench:QFilters"
    assert about["num_prompts"] == 2
    assert about["dataset_name"] == "scenes"
    assert {"model", "source", "dataset", "dtype"} <= about.keys()
    assert {"kvbench", "torch", "transformers"} <= about["versions"].keys()


def test_another_model_is_refused(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(BUNDLED_FOLDER, other)
    (other / "note.txt").write_text("another model")
    refused("is of the model .* and this one, other", f"model.checkpoint={other}", f"policy.artefact={written}")


def test_what_another_policy_or_its_older_source_learnt_is_refused(written: Path, tmp_path: Path) -> None:
    stored, path = read_artefact(written), tmp_path / "older.safetensors"
    layers = [{"filter": stored.tensors[f"layers.{n}.filter"]} for n in range(len(stored.tensors))]
    path.write_bytes(artefact_bytes(layers, {**stored.about, "source": "0123456789abcdef"}))
    refused("made by kvbench:QFilters of source 0123456789abcdef, and QFilters is now", f"policy.artefact={path}")
    path.write_bytes(artefact_bytes(layers, {**stored.about, "policy": "Mine"}))
    refused("made by Mine of source", f"policy.artefact={path}")


def test_a_missing_and_a_torn_file_are_refused_before_a_model_is_loaded(written: Path, tmp_path: Path) -> None:
    refused("is not there; run `kvbench calibrate q_filters", f"policy.artefact={tmp_path / 'none'}")
    torn = tmp_path / "torn"
    torn.write_bytes(written.read_bytes()[:-5])
    refused("not a whole file", f"policy.artefact={torn}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["h2o"], "policy=h2o reads no artefact"),
        (["q_filter"], "did you mean 'q_filters'"),
        (["model=tiny-llava"], "stands where the policy's name belongs"),
        (["q_filters", "scenes"], "cannot be read as KEY=VALUE"),
        ([], "POLICY"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_help_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["calibrate", "--help"])
    assert "safetensors" in capsys.readouterr().out
