from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvbench.models import train_scenes
from kvbench.models.loader import load_model
from kvbench.models.spec import ModelSpec
from kvbench.models.tiny_llava import tiny_llava, train_tokenizer
from kvbench.models.train_state import save_state


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(islice(train_scenes._tokenizer_texts(), 50))
    monkeypatch.setattr(train_scenes, "_tokenizer_texts", lambda: iter(texts))
    monkeypatch.setattr(train_scenes, "score_model", lambda *args, **options: {"object_f1": 0.0})
    for name, value in {"TOWER_STEPS": 1, "TOWER_BATCH": 2, "SAVE_EVERY": 1, "SCORE_EVERY": 2}.items():
        monkeypatch.setattr(train_scenes, name, value)


def train(monkeypatch: pytest.MonkeyPatch, out: Path, steps: int) -> None:
    words = ["train_scenes", "--out", str(out), "--steps", str(steps), "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", words)
    train_scenes.main()


def never(*arguments: Any) -> int:
    raise AssertionError("the tower must not be trained again")


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train(monkeypatch, tmp_path / "whole", 2)
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "whole" / "state-000001.safetensors", tmp_path / "killed")
    monkeypatch.setattr(train_scenes, "_train_tower", never)
    train(monkeypatch, tmp_path / "killed", 2)
    whole, resumed = (load_file(tmp_path / name / "state-000002.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((tmp_path / "killed" / "score.json").read_text()) == {"object_f1": 0.0}
    loaded = load_model(ModelSpec(checkpoint=str(tmp_path / "killed" / "model")), "cpu")
    weight = loaded.model.lm_head.weight
    assert torch.equal(weight, resumed["model.lm_head.weight"])


def test_a_run_killed_after_the_tower_does_not_train_it_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_llava(train_tokenizer(train_scenes._tokenizer_texts()))
    save_state(tmp_path, model, None, 0)
    monkeypatch.setattr(train_scenes, "_train_tower", never)
    train(monkeypatch, tmp_path, 0)
    saved = load_model(ModelSpec(checkpoint=str(tmp_path / "model")), "cpu").model
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight)
