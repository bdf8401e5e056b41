"""Tiny models for every test, and every policy there is; one thread, because the tensors are tiny."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before anything else is

from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.contract import POSITIONS, YAMLS, MiddleFirst, takes_long
from tests.tiny_models import tiny_model

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every policy is tested in every position mode, but not every pair in every run."""
    for item in items:
        chosen = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if {"policy", "positions"} <= chosen.keys() and takes_long(chosen["policy"], chosen["positions"]):
            item.add_marker(pytest.mark.long)


def pytest_collection_finish() -> None:
    """Leave what is imported now out of every later collection: tests that collect took half a second each."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let the interpreter end as it would without."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A Llama with 4 query and 2 KV heads, switched to kvbench's attention."""
    return tiny_model("llama_gqa")


@pytest.fixture(scope="session")
def tiny_llava() -> Any:
    """A LLaVA of a CLIP tower and the Llama, its text part switched to kvbench's attention."""
    return tiny_model("llava")


@pytest.fixture(params=[*YAMLS, None], ids=lambda path: path.stem if path else "middle_first")
def policy(request: pytest.FixtureRequest) -> Any:
    """Each yaml of conf/policy, and one policy made to be hard on the base class."""
    if request.param is None:
        return MiddleFirst()
    return instantiate(OmegaConf.load(request.param), _convert_="object")


@pytest.fixture(params=POSITIONS)
def positions(request: pytest.FixtureRequest) -> Any:
    """Each position mode."""
    return request.param
