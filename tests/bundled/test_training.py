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

from kvbench.bundled import train as train_scenes
from kvbench.bundled.tiny_llava import tiny_llava, train_tokenizer
from kvbench.bundled.train import MIN_WINDOW_TOKENS, SceneBatch, attention_mask, save_state, score_model
from kvbench.datasets.scenes import describe, scene_at
from kvbench.models.loader import load_model
from kvbench.models.spec import ModelSpec


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


def test_a_score_counts_objects_that_are_right_in_all_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [describe(scene_at("test", index)) for index in range(3)]
    said = [texts[0], texts[1].replace("big", "small").replace("small", "big"), ""]
    monkeypatch.setattr(train_scenes, "_descriptions", lambda model, processor, scenes: said[: len(scenes)])
    model, processor = torch.nn.Linear(1, 1), object()
    one = score_model(model, processor, num_scenes=1)  # type: ignore[arg-type]
    assert one == {"object_f1": 1.0, "object_precision": 1.0, "object_recall": 1.0, "num_scenes": 1}
    three = score_model(model, processor, num_scenes=3)  # type: ignore[arg-type]
    sizes = [len(scene_at("test", index).objects) for index in range(3)]
    assert sizes[0] <= three["object_recall"] * sum(sizes) < sizes[0] + sizes[1]
    assert model.training, "as it was"


def test_dropout_hides_neither_the_past_of_everything_nor_centres_nor_what_is_near() -> None:
    torch.manual_seed(3)
    image_id, patches, length = 9, 144, 200
    ids = torch.ones(8, length, dtype=torch.int64)
    ids[:, 1 : 1 + patches] = image_id
    centres = torch.zeros(8, patches, dtype=torch.bool)
    centres[:, 5::29] = True
    empty = torch.empty(0)
    batch = SceneBatch(pixels=empty, ids=ids, labels=ids, cells=empty, centres=centres)
    seen = attention_mask(batch, image_id)[:, 0]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert not bool((seen & ~causal).any())
    assert bool(seen.diagonal(dim1=1, dim2=2).all())
    assert bool((seen[:, :, 0] == causal[:, 0]).all()), "the first token is never hidden"
    shown = torch.zeros(length, dtype=torch.bool)
    shown[1 : 1 + patches] = centres[0]
    assert bool((seen[:, :, shown] == causal[:, shown]).all()), "nor the centre of an object"
    near = causal & ~causal.tril(-MIN_WINDOW_TOKENS - 1)
    text = ids[0] != image_id
    assert bool((seen | ~near)[:, :, text].all()), "nor a text token in the shortest window"
    hidden = (causal & ~seen).flatten(1).sum(-1)
    assert 0 < int((hidden == 0).sum()) < 8, "a quarter of the rows sees everything"
