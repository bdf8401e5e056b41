"""Train the bundled tiny LLaVA on scenes, from nothing, by the clock, and score it on validation scenes.

    python -m kvbench.bundled.train --out runs/tiny-llava --minutes 8.5 --device cuda

Two stages, as LLaVA itself: the tower first learns what each patch shows (dense supervision, throw-away heads), then
tower, projector and decoder learn conversations together. Rates rise, stay and fall with the share of `--minutes`
that has gone; `--resume FILE` goes on from weights, with another rise and fall. Every minute the weights are written
and scored: with the full cache, and with a random subset of it. No other policy is looked at.

Two more things are taught, which large models have and a small one that learns nothing but answers has not:

- **Redundancy.** What comes after the picture sees a random part of its patches, drawn per layer and KV head, from all
  to a tenth, of each object at least one. So any patch of an object serves, and background is dispensable. Text is
  never hidden.
- **Attention that rests on things.** A small loss keeps the attention of every query off bare background, and asks of
  every KV head that each object that the prompt has passed gets a few percent of it, in its middle. A small model
  with answers as its only aim looks at an object at the moment of naming it and not before.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from kvbench.bundled.tiny_llava import (
    IGNORED_LABEL,
    NUM_PATCHES,
    Lesson,
    Lessons,
    Painter,
    Pictures,
    Words,
    by_cell,
    lesson_of,
    of_cell,
    tiny_llava,
    tiny_processor,
    train_tokenizer,
    training_turns,
)
from kvbench.datasets.scenes import (
    COLOURS,
    GRID_CELLS,
    SHAPES,
    Scene,
    describe_prompt,
    follow_up_turns,
    parse_objects,
    scene_at,
)
from kvbench.results.files import replace_file, replacing

SEED = 20261130
TOKENIZER_SCENES = 2000
TOWER_SHARE = 0.08  # of the minutes
TOWER_WEIGHT = 0.2
WARM_UP_SHARE = 0.02
DECAY_SHARE = 0.35
KEEP_ALL_SHARE = 0.3
MOST_HIDDEN = 0.9
WANTED_MASS = 0.05  # of a KV head's attention on the middle of each object
SMALL_MASS = 1e-4
MOST_ANSWER_TOKENS = 48
PATCH_CLASSES = (2, len(COLOURS), len(SHAPES), GRID_CELLS, GRID_CELLS)  # anything, colour, shape, row, column

log = logging.getLogger("kvbench.train")


def main() -> None:
    """Train, checkpoint, score and write weights and tokenizer."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {args.out.name} %(message)s", force=True)
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(_tokenizer_texts())
    shape = {"width": args.width, "num_layers": args.layers, "num_kv_heads": args.kv_heads}
    model = tiny_llava(tokenizer, **shape).to(args.device)
    if args.resume is not None:
        model.load_state_dict(load_file(args.resume, device=args.device))
        log.info("going on from %s", args.resume)
    size = sum(parameter.numel() for parameter in model.parameters())
    log.info("%d parameters, %d words", size, len(tokenizer))
    if args.minutes > 0:
        Training(args, model, tokenizer).run()
    save_weights(args.out / "weights.safetensors", model)
    score = score_model(model, tokenizer, num_scenes=args.final_scenes)
    replace_file(args.out / "score.json", f"{json.dumps(score, indent=2)}\n".encode())
    log.info("validation, final: %s", score)
    model.half().save_pretrained(args.out / "model")
    tiny_processor(tokenizer).save_pretrained(args.out / "model")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kvbench.bundled.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder of weights, tokenizer and score")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training in this call (default 8)")
    parser.add_argument("--resume", type=Path, help="weights to go on from; first-scene must then be new")
    parser.add_argument("--first-scene", type=int, default=0, help="first train scene (default 0)")
    parser.add_argument("--batch-size", type=int, default=64, help="scenes per step (default 64)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--width", type=int, default=192, help="of the decoder (default 192)")
    parser.add_argument("--layers", type=int, default=4, help="of the decoder (default 4)")
    parser.add_argument("--kv-heads", type=int, default=2, help="of the decoder (default 2)")
    parser.add_argument("--attention-weight", type=float, default=0.1, help="of the loss on attention (default 0.1)")
    parser.add_argument("--workers", type=int, default=4, help="processes that draw up scenes, 0: none (default 4)")
    parser.add_argument("--score-every-s", type=float, default=60.0, help="between scores (default 60)")
    parser.add_argument("--scenes", type=int, default=64, help="validation scenes of a score (default 64)")
    parser.add_argument("--final-scenes", type=int, default=256, help="validation scenes of the last one (default 256)")
    parser.add_argument("--device", default="cpu", help="torch device (default cpu)")
    return parser.parse_args()


def _tokenizer_texts() -> Iterator[str]:
    for index in range(TOKENIZER_SCENES):
        for turn in training_turns(scene_at("train", index)):
            yield f"USER: \n{turn.question} ASSISTANT: {turn.answer}"


class Training:
    """One call's training: the clock, the rates, the two stages."""

    def __init__(
        self, args: argparse.Namespace, model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.model = model
        self.tokenizer = tokenizer
        self.painter = Painter().to(args.device)
        self.heads = nn.Linear(model.config.vision_config.hidden_size, sum(PATCH_CLASSES)).to(args.device)
        self.before = torch.tensor(Words(tokenizer).before_picture(), device=args.device)
        self.optimizer = torch.optim.AdamW(
            [*model.parameters(), *self.heads.parameters()],
            lr=args.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.05,
            fused=self.device.type != "cpu",
        )
        self.started_s = time.monotonic()
        self.scored_s = self.reported_s = self.started_s
        self.num_steps = self.steps_reported = 0

    def share_gone(self) -> float:
        """Return how much of the minutes has gone."""
        planned_s: float = 60.0 * self.args.minutes
        return (time.monotonic() - self.started_s) / planned_s

    def run(self) -> None:
        """Train until the minutes have gone."""
        lessons = Lessons(self.tokenizer, batch_size=self.args.batch_size, first_index=self.args.first_scene)
        batches = lessons.loaded(self.args.workers)
        tower_until = 0.0 if self.args.resume is not None else TOWER_SHARE
        while (gone := self.share_gone()) < 1.0:
            batch = next(batches).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
                parts = self._losses(batch, talks=gone >= tower_until)
            loss = torch.stack(list(parts.values())).sum()
            stage = gone / tower_until if gone < tower_until else (gone - tower_until) / (1.0 - tower_until)
            self._update(loss, self.args.learning_rate * rate_share(stage))
            self.num_steps += 1
            self._report(gone, parts, talks=gone >= tower_until)

    def _losses(self, batch: Lesson, *, talks: bool) -> dict[str, Tensor]:
        pictures = self.painter(batch.cells, batch.background)
        patches = self.model.model.vision_tower(pixel_values=pictures.pixels).last_hidden_state[:, 1:]
        tower = tower_loss(self.heads(patches).float(), batch, pictures)
        if not talks:
            return {"tower": tower}
        image = self.model.model.multi_modal_projector(patches)
        hidden = [hidden_patches(pictures, self.args.kv_heads, batch.ids.shape[1]) for _ in range(self.args.layers)]
        watch = Watch.of(pictures, batch.talk)
        last, attention = decode(self.model, self.before, image, batch.ids, hidden=hidden, watch=watch)
        logits = self.model.lm_head(last[:, :-1]).float().flatten(0, 1)
        missing, bare = (self.args.attention_weight * attention).unbind()
        return {
            "answers": nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL),
            "missing": missing,
            "bare": bare,
            "tower": TOWER_WEIGHT * tower,
        }

    def _update(self, loss: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _report(self, gone: float, parts: dict[str, Tensor], *, talks: bool) -> None:
        now_s = time.monotonic()
        if now_s - self.reported_s > 10.0:
            pace = (self.num_steps - self.steps_reported) / (now_s - self.reported_s)
            said = ", ".join(f"{name} {part.item():.4f}" for name, part in parts.items())
            log.info("%3.0f %% step %d, %.1f steps/s: %s", 100 * gone, self.num_steps, pace, said)
            self.reported_s, self.steps_reported = now_s, self.num_steps
        if talks and now_s - self.scored_s > self.args.score_every_s:
            save_weights(self.args.out / "weights.safetensors", self.model)
            score = score_model(self.model, self.tokenizer, num_scenes=self.args.scenes)
            log.info("validation at step %d: %s", self.num_steps, score)
            self.scored_s = time.monotonic()
            self.reported_s += self.scored_s - now_s


def rate_share(gone: float) -> float:
    """Rise, stay, fall linearly to 1 % at the end of a stage."""
    return max(0.01, min(gone / WARM_UP_SHARE, (1.0 - gone) / DECAY_SHARE, 1.0))


def tower_loss(logits: Tensor, batch: Lesson, pictures: Pictures) -> Tensor:
    """Return the loss of saying of each patch whether it shows anything, and what, and in which cell."""
    colour, shape = (batch.cells[:, :, k].gather(1, pictures.cell.expand_as(pictures.shown)) for k in (0, 1))
    unsure = ~pictures.shown & ~pictures.bare
    anything = pictures.shown.long().masked_fill(unsure, IGNORED_LABEL)
    row, column = (part.expand_as(colour) for part in (pictures.cell // GRID_CELLS, pictures.cell % GRID_CELLS))
    named = [part.masked_fill(~pictures.shown, IGNORED_LABEL) for part in (colour, shape, row, column)]
    losses = [
        nn.functional.cross_entropy(part.flatten(0, 1), classes.flatten(), ignore_index=IGNORED_LABEL)
        for part, classes in zip(logits.split(PATCH_CLASSES, dim=-1), (anything, *named), strict=True)
    ]
    return torch.stack(losses).sum()


def hidden_patches(pictures: Pictures, num_kv_heads: int, num_queries: int) -> Tensor:
    """Draw which patches one layer hides from what follows the picture: (B, H, queries or 1, 576) bool.

    A share of 0 to 0.9 per picture, of nearly a third nothing; of every object one patch stays at least.
    """
    batch, device = pictures.shown.shape[0], pictures.shown.device
    share = torch.rand(batch, 1, 1, device=device) * MOST_HIDDEN
    share = share * (torch.rand(batch, 1, 1, device=device) > KEEP_ALL_SHARE)
    drawn = by_cell(torch.rand(batch, num_kv_heads, NUM_PATCHES, device=device))
    highest = drawn.masked_fill(~by_cell(pictures.shown)[:, None], -1.0).amax(dim=-1, keepdim=True)
    return of_cell((drawn < share[..., None]) & (drawn != highest))[:, :, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Where attention is to rest: `middles` (B, 576, 16) and `bare` (B, 576, 1), float, of keys; `talk` (B, T) bool."""

    middles: Tensor
    bare: Tensor
    talk: Tensor

    @classmethod
    def of(cls, pictures: Pictures, talk: Tensor) -> Watch:
        """Return what `pictures` and their conversations ask for."""
        cells = nn.functional.one_hot(pictures.cell, GRID_CELLS**2)
        middles = pictures.centres[:, :, None] * cells
        return cls(middles=middles.float(), bare=pictures.bare[:, :, None].float(), talk=talk)

    def loss(self, seen: Tensor, said: Tensor) -> Tensor:
        """Return what is missing on objects, in nats, and the attention on bare patches, (2,), of one layer.

        seen (B, H, 576, 576) of patches and said (B, H, T, 576) of text: attention on patches, mean over the query
        heads of a KV head.
        """
        there = self.middles.any(dim=1)  # (B, 16)
        last = torch.arange(NUM_PATCHES, device=there.device)[:, None] * self.middles
        passed = torch.arange(NUM_PATCHES, device=there.device)[:, None] > last.amax(dim=1)[:, None]
        of_patches = self._missing(seen, there[:, None] & passed)
        of_text = self._missing(said, there[:, None] & self.talk[:, :, None])
        bare = self.bare.to(seen.dtype)[:, None]
        on_bare = (seen @ bare).float().mean() + (said @ bare).float().mean()
        return torch.stack((of_patches + of_text, on_bare))

    def _missing(self, attention: Tensor, wanted: Tensor) -> Tensor:
        """How far, in nats, the middles are from the attention wanted; wanted (B, Q, 16) bool."""
        mass = (attention @ self.middles.to(attention.dtype)[:, None]).float()
        short = (math.log(WANTED_MASS) - torch.log(mass + SMALL_MASS)).clamp(min=0.0)
        return (short * wanted[:, None]).sum() / (wanted.sum().clamp(min=1) * attention.shape[1])


def decode(
    model: LlavaForConditionalGeneration,
    before: Tensor,
    image: Tensor,
    ids: Tensor,
    *,
    hidden: Sequence[Tensor | None],
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the decoder; return the states (B, T, D) of the text after the picture, and what `watch` says of attention.

    The same numbers as the model's own forward, written out for its attention. before (P,) ids; image (B, 576, D); ids
    (B, T). hidden, per layer: (B, H, 1, 576) patches, or (B, H, T, P + 576 + T) of everything, that text does not see.
    """
    llama = model.model.language_model
    embed = model.get_input_embeddings()
    batch, start = ids.shape[0], len(before) + image.shape[1]
    state = torch.cat((embed(before).expand(batch, -1, -1), image.to(embed.weight.dtype), embed(ids)), dim=1)
    places = torch.arange(state.shape[1], device=ids.device)[None]
    cosines, sines = llama.rotary_emb(state, places)
    late = places[0, :, None] < places  # (T, T), True where a key comes after its query
    total = torch.zeros(2, device=ids.device)
    for layer, gone in zip(llama.layers, hidden, strict=True):
        block, normed = layer.self_attn, layer.input_layernorm(state)
        size = block.head_dim
        query, keys, values = (
            part(normed).unflatten(-1, (-1, size)).transpose(1, 2)
            for part in (block.q_proj, block.k_proj, block.v_proj)
        )
        query, keys = (_turned(part, cosines, sines).to(values.dtype) for part in (query, keys))
        query = (query * size**-0.5).unflatten(1, (keys.shape[1], -1))  # (B, H, G, T, size)
        keys, values = keys[:, :, None], values[:, :, None]
        masks = [late[:start, :start], late[start:]]
        if gone is not None:
            if gone.shape[-1] == image.shape[1]:
                gone = nn.functional.pad(gone, (len(before), ids.shape[1]))
            masks[1] = (masks[1] | gone)[:, :, None]
        outputs, rests = [], []
        for part, (first, end), mask in zip(
            ("seen", "said"), ((0, start), (start, state.shape[1])), masks, strict=True
        ):
            scores = query[:, :, :, first:end] @ keys[:, :, :, :end].transpose(-1, -2)
            probs = scores.float().masked_fill_(mask, -torch.inf).softmax(dim=-1).to(values.dtype)
            outputs.append(probs @ values[:, :, :, :end])
            rows = slice(len(before), None) if part == "seen" else slice(None)
            if watch is not None:
                rests.append(probs[:, :, :, rows, len(before) : start].mean(dim=2))
        if watch is not None:
            total = total + watch.loss(*rests) / len(hidden)
        mixed = torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2).flatten(2)
        state = state + block.o_proj(mixed)
        state = state + layer.mlp(layer.post_attention_layernorm(state))
    return llama.norm(state[:, start:]), total


def _turned(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions: states (B, H, T, D) by tables (1, T, D)."""
    half = states.shape[-1] // 2
    swapped = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * cosines[:, None] + swapped * sines[:, None]


@torch.no_grad()
def score_model(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_scenes: int,
    split: str = "validation",
) -> dict[str, float]:
    """Return objects recalled and questions answered, greedy, with all tokens and with a random part of them."""
    scenes = [scene_at(split, index) for index in range(num_scenes)]
    score: dict[str, float] = {"num_scenes": num_scenes}
    for name, kept in (("full", 1.0), ("random_50", 0.5), ("random_20", 0.2)):
        texts = answers(model, tokenizer, scenes, [describe_prompt(scene) for scene in scenes], kept_share=kept)
        found = sum(len(parse_objects(text) & set(scene.objects)) for scene, text in zip(scenes, texts, strict=True))
        stated = sum(len(parse_objects(text)) for text in texts)
        true = sum(len(scene.objects) for scene in scenes)
        score[f"{name}_recall"] = round(found / true, 4)
        score[f"{name}_precision"] = round(found / max(stated, 1), 4)
        turns = [follow_up_turns(scene, 1)[0] for scene in scenes]
        texts = answers(model, tokenizer, scenes, [turn.question for turn in turns], kept_share=kept)
        right = sum(text == turn.answer for text, turn in zip(texts, turns, strict=True))
        score[f"{name}_answers"] = round(right / num_scenes, 4)
    return score


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[Scene],
    questions: Sequence[str],
    *,
    kept_share: float,
    batch_size: int = 64,
) -> list[str]:
    """Return greedy answers. `kept_share` < 1: as the policy `random` of that budget would leave the cache.

    The whole text is run again for every token, which needs no cache: what a random subset without memory holds at
    each step is a mask.
    """
    found: list[str] = []
    words, device = Words(tokenizer), model.device
    painter = Painter().to(device)
    before = torch.tensor(words.before_picture(), device=device)
    for first in range(0, len(scenes), batch_size):
        part = scenes[first : first + batch_size]
        batch = lesson_of(part, words).to(device)
        pixels = painter(batch.cells, batch.background).pixels
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            patches = model.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
            image = model.model.multi_modal_projector(patches)
            prompts = [words.ids(f"\n{question} ASSISTANT:") for question in questions[first : first + batch_size]]
            length = torch.tensor([len(prompt) for prompt in prompts], device=device)
            width = max(map(len, prompts)) + MOST_ANSWER_TOKENS
            pad = [tokenizer.pad_token_id] * width
            ids = torch.tensor([(prompt + pad)[:width] for prompt in prompts], device=device)
            config = model.config.text_config
            hidden = [
                random_part(length, len(before) + NUM_PATCHES, width, kept_share, config.num_key_value_heads)
                for _ in range(config.num_hidden_layers)
            ]
            rows = torch.arange(len(part), device=device)
            over = torch.zeros_like(length, dtype=torch.bool)
            for step in range(MOST_ANSWER_TOKENS):
                last, _ = decode(model, before, image, ids, hidden=hidden)
                token = model.lm_head(last[rows, length + step - 1]).argmax(dim=-1)
                over |= token == tokenizer.eos_token_id
                ids[rows, length + step] = torch.where(over, tokenizer.eos_token_id, token)
                if bool(over.all()):
                    break
        said = [row[start:].tolist() for row, start in zip(ids, length.tolist(), strict=True)]
        found += [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    return found


def random_part(length: Tensor, num_before: int, width: int, kept_share: float, num_kv_heads: int) -> Tensor | None:
    """Return what the text after the picture does not see, (B, H, width, num_before + width) bool; None: sees all.

    Prompts see everything. The answer token at place i sees itself and of the i tokens before it the share that have
    the highest of fixed random priorities.
    """
    if kept_share >= 1.0:
        return None
    total = num_before + width
    place = torch.arange(num_before, total, device=length.device)
    priority = torch.rand(len(length), num_kv_heads, total, device=length.device)
    earlier = torch.arange(total, device=length.device)[None] < place[:, None]  # (width, total)
    ranked = priority[:, :, None].masked_fill(~earlier, -1.0).sort(dim=-1, descending=True).values
    kept = (kept_share * place).floor().long().clamp(min=1)
    lowest = ranked.gather(-1, (kept - 1)[None, None, :, None].expand(*ranked.shape[:2], -1, 1))
    in_answer = torch.arange(width, device=length.device)[None] >= length[:, None]
    return (priority[:, :, None] < lowest) & earlier & in_answer[:, None, :, None]


def save_weights(path: Path, model: LlavaForConditionalGeneration) -> None:
    """Write the weights as they are, published by one rename."""
    with replacing(path) as partial:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial)


if __name__ == "__main__":
    main()
