"""Wrong command lines: each must end with exit code 2 and one line, before any model is loaded."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

import kvbench.config.build
import kvbench.sweep.cell
from kvbench.cli.main import run
from kvbench.config.build import build, build_cell, build_cells, check_shared, class_name, plugin_key
from kvbench.config.compose import Composed, compose_grid
from kvbench.datasets import files as file_dataset
from kvbench.errors import ConfigError
from kvbench.models.spec import BUNDLED_FOLDER
from tests.covering import one_in

SECRET = "canary-d41d8cd98f"
WRONG = {
    # values that are missing, wherever they stand, and groups that were taken out
    "worker=???": "worker is not given and has no default; add worker=...",
    "task.memory=???": "task.memory is not given and has no default; add task.memory=...",
    "sink.wandb=???": "sink.wandb is not given and has no default; add sink.wandb=...",
    "sink=[]": "sink was taken out of the settings, but nothing runs without it; leave it in",
    # names, with close matches
    "policy=h20": "policy is 'h20'; did you mean 'h2o'?",
    "model=tiny-lava": "model is 'tiny-lava'; did you mean 'tiny-llava'?",
    "dataset=scene": "dataset is 'scene'; did you mean 'scenes'?",
    "task=sped": "task is 'sped'; did you mean 'speed'?",
    "budget=token": "budget is 'token'; did you mean 'tokens'?",
    "sink=consol": "sink is 'consol'; did you mean 'console'?",
    "+experiment=quik": "experiment is 'quik'; did you mean 'quick'?",
    "+experiment=fast": "experiment is 'fast'; known: default, ",
    "budget=0.2": "budget=0.2 chooses no budget; did you mean 'budget.fraction=0.2'?",
    "budget=20%": "budget=20% chooses no budget; did you mean 'budget.fraction=0.2'?",
    "budget=64": "budget=64 chooses no budget; did you mean 'budget=tokens budget.tokens=64'?",
    "-m budget=0.1,0.2": "budget=0.1,0.2 chooses no budget; did you mean 'budget.fraction=0.1,0.2'?",
    "budget=-1": "budget=-1 chooses no budget; give a name",
    "model=llama": "model is 'llama'; did you mean 'llama-3.1-70b' or ",
    "autopsy=of": "autopsy is 'of'; did you mean 'off'?",
    "autopsy.num_samples=-1": "autopsy.num_samples is -1; it must be at least 0",
    "autopsy.num_sample=1": "autopsy.num_sample is no setting; did you mean 'autopsy.num_samples'",
    "worker.x=1": "worker.x is no setting; worker has worker.isolation, worker.timeout_s, ",
    "policy=h2o +policy.skip_layers=[0,3]": "policy.skip_layers is [0, 3], but the model has 3 layers; give",
    "policy=h2o +policy.skip_layers=[0,1,2]": "policy.skip_layers is [0, 1, 2], but the model has 3 layers",
    "policy=full +policy/allocation=ada": "policy.allocation is no setting of Full; known: none",
    "polcy=h2o": "polcy is no setting; did you mean 'policy'",
    # keys
    "bugdet.fraction=0.2": "bugdet.fraction is no setting; did you mean 'budget.fraction'",
    "policy=streaming_llm policy.num_sink=3": "policy.num_sink is no setting; did you mean 'policy.num_sinks'",
    "+policy.num_sink=3 policy=streaming_llm": "policy.num_sink is no setting of StreamingLLM; did you mean",
    "policy.num_sink=3": "policy.num_sink is no setting of policy=full, which has none; did you mean "
    "'policy.num_sinks' of policy=",
    "-m policy=h2o,snapkv policy.num_sink=3": "of policy=h2o,snapkv, which has policy.kernel_tokens, "
    "policy.num_recent, policy.pooling, policy.recent_fraction; did you mean 'policy.num_sinks' of policy=",
    "+experiment=quick policy.recent=3": "policy.recent is no setting; did you mean 'policy.recent_fraction'",
    "policy=h2o policy.zzz=3": "policy.zzz is no setting of policy=h2o, which has policy.recent_fraction",
    "hydra.nothing=3": "hydra.nothing is no setting; kvbench --help lists settings",
    "task.sped.new_tokens=4": "task.sped.new_tokens is no setting; did you mean 'task.speed.new_tokens'",
    "experiment=quick": "write +experiment=NAME",
    # budgets
    "policy=h2o budget.fraction=0": "budget.fraction is 0; it must lie in (0, 1]",
    "policy=h2o budget.fraction=-0.5": "budget.fraction is -0.5",
    "policy=h2o budget.fraction=1.5": "budget.fraction is 1.5",
    "policy=h2o budget.fraction=nan": "budget.fraction is nan",
    "policy=h2o budget.tokens=5": "exactly one must be given",
    "policy=h2o budget.fraction=null": "exactly one must be given",
    "policy=h2o budget=tokens budget.tokens=0": "budget.tokens is 0; it must be at least 1",
    "policy=streaming_llm budget=tokens budget.tokens=3": "StreamingLLM protects 4 tokens",
    "policy=h2o budget.of=prompts": "budget.of is 'prompts'; it must be one of 'seen', 'prompt'",
    # types
    "budget.fraction=abc": "budget.fraction is 'abc'; it must be a number or null",
    "budget=tokens budget.tokens=1.5": "budget.tokens is 1.5; it must be a whole number or null",
    "batch_size=two": "batch_size is 'two'; it must be a whole number of at least 1",
    "batch_size=0": "batch_size is 0; it must be a whole number of at least 1",
    "batch_size=true": "batch_size is True",
    "seed=1.5": "seed is 1.5; it must be a whole number",
    "seed=99999999999999999999": "must fit into 64 bits",
    "force=maybe": "force is 'maybe'; it must be true or false",
    "model.trust_remote_code=1": "model.trust_remote_code is 1; it must be true or false",
    "policy=h2o policy.recent_fraction=2": "policy.recent_fraction is 2; it must lie in [0, 1]",
    "policy=streaming_llm policy.num_sinks=-1": "policy.num_sinks is -1",
    "task.speed.new_tokens=many": "task.speed.new_tokens is 'many'; it must be a whole number",
    # choices
    "positions=orignal": "positions is 'orignal'; did you mean 'original'?",
    "device=gpu": "device is 'gpu'; it must be auto, cpu, cuda or cuda:N",
    "device=cuda:99": "device is 'cuda:99', but torch sees",
    "model.devices=[0,99]": "model.devices is [0, 99], but torch sees",
    "model.devices=[1,0,1]": "model.devices is [1, 0, 1], which names GPU 1 more than once; it must be null",
    "model.devices=two": "model.devices is 'two'; it must be one of 'auto' or a list",
    "model.devices=auto device=cpu": "device is 'cpu', but model.devices says which GPUs the model is spread over",
    "dataset.num_samples=0": "dataset.num_samples is 0; it must lie in 1 to 100000",
    "dataset.num_samples=9999999999999999": "dataset.num_samples is 9999999999999999; it must lie in 1 to 100000",
    "dataset.first=-1": "dataset.first is -1; it must be at least 0",
    "dataset.split=tst": "dataset.split is 'tst'; did you mean 'test'?",
    "dataset.ask=questions": "dataset.ask is 'questions'; it must be one of 'describe', 'follow_up'",
    "model.dtype=float8": "model.dtype is 'float8'; did you mean",
    "model.checkpoint=/no/such/folder": "model.checkpoint is '/no/such/folder'; it must be 'bundled', a folder",
    "model.checkpoint=llava-hf/llava-1.5-7b-hf": "model.revision is None; a hub checkpoint must be pinned",
    "sink.wandb.mode=onlin": "is 'onlin'; did you mean 'online'",
    "task.speed.num_blocks=0": "task.speed.num_blocks is 0; it must be at least 1",
    "task.generation.max_new_tokens=0": "task.generation.max_new_tokens is 0",
    "budget.fraction=inf": "budget.fraction is inf; it must be a number or null and finite",
    "budget=tokens budget.tokens=-3": "budget.tokens is -3; it must be at least 1",
    "budget=tokens budget.fraction=0.2": "exactly one must be given",
    "policy=h2o policy.recent_fraction=nan": "policy.recent_fraction is nan; it must be a number and finite",
    "batch_size=inf": "batch_size is inf; it must be a whole number",
    "sink=[1]": "sink=[1] chooses no sink; give a name",
    "task={a:1}": "task={a:1} chooses no task; give a name",
    "task.memory=abc": "task.memory is 'abc'; it must be a group of settings",
    "batch_size=null": "batch_size is None",
    "sweep=null": "sweep is 'None'; it must be a name",
    "sweep=\"'  '\"": "sweep is '  '; it must be a name",
    "results=null": "results is None; it must be the path of a folder",
    "results=\"'~nobody-here/x'\"": "results is '~nobody-here/x', which is no path",
    f"results={'x' * 5000}": "which is no path",
    "sweep=${nothing.here}": "Interpolation key 'nothing.here' not found",
    "sink.wandb.timeout_s=0": "sink.wandb.timeout_s is 0; it must lie in (0, 30]",
    "sink.wandb.timeout_s=nan": "sink.wandb.timeout_s is nan; it must be a number and finite",
    "sink.wandb.timeout_s=1000": "it must lie in (0, 30]",
    "sink.wandb.mode=online": "no API key was found; run `wandb login`, set WANDB_API_KEY",
    "sink.wandb.project=null": "sink.wandb.project is None; it must be text",
    "model.revision=main": "is a folder, which has no revisions; leave model.revision out",
    # secrets
    "task.generation.max_new_token=5": "is no setting; did you mean 'task.generation.max_new_tokens'",
    "+sink.wandb.api_key=0123456789": "sink.wandb.api_key is given on the command line, where others can read it",
    "hydra.job.env_set.HF_TOKEN=0123456789": "hydra.job.env_set.HF_TOKEN is given on the command line",
    "sweep=${oc.env:MY_PASSWORD}": "sweep holds the secret of MY_PASSWORD",
    "sink.wandb.project=my-${oc.env:MY_PASSWORD}-x": "sink.wandb.project holds the secret of MY_PASSWORD",
    # random weights
    "weights=randm": "weights is 'randm'; did you mean 'random'?",
    "workload=7b": "workload is '7b'; ",
    "model.weights=randm": "model.weights is 'randm'; it must be one of 'checkpoint', 'random'",
    "weights=random": "task perplexity, generation, fidelity scores text, but random weights say nothing",
    "dataset=synthetic": "prompts of random tokens have no answers; use task=speed or task=memory",
    "model.weights=random task=speed": "the data set has text; use dataset=synthetic",
    "model=llava-1.5-7b": "model.revision is None; a hub checkpoint must be pinned",
    "model=llava-1.5-7b weights=random task=speed dataset.prompt_tokens=577": "give at least 578",
    "model=qwen2.5-7b weights=random task=speed dataset.num_images=1": "use dataset.num_images=0",
    "model=qwen2.5-7b weights=random task=speed dataset.num_images=2": "num_images is 2; it must lie in 0 to 1",
    "model=qwen2.5-7b weights=random task=speed model.config.hidden_sizes=3": "model.config.hidden_sizes is no setting",
    "model=qwen2.5-7b weights=random task=speed model.config=3": "model.config",
    "model=qwen2.5-7b weights=random task=speed model.config.model_type=gpt2": "model_type is 'gpt2'; supported",
    "task=capacity task.capacity.max_batch_size=0": "max_batch_size is 0; it must be at least 1",
    "policy=snapkv policy.kernel_tokens=4": "policy.kernel_tokens is 4; it must be odd",
    # what is missing
    "model=local": "model.checkpoint is not given",
    "dataset=conversation": "dataset.path is not given",
    "dataset=conversation dataset.path=nowhere.json": "dataset.path nowhere.json cannot be read",
    "policy=null": "policy=null chooses no policy",
    "~dataset": "~dataset chooses no dataset",
    "sink.wandb=null": "sink.wandb is null",
    "task=speed ~task.speed": "no task is left",
    # classes
    "policy._target_=nowhere.Nothing": "policy._target_ is nowhere.Nothing, but no module nowhere is found (your own: ",
    "policy._target_=kvbench.policies.h2o.H2": "but kvbench.policies.h2o has no H2; did you mean 'H2O'?",
    "policy._target_=''": "policy._target_ is ''; it must name a class",
    "policy._target_=3": "policy._target_ is 3; it must name a class",
    "policy._target_=pathlib.Path": "policy._target_ is pathlib.Path; the class must derive from Policy",
    "dataset._target_=pathlib.Path": "dataset._target_ is pathlib.Path; the class must have",
    # syntax
    "policy": "policy cannot be read as KEY=VALUE; give a name, policy=NAME: adakv, ",
    "repot": "repot is no command and cannot be read as KEY=VALUE; did you mean 'report'?",
    "help repot": "repot is no command and cannot be read as KEY=VALUE; did you mean 'report'?",
    "policy=h2o report": "report is a command, which comes first: kvbench report ...",
    "-m h2o": "h2o is no command and cannot be read as KEY=VALUE; did you mean 'policy=h2o'?",
    "quick": "did you mean 'task=quick' or '+experiment=quick'?",
    "zzzzz": "zzzzz is no command and cannot be read as KEY=VALUE; commands: audit, ",
    "--polcy h2o": "--polcy is no flag; did you mean 'policy=h2o'?",
    "--policy=h2o": "--policy=h2o is no flag; did you mean 'policy=h2o'?",
    "--budget.fraction 0.2 -m": "--budget.fraction is no flag; did you mean 'budget.fraction=0.2'?",
    "--experiment seed=3": "--experiment is no flag; did you mean '+experiment=VALUE'?",
    "--mutlirun policy=h2o": "--mutlirun is no flag; did you mean '--multirun'?",
    "-x": "-x is no flag; kvbench --help lists flags and settings",
    "budget.fraction=[": "budget.fraction=[ cannot be read as KEY=VALUE",
    "=h2o": "Could not override ''",
    "policy=full,h2o": "add --multirun",
    "--confg=job": "--confg=job is no flag",
    "--config-dir": "--config-dir",
    "--config-dir nowhere": "is no folder",
    "report --sweeps x": "--sweeps",
    "report nowhere": "the results folder nowhere does not exist",
    "--cfg job policy=h20": "policy is 'h20'; did you mean 'h2o'?",
    "--cfg job bugdet.fraction=0.2": "bugdet.fraction is no setting; did you mean 'budget.fraction'",
    "-c job --config-dir nowhere": "is no folder",
    "--cfg job policy=h2o budget.fraction=[": "cannot be read as KEY=VALUE",
    # one wrong cell in a sweep
    "-m policy=full,h20": "policy is 'h20'; did you mean 'h2o'?",
    "-m policy=h2o budget.fraction=0.2,0.5,7": "budget.fraction is 7; it must lie in (0, 1]",
    "-m policy=full,streaming_llm budget=tokens budget.tokens=8,3": "StreamingLLM protects 4 tokens",
    "+experiment=quick batch_size=0": "batch_size is 0",
}


def never(*arguments: Any) -> None:
    raise AssertionError("no model may be loaded for a wrong command line")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvbench.sweep.group.load_model", never)
    monkeypatch.setenv("MY_PASSWORD", SECRET)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("line", one_in(5, WRONG))
def test_a_wrong_command_line_is_told_in_one_line(
    line: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(shlex.split(line)) == 2
    logged = [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert not logged, "nothing is logged, which would be more lines"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("kvbench: ")
    assert WRONG[line] in printed.err
    assert SECRET not in printed.err
    assert "0123456789" not in printed.err
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def key(*overrides: str) -> str:
    (composed,) = compose_grid(list(overrides), multirun=False, config_dir=None)
    return build_cell(composed).key


@cache
def key_of_h2o(device: str) -> str:
    return key("policy=h2o")


@pytest.mark.parametrize(
    "override",
    one_in(
        2,
        [
            "model.dtype=bfloat16",
            "model.prompt=llava_v1",
            "dataset.num_samples=5",
            "dataset.first=1",
            "dataset.split=train",
            "dataset.ask=follow_up",
            "policy=random",
            "policy=elastic",
            "policy.recent_fraction=0.4",
            "budget.fraction=0.3",
            "budget=prompt",
            "positions=in_cache",
            "task=perplexity",
            "task.generation.max_new_tokens=8",
            "task.speed.num_blocks=1",
            "batch_size=3",
            "seed=1",
        ],
    ),
)
def test_what_changes_the_answer_changes_the_key(override: str) -> None:
    assert key("policy=h2o", override) != key_of_h2o("as found")


def test_numbers_that_go_beyond_the_context_are_not_taken_where_that_is_refused() -> None:
    assert key("policy=h2o", "beyond_context=allow") != key_of_h2o("as found")
    assert key("policy=h2o", "beyond_context=refuse") == key_of_h2o("as found"), "as it was before it counted"


@pytest.mark.cover("one")
@pytest.mark.parametrize(
    "overrides",
    [
        ["results=elsewhere"],
        ["sweep=named"],
        ["force=true"],
        ["sink=console"],
        ["sink.wandb.project=mine"],
        ["device=cpu"],
        ["positions=original"],
        ["hydra.mode=RUN"],
        [f"model.checkpoint={BUNDLED_FOLDER}"],
    ],
)
def test_what_does_not_change_the_answer_leaves_the_key(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvbench.sweep.cell, "resolve_device", lambda asked: "cpu")
    assert key("policy=h2o", *overrides) == key_of_h2o("cpu")


ELSEWHERE = """
from kvbench.cache import Budget
from kvbench.datasets.scenes import Scenes
from kvbench.policies.h2o import H2O
from kvbench.tasks.memory import Memory
from kvbench.tasks.perplexity import Perplexity
"""


def test_a_class_that_is_found_at_another_place_leaves_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that a module can be moved: no path of a module is in a key, of whatever plug-in."""
    (tmp_path / "found_elsewhere.py").write_text(ELSEWHERE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    moved = {"policy": "H2O", "dataset": "Scenes", "budget": "Budget", "task.memory": "Memory"}
    moved["task.perplexity"] = "Perplexity"
    (composed,) = compose_grid(["policy=h2o"], multirun=False, config_dir=None)
    (again,) = compose_grid(
        ["policy=h2o", *(f"{part}._target_=found_elsewhere.{name}" for part, name in moved.items())],
        multirun=False,
        config_dir=None,
    )
    assert build_cell(again).key == build_cell(composed).key
    settings = json.dumps(build_cell(composed).settings)
    assert "_target_" not in settings
    assert "kvbench." not in settings
    assert settings.count("kvbench:") == 3 + 5, "policy, data set, budget and five tasks"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("kvbench.policies.h2o", "H2O"),
        ("kvbench.datasets.scenes", "Scenes"),
        ("kvbench.tasks.memory", "Memory"),
        ("kvbench.cache", "Budget"),
    ],
)
def test_a_class_of_ones_own_is_not_the_one_of_that_name_and_its_code_is_in_the_key(
    place: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"fraction": 0.2} if name == "Budget" else {}
    keys = []
    for number in range(3):
        module = f"own_{name.lower()}_{number}"
        code = f"from {place} import {name} as Base\n\n\nclass {name}(Base):\n    number = {number}\n"
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        node = OmegaConf.create({"_target_": f"{module if number else place}.{name}", **settings})
        keys.append(plugin_key(build(node, "part"), node))
    assert [key["class"] for key in keys] == [f"kvbench:{name}", name, name]
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == 3


def test_a_setting_that_would_hide_in_the_key_what_the_class_is_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Own:\n    source: str = ''\n"
    (tmp_path / "own_source.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    node = OmegaConf.create({"_target_": "own_source.Own"})
    with pytest.raises(ConfigError, match="Own has a setting 'source', which a key says of the class; rename it"):
        plugin_key(build(node, "part"), node)


def test_the_registered_names_stay_as_they_are_in_the_keys_of_records() -> None:
    """A class may move; one that is renamed orphans the records of its name, so rename with a reason, and here."""
    names = {
        "policy": "Cake CapKV ChunkKV CriticalKV CurDKV DuoAttention Elastic ElasticReleased ExpectedAttention "
        "FastKVzip FastV KVzap KVzipPlus VaSE "
        "Finch Full H2O H2OElasticRelease H2OMean H2OReleased KVzip KeyDiff KeyNorm Keyformer "
        "LagKV LocalElasticRelease LookM NACL Oracle PostVision PrefixKV QFilters RKV Random "
        "Scissorhands SimLayerKV SnapKV SnapKVDecode StreamingLLM StreamingLLMReleased TOVA "
        "TriAttention VATP",
        "dataset": "Conversation LlavaBench LongBench MMVet MTBench Needles Problems Recall Retrieval Scenes "
        "Summaries Synthetic TextWindows",
        "task": "Capacity Fidelity Generation Memory MultiTurn Perplexity PerplexityReleased Speed",
        "budget": "Budget",
    }
    conf = Path(kvbench.config.build.__file__).parents[2] / "conf"
    for group, expected in names.items():
        text = "".join(path.read_text(encoding="utf-8") for path in (conf / group).glob("*.yaml"))
        targets = set(re.findall(r"^_target_: (\S+)", text, re.MULTILINE))
        assert {class_name(get_class(target)) for target in targets} == {f"kvbench:{name}" for name in expected.split()}
        assert len(targets) == len(expected.split()), "and no two classes share one"


def test_the_semantics_of_the_cache_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key("policy=h2o"), key("policy=full")
    monkeypatch.setattr(kvbench.config.build, "CACHE_SEMANTICS", 999)
    assert not {key("policy=h2o"), key("policy=full")} & set(before)


def test_how_later_prompts_are_divided_is_in_the_key_of_those_that_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["task=conversation", "task=quality", "task=quality query_visible=false"]
    divided = ["adakv", "key_norm policy.skip_layers=[0]"]
    names = [f"policy={policy} {words}" for policy in (*divided, "key_norm") for words in asked]
    before = {name: key(*name.split()) for name in names}
    monkeypatch.setattr(kvbench.config.build, "_LATER_PROMPTS", 999)
    moved = {name for name in names if key(*name.split()) != before[name]}
    assert moved == {f"policy={policy} {words}" for policy in divided for words in (asked[0], asked[2])}


def test_the_number_of_a_gpu_leaves_the_key_and_its_kind_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []
    for device in ("cuda:0", "cuda:1", "cpu"):
        monkeypatch.setattr(kvbench.sweep.cell, "resolve_device", lambda asked, device=device: device)
        keys.append(key())
    assert keys[0] == keys[1] != keys[2]


def test_a_model_over_several_gpus_is_eager_and_a_cell_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = ["workload=8b_b1_1k", "device=cuda", "model.devices=null,auto"]
    one, wide = map(build_cell, compose_grid(words, multirun=True, config_dir=None))
    assert (one.spread_over, one.device, one.setting.engine) == ((), "cuda:0", "graph")
    assert (wide.spread_over, wide.device, wide.setting.engine) == ((0, 1), "cuda:0", "eager")
    assert wide.key != one.key
    assert wide.labels["model"] == f"{one.labels['model']} over 2 GPUs"


def test_the_full_cache_has_one_key_for_every_budget() -> None:
    assert key("policy=full", "budget.fraction=0.1") == key("policy=full", "budget=tokens")


def test_autopsies_are_on_and_change_no_key() -> None:
    (composed,) = compose_grid([], multirun=False, config_dir=None)
    assert build_cell(composed).autopsy.num_samples == 2
    (without,) = compose_grid(["autopsy=off"], multirun=False, config_dir=None)
    assert build_cell(without).autopsy.num_samples == 0
    assert key() == key("autopsy=off") == key("autopsy.num_samples=7")


def test_a_sweep_reads_fingerprints_and_checks_its_data_set_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def count(where: Any, name: str) -> None:
        real = getattr(where, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(where, name, counted)

    for where, name in (
        (file_dataset, "read_rows"),
        (file_dataset, "picture_digest"),
        (kvbench.config.build, "check_fit"),
    ):
        count(where, name)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps([{"question": "What is it?", "answer": f"{name}."}]))
    paths = ",".join(str(tmp_path / f"{name}.json") for name in "ab")
    words = ["policy=h2o,random,full", "budget.fraction=0.1,0.2,0.3", "dataset=conversation", f"dataset.path={paths}"]
    grid = compose_grid(words, multirun=True, config_dir=None)
    cells = build_cells(grid)
    assert len(cells) == 18
    assert sorted(done) == sorted(2 * ["read_rows", "picture_digest", "check_fit"]), "each file once"
    assert [cell.key for cell in cells] == [build_cell(composed).key for composed in grid]
    assert len({id(cell.dataset) for cell in cells}) == 2
    (tmp_path / "a.json").write_text(json.dumps([{"question": "What is it?", "answer": "Changed."}]))
    assert build_cells(grid)[0].key != cells[0].key, "the next sweep reads the files again"


def test_every_configuration_of_a_sweep_is_resolved_once_and_each_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: list[Composed] = []
    real = Composed.resolved

    def counted(self: Composed) -> dict[str, Any]:
        resolved.append(self)
        return real(self)

    monkeypatch.setattr(Composed, "resolved", counted)
    grid = compose_grid(["policy=h2o,random", "budget.fraction=0.1,0.2"], multirun=True, config_dir=None)
    check_shared(grid)
    assert len(resolved) == 4
    monkeypatch.setenv("MY_API_KEY", SECRET)
    grid[3].config.dataset.path = SECRET
    with pytest.raises(ConfigError, match=r"dataset\.path holds the secret of MY_API_KEY"):
        check_shared(grid)


def test_a_conversation_keeps_its_key_when_its_file_moves(tmp_path: Path) -> None:
    keys = []
    for name, answer in (("a", "A dot."), ("b", "A dot."), ("c", "Two dots.")):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([{"question": "What is it?", "answer": answer}]))
        keys.append(key("dataset=conversation", f"dataset.path={path}"))
    assert keys[0] == keys[1] != keys[2]


def test_labels_say_what_was_chosen() -> None:
    (composed,) = compose_grid(["policy=streaming_llm", "budget=tokens"], multirun=False, config_dir=None)
    assert build_cell(composed).labels == {
        "model": "tiny-llava",
        "dataset": "scenes",
        "policy": "streaming_llm",
        "budget": "64 tokens",
        "budget_fraction": None,
        "budget_tokens": 64,
        "positions": "in_cache",
        "evicts_at": "prompt and decode",
        "budget_rounds": "down",
    }


def test_a_local_checkpoint_is_labelled_by_its_model(tmp_path: Path) -> None:
    copied = tmp_path / "my-model"
    shutil.copytree(BUNDLED_FOLDER, copied)
    (composed,) = compose_grid(["model=local", f"model.checkpoint={copied}"], multirun=False, config_dir=None)
    assert build_cell(composed).labels["model"] == "my-model"
