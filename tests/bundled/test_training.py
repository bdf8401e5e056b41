from __future__ import annotations

import json
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvbench.bundled import train as train_scenes
from kvbench.bundled.tiny_llava import NUM_PATCHES, Lessons, Painter, Words, by_cell, lesson_of
from kvbench.bundled.train import (
    MOST_HIDDEN,
    WANTED_MASS,
    Watch,
    hidden_patches,
    random_part,
    rate_share,
    score_model,
    tower_loss,
)
from kvbench.datasets.scenes import COLOURS, GRID_CELLS, SHAPES, describe, follow_up_turns, scene_at
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec


def train(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> None:
    few = ["--batch-size", "2", "--workers", "0", "--width", "48", "--layers", "1", "--kv-heads", "1"]
    monkeypatch.setattr(sys, "argv", ["train", "--out", str(out), *few, *words])
    shares = iter((0.0, 1.0))
    monkeypatch.setattr(train_scenes.Training, "share_gone", lambda self: next(shares))
    train_scenes.main()


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list(islice(train_scenes._tokenizer_texts(), 50))
    monkeypatch.setattr(train_scenes, "_tokenizer_texts", lambda: iter(texts))
    monkeypatch.setattr(train_scenes, "score_model", lambda *arguments, **options: {"full_recall": 0.0})


@pytest.mark.usefixtures("_short")
def test_a_call_trains_writes_what_it_was_and_goes_on_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train(monkeypatch, tmp_path / "none", "--minutes", "0")
    train(monkeypatch, tmp_path / "tower", "--minutes", "1")
    resume = ("--resume", str(tmp_path / "tower" / "weights.safetensors"), "--first-scene", "2")
    train(monkeypatch, tmp_path / "talk", "--minutes", "1", *resume)
    before, tower, talk = (load_file(tmp_path / name / "weights.safetensors") for name in ("none", "tower", "talk"))
    head = "lm_head.weight"
    patches = "model.vision_tower.embeddings.patch_embedding.weight"
    assert not torch.equal(before[patches], tower[patches]), "the first stage trains the tower"
    assert torch.equal(before[head], tower[head]), "and nothing else"
    assert not torch.equal(tower[head], talk[head]), "the second one everything"
    assert json.loads((tmp_path / "talk" / "score.json").read_text()) == {"full_recall": 0.0}
    loaded = load_model(ModelSpec(checkpoint=str(tmp_path / "talk" / "model")), "cpu")
    assert torch.equal(loaded.model.lm_head.weight, talk[head].half().float())


def test_rates_rise_stay_and_fall() -> None:
    rates = [rate_share(gone / 100) for gone in range(101)]
    top = rates.index(1.0)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] == rates[-1] == 0.01


def test_no_scene_comes_twice_whoever_draws_it_up(bundled: LoadedModel) -> None:
    lessons = Lessons(bundled.tokenizer, batch_size=2, first_index=6)
    found = torch.cat([lesson.cells for lesson in islice(lessons, 3)])
    expected = lesson_of([scene_at("train", index) for index in range(6, 12)], Words(bundled.tokenizer))
    assert torch.equal(found, expected.cells)


def test_the_tower_is_asked_of_each_patch_whether_and_what_it_shows(bundled: LoadedModel) -> None:
    batch = lesson_of([scene_at("train", 3), scene_at("train", 4)], Words(bundled.tokenizer))
    pictures = Painter()(batch.cells, batch.background)
    colour, shape = (batch.cells[:, :, k].gather(1, pictures.cell.expand_as(pictures.shown)) for k in (0, 1))
    row, column = ((part.expand_as(colour)) for part in (pictures.cell // GRID_CELLS, pictures.cell % GRID_CELLS))
    classes = (2, len(COLOURS), len(SHAPES), GRID_CELLS, GRID_CELLS)
    truths = (pictures.shown.long(), colour.clamp(min=0), shape, row, column)
    right = [torch.nn.functional.one_hot(truth, count) for truth, count in zip(truths, classes, strict=True)]
    logits = 50.0 * torch.cat(right, dim=-1).float()
    assert float(tower_loss(logits, batch, pictures)) == pytest.approx(0.0, abs=1e-6)
    assert float(tower_loss(logits.roll(1, dims=1), batch, pictures)) > 1.0


def test_of_every_object_one_patch_stays_and_nearly_a_third_of_pictures_is_whole(bundled: LoadedModel) -> None:
    torch.manual_seed(5)
    batch = lesson_of([scene_at("train", index % 4) for index in range(60)], Words(bundled.tokenizer))
    pictures = Painter()(batch.cells, batch.background)
    hidden = hidden_patches(pictures, 2, 1)[:, :, 0]
    held = batch.cells[:, None, :, 0] >= 0
    seen = (by_cell(pictures.shown)[:, None] & ~by_cell(hidden)).any(dim=-1)
    assert bool((seen | ~held).all())
    shares = hidden.float().mean(dim=-1)
    assert 0.2 < float((shares == 0).float().mean()) < 0.4
    assert 0.7 < float(shares.max()) <= MOST_HIDDEN + 0.05


def test_attention_that_rests_on_middles_loses_nothing_and_on_background_much(bundled: LoadedModel) -> None:
    batch = lesson_of([scene_at("train", 0)], Words(bundled.tokenizer))
    pictures = Painter()(batch.cells, batch.background)
    watch = Watch.of(pictures, batch.talk)
    middles = watch.middles[0] / watch.middles[0].sum(dim=0).clamp(min=1)
    good = (WANTED_MASS * middles.sum(dim=-1)).expand(1, 1, NUM_PATCHES, -1)
    bad = (watch.bare[0, :, 0] / watch.bare.sum()).expand(1, 1, NUM_PATCHES, -1)
    said = batch.ids.shape[1]
    missing, bare = watch.loss(good, good[:, :, :said])
    assert float(missing) == pytest.approx(0.0, abs=0.01)
    assert float(bare) < 0.1, "the middle of a ring alone is bare"
    missing, bare = watch.loss(bad, bad[:, :, :said])
    assert float(missing) > 2 * math.log(WANTED_MASS / 2e-4)
    assert float(bare) == pytest.approx(2.0)


def test_a_random_part_is_of_the_size_of_its_budget_and_the_prompt_sees_all() -> None:
    torch.manual_seed(1)
    length, num_before, width = torch.tensor([3, 5]), 20, 9
    assert random_part(length, num_before, width, 1.0, 2) is None
    hidden = random_part(length, num_before, width, 0.3, 2)
    assert hidden is not None
    assert hidden.shape == (2, 2, width, num_before + width)
    for row, prompt in enumerate(length.tolist()):
        assert not bool(hidden[row, :, :prompt].any())
        for place in range(prompt, width):
            earlier = num_before + place
            assert not bool(hidden[row, :, place, earlier:].any()), "a token sees itself"
            assert (~hidden[row, :, place, :earlier]).sum(dim=-1).tolist() == [int(0.3 * earlier)] * 2


def test_a_score_counts_objects_and_answers_that_are_right(
    monkeypatch: pytest.MonkeyPatch, bundled: LoadedModel
) -> None:
    scenes = [scene_at("validation", index) for index in range(2)]
    first, sizes = describe(scenes[0]), [len(scene.objects) for scene in scenes]
    asked = follow_up_turns(scenes[0], 1)[0]

    def answers(model: Any, tokenizer: Any, scenes: Any, questions: list[str], *, kept_share: float) -> list[str]:
        if kept_share < 0.5:
            return ["", ""]
        return [asked.answer, "Perhaps."] if questions[0] == asked.question else [first, first]

    monkeypatch.setattr(train_scenes, "answers", answers)
    score = score_model(bundled.model, bundled.tokenizer, num_scenes=2)
    assert score["full_recall"] == score["random_50_recall"] == round(sizes[0] / sum(sizes), 4)
    assert score["full_precision"] == 0.5
    assert score["full_answers"] == 0.5
    assert score["random_20_recall"] == score["random_20_precision"] == score["random_20_answers"] == 0.0
