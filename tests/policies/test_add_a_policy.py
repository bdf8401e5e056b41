"""The README's example of a policy is run as it is printed there, by someone who has only the package."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbench.cache import Budget, PolicyCache
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.contract.driving import drive
from tests.tiny_models import random_tokens, tiny_model

REPO = Path(__file__).parents[2]
MAX_LINES = 15
WORDS = (
    "--config-dir",
    "conf",
    "policy=mine",
    "dataset.num_samples=1",
    "task=perplexity",
    "sink=console",
    "results=out",
)


def block(name: str) -> str:
    """Return the fenced block that follows the marker `<!-- name -->` in README.md."""
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {re.escape(name)} -->\s*```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert found is not None, f"README.md has no block after <!-- {name} -->"
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("mine")
    (place / "conf" / "policy").mkdir(parents=True)
    (place / "mine.py").write_text(block("mine.py"))
    (place / "conf" / "policy" / "mine.yaml").write_text(block("mine.yaml"))
    yield place
    sys.modules.pop("mine", None)  # others write modules of that name


def test_the_class_is_short() -> None:
    (name,) = [node for node in ast.parse(block("mine.py")).body if isinstance(node, ast.ClassDef)]
    assert name.end_lineno is not None
    assert name.end_lineno - name.lineno + 1 + len(name.decorator_list) <= MAX_LINES
    assert len(block("mine.py").splitlines()) <= MAX_LINES


def test_it_is_chosen_by_its_yaml_and_keeps_its_budget(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    (composed,) = compose_grid(list(WORDS[2:]), multirun=False, config_dir=str(folder / "conf"))
    cell = build_cell(composed)
    assert (cell.labels["policy"], cell.labels["budget"]) == ("mine", "20 % of seen")
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, cell.setting.policy, Budget(tokens=8))
    held = drive(model, cache, random_tokens(1, 1, 30), 20).held
    assert {len(head) for step in held for layer in step for row in layer for head in row} == {8}


@pytest.mark.long
def test_it_runs_from_a_folder_of_ones_own(folder: Path) -> None:
    scripts = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for command in ([sys.executable, "-m", "kvbench"], [str(scripts / "kvbench")]):
        done = subprocess.run(
            [*command, *WORDS], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert "1 of 1 cells were done already" in done.stdout, "the script finds what the module measured"
    (record,) = (folder / "out" / "cells").glob("*/record.json")
    body = json.loads(record.read_text())["body"]
    assert (body["status"], body["labels"]["policy"], body["labels"]["budget"]) == ("ok", "mine", "20 % of seen")
    assert body["cell"]["policy"]["class"] == "Mine", "by name, wherever its file lies"


def test_the_librarys_lines_cut_what_the_model_generates_with() -> None:
    model = tiny_model("llama_gqa")
    inputs = {"input_ids": random_tokens(3, 1, 40)}
    given = {"model": model, "inputs": {**inputs, "max_new_tokens": 3, "do_sample": False}}
    exec(compile(block("library"), "README.md", "exec"), given)
    cache = given["cache"]
    assert isinstance(cache, PolicyCache)
    assert cache.occupancy().entries_peak <= 9


def test_the_package_lists_every_policy_and_loads_it_when_asked() -> None:
    import kvbench

    assert {"H2O", "SnapKV", "StreamingLLM", "ElasticReleased", "PolicyCache"} <= set(dir(kvbench))
    for name in dir(kvbench):
        assert getattr(kvbench, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'H3O'"):
        _ = kvbench.H3O
