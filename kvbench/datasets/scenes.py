"""Procedural scenes: what is in a picture, decided by code from a seed.

A scene is a 4 x 4 grid with at most one object per cell. Everything about it follows from
(split, index), so a data set of any size needs no file, and train and test never share a seed.
The truth is known exactly, which allows a score that no text-overlap metric gives: how many
objects an answer still recalls after the cache was cut.

Draw a scene as an RGB picture of 144 x 144 pixels.

Every random choice (background, jitter, noise) comes from the scene's name through Python's own
generator, whose stream is stable over versions; numpy's is not promised to be.

What is said about a scene: descriptions, follow-up questions, and reading objects back.

One fixed grammar, so that an answer can be parsed: a description names every object with its
cell and its four attributes, and `parse_objects` finds them again in generated text.

The data set `scenes`: procedural pictures with descriptions, or with follow-up questions.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from kvbench.datasets.base import Example, Turn
from kvbench.errors import ConfigError, close_matches

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


_SCALE = 2  # drawn larger and averaged down: smooth edges
_RADIUS = {"small": 8, "large": 14}
_RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
_BACKGROUNDS = ((24, 24, 28), (44, 40, 36), (34, 46, 54), (58, 58, 58))
_NOISE_LEVELS = 17


def draw_scene(scene: Scene) -> Image.Image:
    """Return the picture of `scene`, mode RGB, 144 x 144 pixels."""
    rng = random.Random(scene.name + "/drawing")
    canvas = Image.new("RGB", (IMAGE_PIXELS * _SCALE,) * 2, rng.choice(_BACKGROUNDS))
    for item in scene.objects:
        _draw_object(canvas, item, _centre(item, rng))
    small = canvas.resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.BOX)
    return _with_noise(small, rng)


def object_centres(scene: Scene) -> list[tuple[int, int]]:
    """Return where each object is drawn, as pixels (x, y) of the picture."""
    rng = random.Random(scene.name + "/drawing")
    rng.choice(_BACKGROUNDS)
    return [_centre(item, rng) for item in scene.objects]


def _centre(item: SceneObject, rng: random.Random) -> tuple[int, int]:
    slack = CELL_PIXELS // 2 - _RADIUS[item.size] - 1
    x, y = (cell * CELL_PIXELS + CELL_PIXELS // 2 + rng.randint(-slack, slack) for cell in (item.column, item.row))
    return x, y


def _draw_object(canvas: Image.Image, item: SceneObject, centre: tuple[int, int]) -> None:
    radius = _RADIUS[item.size]
    reach = (radius + 1) * _SCALE
    left, top = (pixel * _SCALE - reach for pixel in centre)
    mask = Image.new("L", (2 * reach, 2 * reach), 0)
    _draw_shape(ImageDraw.Draw(mask), item.shape, reach, reach, radius * _SCALE)
    if item.texture != "plain":
        mask = ImageChops.multiply(mask, _texture(item.texture, reach))
    canvas.paste(_RGB[item.colour], (left, top), mask)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "ring":
        draw.ellipse(box, fill=255)
        draw.ellipse((x - r // 2, y - r // 2, x + r // 2, y + r // 2), fill=0)
    elif shape == "cross":
        draw.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=255)
        draw.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=255)
    else:
        draw.polygon(_polygon(shape, x, y, r), fill=255)


def _polygon(shape: str, x: int, y: int, r: int) -> list[tuple[float, float]]:
    corners = {"square": (4, 45.0), "diamond": (4, 0.0), "triangle": (3, 30.0)}
    number, turn_degrees = corners[shape]
    angles = (math.radians(turn_degrees + 360 * k / number) for k in range(number))
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]


@cache
def _texture(name: str, reach: int) -> Image.Image:
    """Stripes or dots in pixels of the large canvas, fixed to the object's centre."""
    x = np.arange(2 * reach)[None, :] - reach
    y = np.arange(2 * reach)[:, None] - reach
    solid = (x + y) % 10 < 6 if name == "striped" else (x % 10 - 5) ** 2 + (y % 10 - 5) ** 2 > 8
    return Image.fromarray(np.where(solid, 255, 60).astype(np.uint8))


def _with_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    pixels = np.asarray(image, dtype=np.int16)
    noise = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).reshape(pixels.shape)
    noisy = pixels + noise % _NOISE_LEVELS - _NOISE_LEVELS // 2
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
DESCRIBE_PROMPTS = (
    "Describe the scene.",
    "Describe every object in the picture.",
    "What does the picture show?",
)
_OBJECT_PATTERN = re.compile(
    rf"row ({'|'.join(NUMBERS)}), column ({'|'.join(NUMBERS)}), there is a "
    rf"({'|'.join(SIZES)}) ({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
)


def describe(scene: Scene) -> str:
    """Return the full description: the number of objects, then each in reading order."""
    sentences = [f"In {_cell(item)}, there is {_look(item)}." for item in scene.objects]
    return f"There are {NUMBERS[len(scene.objects)]} objects. " + " ".join(sentences)


def describe_prompt(scene: Scene) -> str:
    """Return one of the ways to ask for a description, fixed by the scene."""
    return random.Random(scene.name + "/prompt").choice(DESCRIBE_PROMPTS)


def follow_up_turns(scene: Scene, count: int) -> list[Turn]:
    """Return `count` follow-up questions: look a cell up, find an object, count a colour."""
    rng = random.Random(scene.name + "/follow-up")
    kinds = (_ask_cell, _ask_where, _ask_count)
    return [kinds[rng.choice((0, 0, 1, 1, 2))](scene, rng) for _ in range(count)]


def parse_objects(text: str) -> frozenset[SceneObject]:
    """Return every object that `text` states in the grammar of `describe`."""
    return frozenset(
        SceneObject(row=NUMBERS.index(row) - 1, column=NUMBERS.index(column) - 1, size=s, texture=t, colour=c, shape=f)
        for row, column, s, t, c, f in _OBJECT_PATTERN.findall(text)
    )


def _cell(item: SceneObject) -> str:
    return f"row {NUMBERS[item.row + 1]}, column {NUMBERS[item.column + 1]}"


def _look(item: SceneObject) -> str:
    return f"a {item.size} {item.texture} {item.colour} {item.shape}"


def _ask_cell(scene: Scene, rng: random.Random) -> Turn:
    """Three quarters of the questions ask about an occupied cell, the others about any cell."""
    by_cell = {(item.row, item.column): item for item in scene.objects}
    cell = rng.choice(list(by_cell)) if rng.random() < 0.75 else tuple(rng.choices(range(GRID_CELLS), k=2))
    found = by_cell.get((cell[0], cell[1]))
    answer = f"There is {_look(found)}." if found else "There is nothing."
    return Turn(question=f"What is in row {NUMBERS[cell[0] + 1]}, column {NUMBERS[cell[1] + 1]}?", answer=answer)


def _ask_where(scene: Scene, rng: random.Random) -> Turn:
    item = rng.choice(scene.objects)
    return Turn(question=f"Where is the {_look(item).removeprefix('a ')}?", answer=f"In {_cell(item)}.")


def _ask_count(scene: Scene, rng: random.Random) -> Turn:
    colour = rng.choice(COLOURS)
    number = sum(item.colour == colour for item in scene.objects)
    return Turn(question=f"How many {colour} objects are there?", answer=f"{NUMBERS[number].capitalize()}.")


_ASK = ("describe", "follow_up")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """`num_samples` scenes of `split`, from scene `first` on; any number exists.

    ask: `describe` gives one example per scene, `follow_up` one per follow-up question (they share
    the scene as cluster). num_follow_ups: questions per scene. Raises: ConfigError.
    """

    num_samples: int = 32
    split: str = "test"
    first: int = 0
    ask: Literal["describe", "follow_up"] = "describe"
    num_follow_ups: int = 3

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"dataset.split is {self.split!r}; {close_matches(self.split, SPLITS)}")
        if self.ask not in _ASK:
            raise ConfigError(f"dataset.ask is {self.ask!r}; {close_matches(str(self.ask), _ASK)}")
        if self.num_samples < 1 or self.first < 0 or self.num_follow_ups < 1:
            raise ConfigError(
                f"dataset has num_samples={self.num_samples}, first={self.first}, "
                f"num_follow_ups={self.num_follow_ups}; allowed: >= 1, >= 0, >= 1"
            )

    @property
    def fingerprint(self) -> str:
        """The version of the generator; everything else is in the settings."""
        return f"scenes-v{SCENES_VERSION}"

    def examples(self) -> Sequence[Example]:
        """Return the examples; pictures are drawn when asked for."""
        scenes = [scene_at(self.split, self.first + k) for k in range(self.num_samples)]
        if self.ask == "describe":
            return [self._description(scene) for scene in scenes]
        return [example for scene in scenes for example in self._questions(scene)]

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the objects that `text` states."""
        return frozenset(parse_objects(text))

    def _description(self, scene: Scene) -> Example:
        return Example(
            id=scene.name,
            cluster=scene.name,
            question=describe_prompt(scene),
            reference=describe(scene),
            load_image=partial(draw_scene, scene),
            facts=frozenset(scene.objects),
            follow_ups=tuple(follow_up_turns(scene, self.num_follow_ups)),
        )

    def _questions(self, scene: Scene) -> list[Example]:
        return [
            Example(
                id=f"{scene.name}/{number}",
                cluster=scene.name,
                question=turn.question,
                reference=turn.answer,
                load_image=partial(draw_scene, scene),
            )
            for number, turn in enumerate(follow_up_turns(scene, self.num_follow_ups))
        ]
