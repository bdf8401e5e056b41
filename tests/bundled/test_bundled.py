from __future__ import annotations

import hashlib
import json

import pytest
import torch

from kvbench.bundled.tiny_llava import (
    IGNORED_LABEL,
    NUM_PATCHES,
    TEXT_TOKENS,
    Painter,
    Words,
    by_cell,
    lesson_of,
    of_cell,
    training_turns,
)
from kvbench.bundled.train import decode, score_model
from kvbench.cache import Kind
from kvbench.datasets.scenes import NOISE_LEVELS, Scenes, draw_scene, scene_at
from kvbench.models.inputs import answer_text, answer_tokens, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import BUNDLED_FOLDER
from kvbench.tasks.decode import greedy
from tests.tasks.benches import FULL


def test_a_prompt_has_576_image_tokens_and_begins_once(bundled: LoadedModel) -> None:
    batch = prompt_batch(bundled, Scenes(num_samples=2).examples())
    ids = batch.tensors["input_ids"]
    assert (batch.kind == int(Kind.IMAGE)).sum(dim=-1).tolist() == [NUM_PATCHES] * 2
    assert (ids == bundled.tokenizer.bos_token_id).sum(dim=-1).tolist() == [1] * 2
    begin = ids == bundled.tokenizer.bos_token_id
    assert set(batch.kind[begin].tolist()) == {int(Kind.SPECIAL)}
    assert set(batch.kind[ids > 3].tolist()) == {int(Kind.TEXT)}
    assert tuple(batch.tensors["pixel_values"].shape) == (2, 3, 144, 144)


def test_answers_survive_the_tokenizer(bundled: LoadedModel) -> None:
    for example in Scenes(num_samples=10, ask="both").examples():
        assert answer_text(bundled, answer_tokens(bundled, example)) == example.reference


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_training_sees_the_ids_and_pixels_that_the_processor_makes(bundled: LoadedModel, index: int) -> None:
    scene = scene_at("train", index)
    turns = training_turns(scene)
    chat = []
    for number, turn in enumerate(turns):
        picture = [{"type": "image"}] if number == 0 else []
        chat.append({"role": "user", "content": [*picture, {"type": "text", "text": turn.question}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    text = bundled.processor.apply_chat_template(chat, tokenize=False)
    encoded = bundled.processor(text=text, images=[draw_scene(scene)], return_tensors="pt", add_special_tokens=False)
    words = Words(bundled.tokenizer)
    image = bundled.tokenizer.convert_tokens_to_ids("<image>")
    said, labels = words.after_picture(turns, 1000)
    assert [*words.before_picture(), *[image] * NUM_PATCHES, *said] == encoded["input_ids"][0].tolist()
    scored = [token for token in labels if token != IGNORED_LABEL]
    assert bundled.tokenizer.decode(scored) == "".join(f" {turn.answer}</s>" for turn in turns)
    lesson = lesson_of([scene], words)
    pixels = Painter()(lesson.cells, lesson.background, noise=False).pixels[0]
    levels = (pixels - encoded["pixel_values"][0]) * 127.5
    assert float(levels.abs().max()) <= NOISE_LEVELS // 2 + 0.01, "equal but for the noise"
    assert float(levels.mean().abs()) < 0.1


def test_a_lesson_takes_the_turns_that_fit(bundled: LoadedModel) -> None:
    lesson = lesson_of([scene_at("train", index) for index in range(8)], Words(bundled.tokenizer))
    assert lesson.ids.shape == (8, TEXT_TOKENS)
    answered = lesson.labels != IGNORED_LABEL
    assert bool((lesson.ids == lesson.labels)[answered].all())
    assert not bool((answered & lesson.talk).any())
    assert bool(answered.any(dim=-1).all())


def test_patches_show_what_their_cell_holds() -> None:
    cells = torch.zeros(1, 16, 5, dtype=torch.int64)
    cells[:, :, 0] = -1
    cells[:, 5] = torch.tensor([2, 1, 3, 0, 0])
    pictures = Painter()(cells, torch.zeros(1, dtype=torch.int64), noise=False)
    assert set(pictures.cell[pictures.shown[0]].tolist()) == {5}
    assert int(by_cell(pictures.centres)[0, 5].sum()) == 4, "in the very middle of a cell four patches are as near"
    assert not bool((pictures.shown & pictures.bare).any())
    assert torch.equal(of_cell(by_cell(pictures.shown)), pictures.shown)


@torch.no_grad()
def test_the_decoder_written_out_gives_the_models_own_numbers(bundled: LoadedModel) -> None:
    batch = prompt_batch(bundled, Scenes(num_samples=1).examples())
    model = bundled.model
    expected = model(**batch.tensors).logits[0]
    words = Words(bundled.tokenizer)
    before = torch.tensor(words.before_picture())
    start = len(before) + NUM_PATCHES
    patches = model.model.vision_tower(pixel_values=batch.tensors["pixel_values"]).last_hidden_state[:, 1:]
    image = model.model.multi_modal_projector(patches)
    nothing = [None] * model.config.text_config.num_hidden_layers
    last, _ = decode(model, before, image, batch.tensors["input_ids"][:, start:], hidden=nothing)
    torch.testing.assert_close(model.lm_head(last)[0], expected[start:], rtol=1e-3, atol=1e-3)


def test_the_score_names_the_weights_that_are_shipped() -> None:
    score = json.loads((BUNDLED_FOLDER / "score.json").read_text())
    weights = (BUNDLED_FOLDER / "model.safetensors").read_bytes()
    assert score["model_sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(weights) <= 16_000_000


@torch.no_grad()
def test_the_full_cache_describes_a_scene(bundled: LoadedModel) -> None:
    examples = Scenes(num_samples=1, split="validation").examples()
    (answer,) = greedy(
        FULL.decoding(bundled, prompt_batch(bundled, examples), 48),
        end_token_ids=bundled.end_token_ids,
        max_new_tokens=48,
    )
    assert answer_text(bundled, answer) == examples[0].reference


@pytest.mark.long
def test_the_shipped_model_scores_what_its_score_says(bundled: LoadedModel) -> None:
    said = json.loads((BUNDLED_FOLDER / "score.json").read_text())
    score = score_model(bundled.model, bundled.tokenizer, num_scenes=16)
    assert score["full_recall"] >= said["full_recall"] - 0.05
    assert score["full_answers"] >= said["full_answers"] - 0.3
    assert score["random_20_recall"] <= said["random_20_recall"] + 0.2
