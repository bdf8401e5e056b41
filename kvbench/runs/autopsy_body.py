"""From a replay to what is stored: patterns of eviction, and numbers per layer and head at a few steps."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from kvbench.models.inputs import answer_text
from kvbench.models.loader import LoadedModel
from kvbench.models.token_pieces import token_pieces
from kvbench.results.files import Array, pack
from kvbench.results.record import GENERATED, NEVER
from kvbench.runs.autopsy_replay import Replayed
from kvbench.runs.autopsy_subject import Subject

NUM_CHECKPOINTS, FEW_CHECKPOINTS = 9, 5  # after the prompt, and at steps of the answer up to its end
MANY_HEADS = 256  # over all layers; then numbers are stored at few moments
_MOST_BYTES = 22_000  # of one sample's patterns, compressed


def sample_body(loaded: LoadedModel, subject: Subject, row: Replayed, attention: Array) -> dict[str, Any]:
    """Return one sample as JSON holds it. attention (L, H, N): see `full_attention`."""
    prompt = len(subject.pieces)
    tokens = prompt + row.steps
    freed = np.where(row.freed < 0, NEVER, row.freed)[..., :tokens].astype(np.uint16)
    checkpoints = _checkpoints(row.steps, FEW_CHECKPOINTS if freed[..., 0].size > MANY_HEADS else NUM_CHECKPOINTS)
    layers, shown = stored_layers(freed), freed
    coarse = len(layers) < len(freed)
    if coarse:  # more layers fit when departures are known at the stored moments only
        shown = coarsened(freed, checkpoints)
        layers = stored_layers(shown)
    kinds = np.concatenate((subject.kinds, np.full(row.steps, GENERATED, dtype=np.uint8)))
    body = {
        "id": subject.example.id,
        "prompt_tokens": prompt,
        "steps": row.steps,
        "answer": answer_text(loaded, row.answer),
        "tokens": [*subject.pieces, *token_pieces(loaded, row.answer[: row.steps])],
        "kinds": pack(kinds),
        "picture": subject.picture,
        "layers": layers,
        "coarse": coarse,
        "freed": _patterns(shown[layers]),
        "merged": None,
        "checkpoints": checkpoints,
        "statistics": _statistics(freed, subject, checkpoints, attention[..., :prompt]),
        "attention": pack(_levels(attention[layers, :, :prompt].mean(axis=1))),
    }
    if row.merged is not None:
        merged = np.where(row.merged < 0, NEVER, row.merged)[..., :prompt].astype(np.uint16)
        body["merged"] = _patterns(merged[layers])
    return body


def _checkpoints(steps: int, count: int) -> list[int]:
    return sorted({round(index * steps / (count - 1)) for index in range(count)})


def coarsened(freed: Array, checkpoints: list[int]) -> Array:
    """Return `freed` with every step of the answer moved to the next of `checkpoints`, at which it is still right."""
    moments = np.array([*checkpoints, NEVER], dtype=np.uint16)
    rounded: Array = moments[np.searchsorted(moments, freed)]
    return rounded


def held_at(freed: Array, step: int, prompt_tokens: int) -> Array:
    """(L, H, N) bool: what the cache holds after `step` tokens of the answer; freed as it is stored."""
    arrived = np.arange(freed.shape[-1]) < prompt_tokens + step
    held: Array = (freed > step) & arrived
    return held


def stored_layers(freed: Array) -> list[int]:
    """Return the layers whose patterns are stored: all, or as many as fit, spread evenly, first and last among them."""
    sizes = [len(zlib.compress(np.unique(layer, axis=0).tobytes())) for layer in freed]
    count = len(freed)
    while True:
        layers = sorted({round(index * (len(freed) - 1) / max(1, count - 1)) for index in range(count)})
        if count <= 2 or sum(sizes[layer] for layer in layers) <= _MOST_BYTES:
            return layers
        count -= 1


def _patterns(rows: Array) -> dict[str, Any]:
    """Store every different row of (L, H, N) once, and for each layer and head which one it is."""
    flat = rows.reshape(-1, rows.shape[-1])
    different = {row.tobytes(): row for row in flat}
    number = {name: index for index, name in enumerate(different)}
    of = [[number[head.tobytes()] for head in layer] for layer in rows]
    return {"patterns": pack(np.stack(list(different.values()))), "of": of}


def _statistics(freed: Array, subject: Subject, checkpoints: list[int], attention: Array) -> dict[str, Any]:
    """Whole numbers (checkpoints, L, H), all layers: shares in thousandths, ages in tokens."""
    prompt, image = len(subject.pieces), subject.is_image
    whole = np.maximum(attention.sum(axis=-1), 1e-30)
    place = np.arange(freed.shape[-1])
    found: dict[str, list[Array]] = {"entries": [], "mean_age_tokens": [], "attention_permille": []}
    found |= {"image_kept_permille": []} if image.any() else {}
    for step in checkpoints:
        held = held_at(freed, step, prompt)
        entries = held.sum(axis=-1)
        ages = (held * (prompt + step - 1 - place)).sum(axis=-1) / np.maximum(entries, 1)
        found["entries"].append(entries)
        found["mean_age_tokens"].append(ages)
        found["attention_permille"].append(1000 * (attention * held[..., :prompt]).sum(axis=-1) / whole)
        if image.any():
            found["image_kept_permille"].append(1000 * held[..., :prompt][..., image].mean(axis=-1))
    return {name: pack(np.stack(values).round().astype(np.uint16)) for name, values in found.items()}


def _levels(shares: Array) -> Array:
    """(L, P) uint8, 255 for the most attended token of a layer."""
    most = np.maximum(shares.max(axis=-1, keepdims=True), 1e-30)
    levels: Array = (255 * shares / most).round().astype(np.uint8)
    return levels
