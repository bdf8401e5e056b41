"""Autopsies that look like those of a run, made from a seed: a 4 x 4 picture, three words before it and four after."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kvbench.results.files import pack
from kvbench.results.record import AUTOPSY_FILE, AUTOPSY_SCHEMA, NEVER, write_autopsy

LAYERS, HEADS, GRID, STEPS = 3, 2, 4, 12
WORDS = ["<s>", "USER", ":"], [" What", " is", " this", "?"]
PROMPT = len(WORDS[0]) + GRID**2 + len(WORDS[1])


def freed_array(seed: int, *, kept: float = 0.4) -> Any:
    """(L, H, N): part of the prompt never held, part of it freed at a step of the answer."""
    draw = np.random.default_rng(seed)
    freed = np.full((LAYERS, HEADS, PROMPT + STEPS), NEVER, dtype=np.uint16)
    freed[..., :PROMPT][draw.random((LAYERS, HEADS, PROMPT)) > kept] = 0
    late = (freed == NEVER) & (draw.random(freed.shape) < 0.3)
    steps = draw.integers(1, STEPS + 1, freed.shape).astype(np.uint16)
    arrived = np.arange(PROMPT + STEPS) - PROMPT + 1
    freed[late & (steps > arrived)] = steps[late & (steps > arrived)]
    return freed


def merged_array(seed: int) -> Any:
    """(L, H, P): what a third of the prompt joined, any other token of it."""
    draw = np.random.default_rng(seed)
    merged = np.full((LAYERS, HEADS, PROMPT), NEVER, dtype=np.uint16)
    other = (np.arange(PROMPT) + draw.integers(1, PROMPT, merged.shape)) % PROMPT
    chosen = draw.random(merged.shape) < 0.33
    merged[chosen] = other[chosen]
    return merged


def autopsy_body(
    key: str, *, seed: int = 0, ids: tuple[str, ...] = ("scenes/test/0",), **fields: Any
) -> dict[str, Any]:
    """Return the body of an autopsy; `fields` replace those of every sample."""
    return {
        "schema": AUTOPSY_SCHEMA,
        "key": key,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "samples": [sample_body(name, seed + number) | fields for number, name in enumerate(ids)],
        "left_out": [],
    }


def sample_body(name: str, seed: int) -> dict[str, Any]:
    freed = freed_array(seed)
    checkpoints = [0, STEPS // 2, STEPS]
    images = slice(len(WORDS[0]), len(WORDS[0]) + GRID**2)
    held = np.stack([(freed > step) & (np.arange(PROMPT + STEPS) < PROMPT + step) for step in checkpoints])
    share = 1000 * held[..., images].mean(axis=-1)
    kinds = np.array([0] * len(WORDS[0]) + [1] * GRID**2 + [0] * len(WORDS[1]) + [3] * STEPS, dtype=np.uint8)
    places = np.stack(np.divmod(np.arange(GRID**2), GRID), axis=-1)
    return {
        "id": name,
        "prompt_tokens": PROMPT,
        "steps": STEPS,
        "answer": " ".join(f"word{index}" for index in range(STEPS)),
        "tokens": [*WORDS[0], *[""] * GRID**2, *WORDS[1], *(f" word{index}" for index in range(STEPS))],
        "kinds": pack(kinds),
        "picture": {
            "media": "image/png",
            "data": base64.b64encode(_drawn()).decode(),
            "width": 64,
            "height": 64,
            "rows": GRID,
            "columns": GRID,
            "places": pack(places.astype(np.uint16)),
        },
        "layers": list(range(LAYERS)),
        "coarse": False,
        "freed": patterns(freed),
        "merged": None,
        "checkpoints": checkpoints,
        "statistics": {
            "entries": pack(held.sum(axis=-1).astype(np.uint16)),
            "image_kept_permille": pack(share.round().astype(np.uint16)),
            "mean_age_tokens": pack(np.full(share.shape, 7, dtype=np.uint16)),
            "attention_permille": pack(share.round().astype(np.uint16)),
        },
        "attention": pack(np.full((LAYERS, PROMPT), 128, dtype=np.uint8)),
    }


def patterns(rows: Any) -> dict[str, Any]:
    """Return rows (L, H, N) as stored, without sharing."""
    flat = rows.reshape(-1, rows.shape[-1])
    return {"patterns": pack(flat), "of": np.arange(len(flat)).reshape(rows.shape[:2]).tolist()}


def add_autopsies(folder: Path, **fields: Any) -> list[Path]:
    """Put an autopsy beside every record below `folder`, each with a seed of its own."""
    import json

    paths = []
    for number, record in enumerate(sorted((folder / "cells").glob("*/record.json"))):
        body = json.loads(record.read_text())["body"]
        path = record.with_name(AUTOPSY_FILE)
        write_autopsy(path, autopsy_body(body["key"], seed=10 * number, **fields))
        paths.append(path)
    return paths


def _drawn() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
