"""Settings that are wrong beside files, packages or each other: one line, no model loaded, nothing written."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from kvbench.cli.main import run
from kvbench.config import build as config
from kvbench.config.build import build_cell, build_sinks, check_shared, is_forced
from kvbench.config.compose import compose_grid
from kvbench.errors import ConfigError, KvbenchError
from tests.config.test_config import WRONG
from tests.covering import one_in

LLAMA = {"model_type": "llama", "hidden_size": 32}
GRID = {"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
CODE = {"model_type": "my_family", "auto_map": {"AutoConfig": "code.MyConfig"}}


def never(*arguments: Any) -> None:
    raise AssertionError("no model may be loaded for a wrong command line")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("NETRC", "no-netrc")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("kvbench.sweep.group.load_model", never)


def folder_of(config: Any, *files: str, name: str = "model") -> None:
    """Make a checkpoint's folder; its weights are never read here."""
    folder = Path(name)
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for file in files:
        (folder / file).write_bytes(b"\x02" + bytes(7) + b"{}")  # a whole safetensors file without a tensor


def text_data() -> None:
    Path("data.json").write_text(json.dumps([{"question": "Why?", "answer": "So."}]))


def refused(line: str, capfd: pytest.CaptureFixture[str]) -> str:
    """Return the one line; the folder must be as it was."""
    before = {path: path.stat().st_mtime_ns for path in Path().glob("**/*")}
    assert run(line.split()) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert {path: path.stat().st_mtime_ns for path in Path().glob("**/*")} == before
    return printed.err


MODELS: dict[str, tuple[Any, tuple[str, ...], str, str]] = {
    "a text model and pictures": (
        LLAMA,
        ("model.safetensors",),
        "",
        "the data set shows pictures, but model.checkpoint",
    ),
    "unknown family": ({"model_type": "lama"}, ("model.safetensors",), "", "of family 'lama'; did you mean 'llama'"),
    "no family": ({}, ("model.safetensors",), "", "is of family 'None'; known: llama"),
    "not an object": ("[]", ("model.safetensors",), "", "config.json holds a list; it must be the JSON object"),
    "broken config": ("{", ("model.safetensors",), "", "config.json is not JSON"),
    "only pickle": (LLAMA, ("pytorch_model.bin",), "", "has no .safetensors file; kvbench reads no pickle"),
    "own code": (CODE, ("model.safetensors",), "", "needs Python code of its own, which is not run unasked"),
    "own code elsewhere": (
        {**CODE, "auto_map": {"AutoConfig": "someone/repo--code.MyConfig"}},
        ("model.safetensors",),
        "model.trust_remote_code=true",
        "takes code from another repository (someone/repo--code.MyConfig)",
    ),
    "positions on a grid": (
        GRID,
        ("model.safetensors",),
        "dataset=conversation dataset.path=data.json positions=in_cache",
        "rotary positions of kind several axes (M-RoPE), which have no rank in the cache; use positions=original",
    ),
    "native positions on a grid": (
        GRID,
        ("model.safetensors",),
        "dataset=conversation dataset.path=data.json policy=streaming_llm",
        "positions is 'in_cache', but",
    ),
    "moving rotation": (
        {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("model.safetensors",),
        "dataset=conversation dataset.path=data.json positions=in_cache",
        "rotary positions of kind dynamic",
    ),
}


@pytest.mark.parametrize("case", one_in(3, MODELS))
def test_a_model_that_cannot_do_it_is_refused_before_it_is_loaded(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    config, files, words, message = MODELS[case]
    folder_of(config, *files)
    text_data()
    line = f"model=local model.checkpoint=model {words}"
    assert message in refused(line, capfd)


@pytest.mark.parametrize("positions", ["original", "native"])
def test_the_same_models_pass_where_they_can_do_it(positions: str) -> None:
    folder_of(GRID, "model.safetensors")
    text_data()
    words = ["model=local", "model.checkpoint=model", "dataset=conversation", "dataset.path=data.json"]
    (composed,) = compose_grid([*words, "policy=h2o", f"positions={positions}"], multirun=False, config_dir=None)
    assert build_cell(composed).model.checkpoint == "model"


@pytest.mark.parametrize(("kind", "allowed"), [("dynamic", False), ("longrope", False), ("linear", True)])
def test_a_moving_rotation_is_not_captured(kind: str, allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of({**LLAMA, "rope_scaling": {"type": kind, "factor": 2.0}}, "model.safetensors")
    text_data()
    words = ["model=local", "model.checkpoint=model", "dataset=conversation", "dataset.path=data.json"]
    (composed,) = compose_grid([*words, "policy=h2o", "positions=original"], multirun=False, config_dir=None)
    assert build_cell(composed).setting.engine == "eager"
    monkeypatch.setattr(config, "resolve_engine", lambda asked, device, *, is_spread: "graph")
    with nullcontext() if allowed else pytest.raises(ConfigError, match=rf"kind {kind}.* use engine=eager"):
        assert build_cell(composed).setting.engine == "graph"


def test_code_of_a_hub_checkpoint_needs_a_pinned_revision(capfd: pytest.CaptureFixture[str]) -> None:
    line = "model=local model.checkpoint=someone/model model.trust_remote_code=true"
    assert "a hub checkpoint must be pinned to a commit of 40 hex digits" in refused(line, capfd)
    assert "must be pinned" in refused(f"{line} +model.revision=main".replace("+model", "model"), capfd)


FILES = {
    "dataset=conversation dataset.path=data.json": ("{", "is not JSON in UTF-8"),
    "dataset=conversation dataset.path=data.json dataset.num_samples=0": ("[]", "dataset.num_samples is 0"),
    "dataset=conversation dataset.path=data.json dataset.num_samples=1": ("[]", "holds no item"),
    "dataset=conversation dataset.path=data.json dataset.num_samples=2": ("{}", "holds a dict; it must be a list"),
    "dataset=conversation dataset.path=data.json dataset.num_samples=3": ("[1]", "item 0 is '1'; it must be an object"),
    "dataset=conversation dataset.path=.": ("", "cannot be read (it is a folder); give a file"),
    "dataset=conversation dataset.path=data.json dataset.images=nowhere": (
        '[{"question": "a", "answer": "b", "image": "x.png"}]',
        "dataset.images nowhere cannot be read (there is no such file or folder",
    ),
    "results=data.json": ("x", "results is 'data.json', but data.json is not a folder"),
    "results=data.json/below/it": ("x", "is not a folder; choose a folder that can be written to"),
    "--config-dir data.json policy=h2o": ("x", "is no folder"),
}


@pytest.mark.parametrize("line", one_in(2, FILES))
def test_a_wrong_file_is_told_in_one_line(line: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = FILES[line]
    Path("data.json").write_text(content)
    assert message in refused(line, capfd)


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[str]:
    point = tmp_path / "disk"
    point.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(point)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield str(point)
    subprocess.run(["umount", "--lazy", str(point)], check=True)


def test_a_results_folder_on_a_read_only_disk_is_refused(read_only: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert "cannot be written to; choose a folder" in refused(f"results={read_only}/results", capfd)


def test_a_package_that_a_plug_in_lacks_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python's own file beside the plug-in
    Path("conf/policy").mkdir(parents=True)
    Path("conf/policy/mine.yaml").write_text("_target_: gate_policy.Mine\n")
    Path("gate_policy.py").write_text("import no_such_package.part\n")
    message = refused("--config-dir conf policy=mine", capfd)
    assert message.endswith(
        "policy needs the package 'no_such_package', which is not installed; python -m pip install no_such_package\n"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def score(:", "importing it raises SyntaxError: invalid syntax (broken_policy.py, line 1)"),
        ("raise ValueError('no')", "importing it raises ValueError: no"),
        ("class Other:\n    pass", "broken_policy has no Mine; known: Other"),
    ],
)
def test_a_module_that_can_not_be_imported_is_told_with_what_it_raises(
    text: str, told: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("conf/policy").mkdir(parents=True)
    Path("conf/policy/mine.yaml").write_text("_target_: broken_policy.Mine\n")
    Path("broken_policy.py").write_text(text + "\n")
    try:
        assert f"policy._target_ is broken_policy.Mine, but {told}" in refused("--config-dir conf policy=mine", capfd)
    finally:
        sys.modules.pop("broken_policy", None)


def test_a_policy_of_ones_own_folder_that_was_not_given_is_found(capfd: pytest.CaptureFixture[str]) -> None:
    Path("conf/policy").mkdir(parents=True)
    Path("conf/policy/mysnap.yaml").write_text("_target_: mysnap.Mysnap\n")
    told = "conf/policy/mysnap.yaml is there: add --config-dir conf\n"
    assert refused("policy=mysnap", capfd).endswith(told)
    assert refused("check-policy mysnap", capfd).endswith(told)


def test_wandb_that_is_asked_for_and_not_installed_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kvbench.sinks.wandb.run.importlib.util.find_spec", lambda name: None)
    assert "wandb is not installed; python -m pip install wandb" in refused("sink.wandb.mode=online", capfd)


def test_there_are_at_least_sixty_wrong_configurations() -> None:
    assert len(WRONG) + len(MODELS) + len(FILES) >= 100


_VALUES = ("0", "-1", "1", "0.5", "1e309", "nan", "null", "true", "abc", "''", "[]", "[1]", "{}", "{a: 1}", "${x}",
           "é", "9" * 25, "../..", "/", "~x", "h2o", "1,2", "${oc.env:HOME}", "???", "'a b'", "\\", "x=y",
           "$(id)")  # fmt: skip
_KEYS = ("policy", "budget", "model", "dataset", "task", "sink", "budget.fraction", "budget.tokens", "budget.of",
         "seed", "batch_size", "positions", "device", "force", "sweep", "model.checkpoint", "model.dtype",
         "dataset.num_samples",
         "task.speed.num_blocks", "sink.wandb.mode", "sink.wandb.timeout_s", "policy.num_sinks", "+new", "+policy.x",
         "~sink", "~policy", "policy._target_", "sink.wandb._target_", "dataset.split", "task.memory")  # fmt: skip


def fuzz(num_lines: int, seed: int) -> int:
    """Compose and build `num_lines` random command lines; every refusal must be one line of ours."""
    rng, refusals = random.Random(seed), []
    for _ in range(num_lines):
        words = [f"{rng.choice(_KEYS)}={rng.choice(_VALUES)}" for _ in range(rng.randint(1, 3))]
        try:
            grid = compose_grid(words, multirun=rng.random() < 0.3, config_dir=None)
            check_shared(grid)
            for composed in grid:
                build_cell(composed)
            build_sinks(grid[0].config)
            is_forced(grid[0].config)
        except KvbenchError as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(f"{words}: {type(error).__name__}: {error}") from error
    assert [message for message in refusals if "\n" in message or not message] == []
    return len(refusals)


def test_random_command_lines_pass_or_are_refused_in_one_line() -> None:
    assert fuzz(10, seed=1) > 2


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_many_random_command_lines_pass_or_are_refused_in_one_line() -> None:
    assert fuzz(1000, seed=2) > 400
