"""Train the bundled tiny LLaVA on scenes, from nothing, on a CPU or a GPU.

    python -m kvbench.models.train_scenes --out runs/tiny-llava --steps 6000

Two stages, as LLaVA itself: the tower first learns what each cell of the picture shows (dense
supervision, minutes), then tower, projector and decoder learn conversations together, from step
`--drop-from` on with token dropout (see token_dropout.py). The learning rate is constant and falls
linearly over the last fifth. A killed run goes on from its last checkpoint; `--steps` may be raised
or lowered between runs. No step is drawn twice: the scene index grows with the step.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from kvbench.datasets.scenes import DESCRIBE_PROMPTS, GRID_CELLS, describe, follow_up_turns, scene_at
from kvbench.durable import replace_file
from kvbench.models.scene_batches import CELL_CLASSES, IGNORED_LABEL, SceneBatch, SceneBatches
from kvbench.models.scene_score import score_model
from kvbench.models.tiny_llava import tiny_llava, tiny_processor, train_tokenizer
from kvbench.models.token_dropout import attention_mask
from kvbench.models.train_state import restore, restore_optimizer, save_state

log = logging.getLogger("kvbench.train_scenes")

SEED = 20261123
TOWER_STEPS = 1200
TOWER_BATCH = 64
SCENES_BEFORE_TALK = TOWER_STEPS * TOWER_BATCH
WARM_UP_STEPS = 200
DECAY_FRACTION = 0.2
REPORT_EVERY = 50
SAVE_EVERY = 250
SCORE_EVERY = 500


def main() -> None:
    """Train, checkpoint, score and write the model in Hugging Face format."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args = _arguments()
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(_tokenizer_texts())
    model = tiny_llava(tokenizer).to(args.device)
    start = restore(args.out, model)
    if start is None:
        start = _train_tower(model, args)
    _train_talk(model, tokenizer, args, start)
    _save_model(args.out / "model", model, tokenizer)
    score = score_model(model, tiny_processor(tokenizer), num_scenes=200)
    replace_file(args.out / "score.json", f"{json.dumps(score, indent=2)}\n".encode())
    log.info("held-out score: %s", score)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvbench.models.train_scenes", description=__doc__)
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


def _loader(dataset: SceneBatches) -> Iterator[SceneBatch]:
    return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4))


def _train_tower(model: LlavaForConditionalGeneration, args: argparse.Namespace) -> int:
    """Teach the tower what each cell shows through throw-away linear heads; returns step 0."""
    tower = model.model.vision_tower
    num_classes = [len(classes) + (name == "size") for name, classes in CELL_CLASSES.items()]
    heads = nn.Linear(tower.config.hidden_size, sum(num_classes)).to(args.device)
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.01)
    batches = _loader(SceneBatches(tokenizer=None, batch_size=TOWER_BATCH, first_index=0, num_image_tokens=0))
    for step in range(TOWER_STEPS):
        batch = next(batches)
        _set_rate(optimizer, 1e-3 * _rate_share(step, TOWER_STEPS))
        with torch.autocast(args.device, torch.bfloat16):
            patches = tower(pixel_values=batch.pixels.to(args.device)).last_hidden_state[:, 1:]
            logits = heads(_cells_of_patches(patches)).float()
        loss = _cell_loss(logits, batch.cells.to(args.device), num_classes)
        _update(optimizer, loss, tower.parameters())
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


def _cell_loss(logits: Tensor, cells: Tensor, num_classes: list[int]) -> Tensor:
    parts = logits.split(num_classes, dim=-1)
    losses = [
        nn.functional.cross_entropy(part.flatten(0, 1), cells[..., k].flatten(), ignore_index=IGNORED_LABEL)
        for k, part in enumerate(parts)
    ]
    return torch.stack(losses).sum()


def _train_talk(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, start: int
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    restore_optimizer(args.out, optimizer)
    first = SCENES_BEFORE_TALK + start * args.batch_size
    image_tokens = model.config.image_seq_length
    batches = _loader(
        SceneBatches(tokenizer=tokenizer, batch_size=args.batch_size, first_index=first, num_image_tokens=image_tokens)
    )
    started_s, total = time.monotonic(), 0.0
    for step in range(start, args.steps):
        _set_rate(optimizer, args.learning_rate * _rate_share(step, args.steps))
        batch = next(batches)
        mask = attention_mask(batch, model.config.image_token_index) if step >= args.drop_from else None
        total += _talk_step(model, optimizer, batch, mask, args.device)
        if (step + 1) % REPORT_EVERY == 0:
            pace_s = (time.monotonic() - started_s) / (step + 1 - start)
            log.info("step %d loss %.4f, %.2f s a step", step + 1, total / REPORT_EVERY, pace_s)
            total = 0.0
        if (step + 1) % SAVE_EVERY == 0:
            save_state(args.out, model, optimizer, step + 1)
        if (step + 1) % SCORE_EVERY == 0:
            log.info("step %d held-out %s", step + 1, score_model(model, tiny_processor(tokenizer), num_scenes=48))


def _talk_step(
    model: LlavaForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batch: SceneBatch,
    mask: Tensor | None,
    device: str,
) -> float:
    """Update once; right padding needs no mask under causal attention, as pads carry no label."""
    with torch.autocast(device, torch.bfloat16):
        output = model.model(
            input_ids=batch.ids.to(device),
            pixel_values=batch.pixels.to(device),
            attention_mask=None if mask is None else mask.to(device),
            use_cache=False,
        )
        labels = batch.labels.to(device)[:, 1:]
        scored = labels != IGNORED_LABEL
        logits = model.lm_head(output.last_hidden_state[:, :-1][scored]).float()
    loss = nn.functional.cross_entropy(logits, labels[scored])
    _update(optimizer, loss, model.parameters())
    return loss.item()


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _rate_share(step: int, steps: int) -> float:
    """Warm up, stay, fall linearly to 2 % over the last fifth of the steps."""
    left = (steps - step) / (DECAY_FRACTION * steps)
    return max(min((step + 1) / WARM_UP_STEPS, left, 1.0), 0.02)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _save_model(folder: Path, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder)
    tiny_processor(tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    main()
