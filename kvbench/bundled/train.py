"""Train the bundled tiny LLaVA on scenes, from nothing, on a CPU or a GPU, and score it on held-out scenes.

    python -m kvbench.bundled.train --out runs/tiny-llava --steps 6000

Two stages, as LLaVA itself: the tower first learns what each cell of the picture shows (dense
supervision, minutes), then tower, projector and decoder learn conversations together, from step
`--drop-from` on with token dropout. The learning rate is constant and falls
linearly over the last fifth. A killed run goes on from its last checkpoint; `--steps` may be raised
or lowered between runs. No step is drawn twice: the scene index grows with the step.

Token dropout teaches the tiny model the redundancy that large models have. A small model trained on full attention
spreads what it needs over every token, so that any eviction ruins it and no policy differs from another. Large
vision-language models are not like that: most image tokens can go. So in the last stage tokens see only part of what
lies before them: a random share of the image patches is hidden, but never the patch that holds an object's centre, and
of the text a random share of what is older than a random window. The choice is blind to attention
and to every policy; it only makes background and old text dispensable, and objects not.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from kvbench.bundled.tiny_llava import PATCH_PIXELS, tiny_llava, tiny_processor, train_tokenizer
from kvbench.datasets.base import Turn
from kvbench.datasets.scenes import (
    COLOURS,
    DESCRIBE_PROMPTS,
    GRID_CELLS,
    IMAGE_PIXELS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    describe,
    describe_prompt,
    draw_scene,
    follow_up_turns,
    object_centres,
    parse_objects,
    scene_at,
)
from kvbench.results.files import replace_file, replacing

SEED = 20261123
TOWER_STEPS = 1200
TOWER_BATCH = 64
SCENES_BEFORE_TALK = TOWER_STEPS * TOWER_BATCH
TOWER_RATE = 1e-3
WARM_UP_STEPS = 200
DECAY_FRACTION = 0.2
REPORT_EVERY = 50
SAVE_EVERY = 250
SCORE_EVERY = 500
SCORE_BATCH = 25
MAX_NEW_TOKENS = 160
KEEP_ALL_SHARE = 0.25
MIN_WINDOW_TOKENS = 6
MAX_WINDOW_TOKENS = 64
IGNORED_LABEL = -100
CELL_CLASSES = {"size": SIZES, "texture": TEXTURES, "colour": COLOURS, "shape": SHAPES}

log = logging.getLogger("kvbench.train_scenes")


def main() -> None:
    """Train, checkpoint, score and write the model in Hugging Face format."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = _arguments()
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(_tokenizer_texts())
    processor = tiny_processor(tokenizer)
    model = tiny_llava(tokenizer).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    start = restore(args.out, model, optimizer)
    if start is None:
        start = _train_tower(model, args)
    _train_talk(model, processor, optimizer, args, start)
    model.save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    score = score_model(model, processor, num_scenes=200)
    replace_file(args.out / "score.json", f"{json.dumps(score, indent=2)}\n".encode())
    log.info("held-out score: %s", score)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvbench.bundled.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and of the final model")
    parser.add_argument("--steps", type=int, default=4200, help="conversation steps in all (default 4200)")
    parser.add_argument("--drop-from", type=int, default=2250, help="first step with token dropout (default 2250)")
    parser.add_argument("--batch-size", type=int, default=32, help="scenes per step (default 32)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    return parser.parse_args()


def _tokenizer_texts() -> Iterator[str]:
    for index in range(2000):
        scene = scene_at("train", index)
        yield f"USER: \n{DESCRIBE_PROMPTS[index % 3]} ASSISTANT: {describe(scene)}"
        for turn in follow_up_turns(scene, 4):
            yield f"USER: {turn.question} ASSISTANT: {turn.answer}"


def _train_tower(model: LlavaForConditionalGeneration, args: argparse.Namespace) -> int:
    """Teach the tower what each cell shows through throw-away linear heads; returns step 0."""
    tower = model.model.vision_tower
    num_classes = [len(classes) + (name == "size") for name, classes in CELL_CLASSES.items()]
    heads = nn.Linear(tower.config.hidden_size, sum(num_classes)).to(args.device)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=TOWER_RATE, weight_decay=0.01)
    batches = SceneBatches(tokenizer=None, batch_size=TOWER_BATCH, first_index=0, num_image_tokens=0).loaded()
    for step in range(TOWER_STEPS):
        batch = next(batches)
        with torch.autocast(args.device, torch.bfloat16):
            patches = tower(pixel_values=batch.pixels.to(args.device)).last_hidden_state[:, 1:]
            logits = heads(_cells_of_patches(patches)).float()
        losses = [
            nn.functional.cross_entropy(part.flatten(0, 1), classes.flatten(), ignore_index=IGNORED_LABEL)
            for part, classes in zip(
                logits.split(num_classes, dim=-1), batch.cells.to(args.device).unbind(dim=-1), strict=True
            )
        ]
        loss = torch.stack(losses).sum()
        _update(optimizer, loss, tower.parameters(), TOWER_RATE * _rate_share(step, TOWER_STEPS))
        if step % REPORT_EVERY == 0:
            log.info("tower step %d loss %.4f", step, loss.item())
    save_state(args.out, model, None, 0)
    return 0


def _cells_of_patches(patches: Tensor) -> Tensor:
    """(B, 144, D) patches in reading order -> (B, 16, D), the mean of the 3 x 3 patches of each cell."""
    batch, number, width = patches.shape
    side = round(number**0.5) // GRID_CELLS
    grid = patches.view(batch, GRID_CELLS, side, GRID_CELLS, side, width)
    return grid.mean(dim=(2, 4)).reshape(batch, GRID_CELLS**2, width)


def _train_talk(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
    start: int,
) -> None:
    batches = SceneBatches(
        tokenizer=processor.tokenizer,
        batch_size=args.batch_size,
        first_index=SCENES_BEFORE_TALK + start * args.batch_size,
        num_image_tokens=model.config.image_seq_length,
    ).loaded()
    started_s, total = time.monotonic(), 0.0
    for step in range(start, args.steps):
        batch = next(batches)
        mask = attention_mask(batch, model.config.image_token_index) if step >= args.drop_from else None
        with torch.autocast(args.device, torch.bfloat16):
            output = model.model(
                input_ids=batch.ids.to(args.device),
                pixel_values=batch.pixels.to(args.device),
                # Right padding needs no mask under causal attention, as pads carry no label.
                attention_mask=None if mask is None else mask.to(args.device),
                use_cache=False,
            )
            labels = batch.labels.to(args.device)[:, 1:]
            scored = labels != IGNORED_LABEL
            logits = model.lm_head(output.last_hidden_state[:, :-1][scored]).float()
        loss = nn.functional.cross_entropy(logits, labels[scored])
        _update(optimizer, loss, model.parameters(), args.learning_rate * _rate_share(step, args.steps))
        total += loss.item()
        if (step + 1) % REPORT_EVERY == 0:
            pace_s = (time.monotonic() - started_s) / (step + 1 - start)
            log.info("step %d loss %.4f, %.2f s a step", step + 1, total / REPORT_EVERY, pace_s)
            total = 0.0
        if (step + 1) % SAVE_EVERY == 0:
            save_state(args.out, model, optimizer, step + 1)
        if (step + 1) % SCORE_EVERY == 0:
            log.info("step %d held-out %s", step + 1, score_model(model, processor, num_scenes=48))


def _rate_share(step: int, steps: int) -> float:
    """Warm up, stay, fall linearly to 2 % over the last fifth of the steps."""
    left = (steps - step) / (DECAY_FRACTION * steps)
    return max(min((step + 1) / WARM_UP_STEPS, left, 1.0), 0.02)


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, clipped: Iterable[nn.Parameter], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    nn.utils.clip_grad_norm_(clipped, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def attention_mask(batch: SceneBatch, image_token_id: int) -> Tensor:
    """Return (B, 1, T, T) bool, True where a query may attend under token dropout; every token sees itself.

    One share of tokens is drawn to be hidden per row; the first token never is.
    """
    num_rows, length = batch.ids.shape
    age = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    image = batch.ids == image_token_id
    window = torch.randint(MIN_WINDOW_TOKENS, MAX_WINDOW_TOKENS + 1, (num_rows, 1, 1))
    share = torch.rand(num_rows, 1) * (torch.rand(num_rows, 1) > KEEP_ALL_SHARE)
    dropped = torch.rand(num_rows, length) < share
    dropped[:, 0] = False
    dropped[image] &= ~batch.centres.flatten()
    hidden = dropped[:, None, :] & (age > torch.where(image[:, None, :], 0, window))
    return ((age >= 0) & ~hidden)[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneBatch:
    """What a training step takes.

    pixels (B, 3, P, P) in -1..1; ids and labels (B, T); cells (B, 16, 4) class or -100; centres
    (B, 144) bool, True at the patch that holds an object's centre.
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    cells: Tensor
    centres: Tensor


class SceneBatches(IterableDataset[SceneBatch]):
    """Batches from train scene `first_index` on, for ever; `tokenizer` None leaves text out."""

    def __init__(
        self, *, tokenizer: PreTrainedTokenizerFast | None, batch_size: int, first_index: int, num_image_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.first_index = first_index
        self.num_image_tokens = num_image_tokens

    def loaded(self) -> Iterator[SceneBatch]:
        """Yield the batches, drawn ahead by a process of their own."""
        return iter(DataLoader(self, batch_size=None, num_workers=1, prefetch_factor=4))

    def __iter__(self) -> Iterator[SceneBatch]:
        torch.set_num_threads(1)
        index = self.first_index
        while True:
            yield self._batch([scene_at("train", index + k) for k in range(self.batch_size)])
            index += self.batch_size

    def _batch(self, scenes: list[Scene]) -> SceneBatch:
        rows, pad = [([0], [0]) for _ in scenes], 0
        if self.tokenizer is not None:
            rows = [encode_conversation(self.tokenizer, training_turns(s), self.num_image_tokens) for s in scenes]
            pad = self.tokenizer.pad_token_id
        longest = max(len(ids) for ids, _ in rows)
        return SceneBatch(
            pixels=torch.stack([to_pixels(draw_scene(scene)) for scene in scenes]),
            ids=torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows]),
            labels=torch.tensor([labels + [IGNORED_LABEL] * (longest - len(labels)) for _, labels in rows]),
            cells=torch.tensor([_cell_classes(scene) for scene in scenes]),
            centres=torch.stack([_centre_patches(scene) for scene in scenes]),
        )


def training_turns(scene: Scene) -> list[Turn]:
    """Half of the scenes are described first, the others after follow-up questions."""
    rng = random.Random(scene.name + "/turns")
    description = [Turn(question=describe_prompt(scene), answer=describe(scene))]
    if rng.random() < 0.5:
        return description + follow_up_turns(scene, rng.randint(0, 3))
    return follow_up_turns(scene, 5) + description


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, turns: list[Turn], num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """Return token ids and labels; only answers and their end tokens carry a label."""
    ids, labels = [tokenizer.bos_token_id], [IGNORED_LABEL]
    for number, turn in enumerate(turns):
        picture = "<image>" * num_image_tokens + "\n" if number == 0 else ""
        prompt = tokenizer.encode(f"USER: {picture}{turn.question} ASSISTANT:", add_special_tokens=False)
        answer = [*tokenizer.encode(" " + turn.answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids += prompt + answer
        labels += [IGNORED_LABEL] * len(prompt) + answer
    return ids, labels


def to_pixels(image: Image.Image) -> Tensor:
    """Return what the processor makes of a picture of the right size, (3, P, P) in -1..1."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1.0


def _centre_patches(scene: Scene) -> Tensor:
    side = IMAGE_PIXELS // PATCH_PIXELS
    held = torch.zeros((side, side), dtype=torch.bool)
    for x, y in object_centres(scene):
        held[y // PATCH_PIXELS, x // PATCH_PIXELS] = True
    return held.flatten()


def _cell_classes(scene: Scene) -> list[list[int]]:
    """Per cell the class of each attribute; an empty cell has size class 2 and no other label."""
    cells = [[len(SIZES)] + [IGNORED_LABEL] * (len(CELL_CLASSES) - 1)] * GRID_CELLS**2
    for item in scene.objects:
        classes = [of_kind.index(getattr(item, name)) for name, of_kind in CELL_CLASSES.items()]
        cells[item.row * GRID_CELLS + item.column] = classes
    return cells


@torch.inference_mode()
def score_model(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, *, num_scenes: int
) -> dict[str, float]:
    """Return object precision, recall and F1 of greedy descriptions of the first `num_scenes` test scenes.

    An object counts as found when cell, size, texture, colour and shape are all right.
    """
    was_training = model.training
    model.eval()
    found = stated = true = 0
    scenes = [scene_at("test", index) for index in range(num_scenes)]
    for start in range(0, num_scenes, SCORE_BATCH):
        batch = scenes[start : start + SCORE_BATCH]
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
    inputs = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
        images=[draw_scene(scene) for scene in scenes],
        return_tensors="pt",
        padding=True,
        add_special_tokens=False,
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts: list[str] = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def save_state(
    out: Path, model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer | None, step: int
) -> None:
    """Write weights and optimizer moments after `step` as safetensors, published by one rename; two are kept."""
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for index, moments in (optimizer.state_dict()["state"] if optimizer else {}).items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    with replacing(out / f"state-{step:06d}.safetensors") as partial:
        save_file(tensors, partial, metadata={"step": str(step)})
    for old in sorted(out.glob("state-*.safetensors"))[:-2]:
        old.unlink()


def restore(out: Path, model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer) -> int | None:
    """Load the last checkpoint's weights and moments; return its step, None if there is none."""
    path = max(out.glob("state-*.safetensors"), default=None)
    if path is None:
        return None
    weights: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        kind, name = key.split(".", 1)
        if kind == "model":
            weights[name] = value
        else:
            index, name = name.split(".")
            moments.setdefault(int(index), {})[name] = value
    model.load_state_dict(weights)
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    log.info("going on from %s", path)
    return int(path.stem.removeprefix("state-"))


if __name__ == "__main__":
    main()
