from __future__ import annotations

import pytest
import torch

from kvbench.bundled.train import IGNORED_LABEL, encode_conversation, to_pixels, training_turns
from kvbench.cache import Kind
from kvbench.datasets.scenes import Scenes, draw_scene, scene_at
from kvbench.models.inputs import answer_text, answer_tokens, prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec


@pytest.fixture(scope="module")
def bundled() -> LoadedModel:
    return load_model(ModelSpec(checkpoint="bundled"), "cpu")


def test_a_prompt_has_144_image_tokens_and_begins_once(bundled: LoadedModel) -> None:
    batch = prompt_batch(bundled, Scenes(num_samples=4).examples())
    ids = batch.tensors["input_ids"]
    assert (batch.kind == int(Kind.IMAGE)).sum(dim=-1).tolist() == [144] * 4
    assert (ids == bundled.tokenizer.bos_token_id).sum(dim=-1).tolist() == [1] * 4
    begin = ids == bundled.tokenizer.bos_token_id
    assert set(batch.kind[begin].tolist()) == {int(Kind.SPECIAL)}
    assert set(batch.kind[ids > 3].tolist()) == {int(Kind.TEXT)}
    assert tuple(batch.tensors["pixel_values"].shape) == (4, 3, 144, 144)


def test_answers_survive_the_tokenizer(bundled: LoadedModel) -> None:
    for example in Scenes(num_samples=20).examples():
        assert answer_text(bundled, answer_tokens(bundled, example)) == example.reference


@pytest.mark.parametrize("index", [0, 1, 2, 3, 5, 8])
def test_training_sees_the_ids_and_pixels_that_the_processor_makes(bundled: LoadedModel, index: int) -> None:
    scene = scene_at("train", index)
    turns = training_turns(scene)
    chat = []
    for number, turn in enumerate(turns):
        picture = [{"type": "image"}] if number == 0 else []
        chat.append({"role": "user", "content": [*picture, {"type": "text", "text": turn.question}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    text = bundled.processor.apply_chat_template(chat, tokenize=False)
    image = draw_scene(scene)
    encoded = bundled.processor(text=text, images=[image], return_tensors="pt", add_special_tokens=False)
    ids, labels = encode_conversation(bundled.tokenizer, turns, 144)
    assert ids == encoded["input_ids"][0].tolist()
    torch.testing.assert_close(to_pixels(image), encoded["pixel_values"][0], rtol=0, atol=1e-6)
    scored = [token for token in labels if token != IGNORED_LABEL]
    assert [token for token, label in zip(ids, labels, strict=True) if label != IGNORED_LABEL] == scored
    answers = "".join(f" {turn.answer}</s>" for turn in turns)
    assert bundled.tokenizer.decode(scored) == answers
