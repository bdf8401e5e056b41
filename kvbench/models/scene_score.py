"""Score a model on held-out scenes: object F1 of its greedy descriptions."""

from __future__ import annotations

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from kvbench.datasets.scenes import Scene, describe_prompt, draw_scene, parse_objects, scene_at

BATCH = 25
MAX_NEW_TOKENS = 160


@torch.inference_mode()
def score_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, *, num_scenes: int
) -> dict[str, float]:
    """Return object precision, recall and F1 over the first `num_scenes` test scenes.

    An object counts as found when cell, size, texture, colour and shape are all right.
    """
    was_training = model.training
    model.eval()
    found = stated = true = 0
    scenes = [scene_at("test", index) for index in range(num_scenes)]
    for start in range(0, num_scenes, BATCH):
        batch = scenes[start : start + BATCH]
        for scene, text in zip(batch, _descriptions(model, processor, batch), strict=True):
            objects = parse_objects(text)
            found += len(objects & set(scene.objects))
            stated += len(objects)
            true += len(scene.objects)
    model.train(was_training)
    precision, recall = found / max(stated, 1), found / true
    f1 = 2 * found / max(stated + true, 1)
    return {"object_f1": f1, "object_precision": precision, "object_recall": recall, "num_scenes": num_scenes}


def _descriptions(model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: list[Scene]) -> list[str]:
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": describe_prompt(scene)}]}]
        for scene in scenes
    ]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(
        text=prompts,
        images=[draw_scene(scene) for scene in scenes],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
