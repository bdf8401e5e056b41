"""The sweep file of docs/wandb.md, as W&B's own agent would call it, without a server."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid

PAGE = Path(__file__).parents[3] / "docs" / "wandb.md"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


def sweep_file() -> dict[str, Any]:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def command_lines(sweep: dict[str, Any]) -> list[list[str]]:
    """Return every command line of the grid, made by wandb's own functions."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    names = list(sweep["parameters"])
    lines = []
    for values in itertools.product(*(sweep["parameters"][name]["values"] for name in names)):
        chosen = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        words = create_sweep_command_args({"args": chosen})
        parts = create_sweep_command(list(sweep["command"]))
        told = (words[part[2:-1]] if part.startswith("${args") else [part] for part in parts)
        lines.append([word for some in told for word in some])
    return lines


def test_an_agent_s_command_lines_are_cells_of_ours() -> None:
    sweep = sweep_file()
    lines = command_lines(sweep)
    assert len(lines) == 12
    keys = set()
    for line in lines:
        at = line.index("kvbench")
        assert [word for word in line[:at] if word not in ("${env}", "/usr/bin/env")] == []
        (composed,) = compose_grid(line[at + 1 :], multirun=False, config_dir=None)
        cell = build_cell(composed)
        assert [cell.labels["policy"], str(cell.labels["budget_fraction"])] == [
            word.partition("=")[2] for word in line[at + 1 : at + 3]
        ]
        keys.add(cell.key)
    assert len(keys) == 12
    assert sweep["metric"]["name"].startswith("quality/")
