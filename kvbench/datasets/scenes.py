"""Procedural scenes: what is in a picture, decided by code from a seed.

A scene is a 4 x 4 grid with at most one object per cell. Everything about it follows from
(split, index), so a data set of any size needs no file, and train and test never share a seed.
The truth is known exactly, which allows a score that no text-overlap metric gives: how many
objects an answer still recalls after the cache was cut.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GRID_CELLS = 4
CELL_PIXELS = 36
IMAGE_PIXELS = GRID_CELLS * CELL_PIXELS
MIN_OBJECTS = 4
MAX_OBJECTS = 8

SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SPLITS = ("train", "test")
SCENES_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class SceneObject:
    """One drawn object; row and column count from 0 at the top left."""

    row: int
    column: int
    size: str
    texture: str
    colour: str
    shape: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture's truth: its objects in reading order, and the seed of everything drawn."""

    name: str
    objects: tuple[SceneObject, ...]


def scene_at(split: str, index: int) -> Scene:
    """Return scene `index` of `split`; the same arguments give the same scene for ever.

    Raises: ValueError for an unknown split or a negative index.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(f"scene ({split!r}, {index}) does not exist; split is one of {SPLITS}, index >= 0")
    name = f"scenes-v{SCENES_VERSION}/{split}/{index}"
    rng = random.Random(name)
    cells = rng.sample(range(GRID_CELLS**2), rng.randint(MIN_OBJECTS, MAX_OBJECTS))
    looks = _distinct_looks(rng, len(cells))
    objects = tuple(
        SceneObject(row=cell // GRID_CELLS, column=cell % GRID_CELLS, size=s, texture=t, colour=c, shape=f)
        for cell, (s, t, c, f) in zip(sorted(cells), looks, strict=True)
    )
    return Scene(name=name, objects=objects)


def _distinct_looks(rng: random.Random, count: int) -> list[tuple[str, str, str, str]]:
    """Draw looks that are unique within a scene, so that "where is the ...?" has one answer."""
    looks: dict[tuple[str, str, str, str], None] = {}
    while len(looks) < count:
        looks[(rng.choice(SIZES), rng.choice(TEXTURES), rng.choice(COLOURS), rng.choice(SHAPES))] = None
    return list(looks)
