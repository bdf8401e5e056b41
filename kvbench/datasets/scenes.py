"""The data set `scenes`: procedural pictures, decided by code from a seed, with descriptions or follow-up questions.

A scene is a 4 x 4 grid with at most one object per cell. Everything about it follows from
(split, index), so a data set of any size needs no file, and train and test never share a seed.
The truth is known exactly, which allows a score that no text-overlap metric gives: how many
objects an answer still recalls after the cache was cut.

Every random choice (background, jitter, noise) comes from the scene's name through Python's own
generator, whose stream is stable over versions; numpy's is not promised to be. What is said follows one fixed
grammar: a description names every object with its cell and its four attributes, and `parse_objects` finds them again
in generated text.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from kvbench.datasets.base import MOST_MADE, Example, Turn
from kvbench.errors import ConfigError, close_matches

GRID_CELLS = 4
CELL_PIXELS = 36
IMAGE_PIXELS = GRID_CELLS * CELL_PIXELS
MIN_OBJECTS = 4
MAX_OBJECTS = 8

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
_SCALE = 2  # drawn larger and averaged down: smooth edges
_NOISE_LEVELS = 17

SIZES = tuple(_RADIUS)
TEXTURES = ("plain", "striped", "dotted")
COLOURS = tuple(_RGB)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
SPLITS = ("train", "test")
SCENES_VERSION = 1
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
_ASK = ("describe", "follow_up")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class SceneObject:
    """One drawn object; row and column count from 0 at the top left."""

    row: int
    column: int
    size: str
    texture: str
    colour: str
    shape: str

    @property
    def cell(self) -> str:
        """Where it is, in words."""
        return f"row {NUMBERS[self.row + 1]}, column {NUMBERS[self.column + 1]}"

    @property
    def look(self) -> str:
        """What it is, in words."""
        return f"{self.size} {self.texture} {self.colour} {self.shape}"


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
    looks: dict[tuple[str, str, str, str], None] = {}  # unique, so that "where is the ...?" has one answer
    while len(looks) < len(cells):
        looks[(rng.choice(SIZES), rng.choice(TEXTURES), rng.choice(COLOURS), rng.choice(SHAPES))] = None
    objects = tuple(
        SceneObject(row=cell // GRID_CELLS, column=cell % GRID_CELLS, size=s, texture=t, colour=c, shape=f)
        for cell, (s, t, c, f) in zip(sorted(cells), looks, strict=True)
    )
    return Scene(name=name, objects=objects)


def draw_scene(scene: Scene) -> Image.Image:
    """Return the picture of `scene`, mode RGB, 144 x 144 pixels."""
    rng = random.Random(scene.name + "/drawing")
    canvas = Image.new("RGB", (IMAGE_PIXELS * _SCALE,) * 2, rng.choice(_BACKGROUNDS))
    for item in scene.objects:
        radius = _RADIUS[item.size]
        reach = (radius + 1) * _SCALE
        left, top = (pixel * _SCALE - reach for pixel in _centre(item, rng))
        mask = Image.new("L", (2 * reach, 2 * reach), 0)
        _draw_shape(ImageDraw.Draw(mask), item.shape, reach, radius * _SCALE)
        if item.texture != "plain":
            mask = ImageChops.multiply(mask, _texture(item.texture, reach))
        canvas.paste(_RGB[item.colour], (left, top), mask)
    pixels = np.asarray(canvas.resize((IMAGE_PIXELS,) * 2, Image.Resampling.BOX), dtype=np.int16)
    noise = np.frombuffer(rng.randbytes(pixels.size), dtype=np.uint8).reshape(pixels.shape)
    noisy = pixels + noise % _NOISE_LEVELS - _NOISE_LEVELS // 2
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def object_centres(scene: Scene) -> list[tuple[int, int]]:
    """Return where each object is drawn, as pixels (x, y) of the picture."""
    rng = random.Random(scene.name + "/drawing")
    rng.choice(_BACKGROUNDS)
    return [_centre(item, rng) for item in scene.objects]


def _centre(item: SceneObject, rng: random.Random) -> tuple[int, int]:
    slack = CELL_PIXELS // 2 - _RADIUS[item.size] - 1
    x, y = (cell * CELL_PIXELS + CELL_PIXELS // 2 + rng.randint(-slack, slack) for cell in (item.column, item.row))
    return x, y


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, at: int, r: int) -> None:
    def box(across: int, down: int) -> tuple[int, int, int, int]:
        return (at - across, at - down, at + across, at + down)

    if shape in ("circle", "ring"):
        draw.ellipse(box(r, r), fill=255)
        if shape == "ring":
            draw.ellipse(box(r // 2, r // 2), fill=0)
    elif shape == "cross":
        draw.rectangle(box(r, r // 3), fill=255)
        draw.rectangle(box(r // 3, r), fill=255)
    else:
        number, turn_degrees = {"square": (4, 45.0), "diamond": (4, 0.0), "triangle": (3, 30.0)}[shape]
        angles = [math.radians(turn_degrees + 360 * k / number) for k in range(number)]
        draw.polygon([(at + r * math.cos(a), at + r * math.sin(a)) for a in angles], fill=255)


@cache
def _texture(name: str, reach: int) -> Image.Image:
    """Stripes or dots in pixels of the large canvas, fixed to the object's centre."""
    x = np.arange(2 * reach)[None, :] - reach
    y = np.arange(2 * reach)[:, None] - reach
    solid = (x + y) % 10 < 6 if name == "striped" else (x % 10 - 5) ** 2 + (y % 10 - 5) ** 2 > 8
    return Image.fromarray(np.where(solid, 255, 60).astype(np.uint8))


def describe(scene: Scene) -> str:
    """Return the full description: the number of objects, then each in reading order."""
    sentences = [f"In {item.cell}, there is a {item.look}." for item in scene.objects]
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


def _ask_cell(scene: Scene, rng: random.Random) -> Turn:
    """Three quarters of the questions ask about an occupied cell, the others about any cell."""
    by_cell = {(item.row, item.column): item for item in scene.objects}
    cell = rng.choice(list(by_cell)) if rng.random() < 0.75 else tuple(rng.choices(range(GRID_CELLS), k=2))
    found = by_cell.get((cell[0], cell[1]))
    answer = f"There is a {found.look}." if found else "There is nothing."
    return Turn(question=f"What is in row {NUMBERS[cell[0] + 1]}, column {NUMBERS[cell[1] + 1]}?", answer=answer)


def _ask_where(scene: Scene, rng: random.Random) -> Turn:
    item = rng.choice(scene.objects)
    return Turn(question=f"Where is the {item.look}?", answer=f"In {item.cell}.")


def _ask_count(scene: Scene, rng: random.Random) -> Turn:
    colour = rng.choice(COLOURS)
    number = sum(item.colour == colour for item in scene.objects)
    return Turn(question=f"How many {colour} objects are there?", answer=f"{NUMBERS[number].capitalize()}.")


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
        if not 1 <= self.num_samples <= MOST_MADE or self.first < 0 or not 1 <= self.num_follow_ups <= MOST_MADE:
            raise ConfigError(
                f"dataset has num_samples={self.num_samples}, first={self.first}, "
                f"num_follow_ups={self.num_follow_ups}; allowed: 1 to {MOST_MADE}, >= 0, 1 to {MOST_MADE}"
            )

    @property
    def fingerprint(self) -> str:
        """The version of the generator; everything else is in the settings."""
        return f"scenes-v{SCENES_VERSION}"

    def examples(self) -> Sequence[Example]:
        """Return the examples; pictures are drawn when asked for."""
        scenes = [scene_at(self.split, self.first + k) for k in range(self.num_samples)]
        if self.ask == "follow_up":
            return [example for scene in scenes for example in self._questions(scene)]
        return [
            Example(
                id=scene.name,
                cluster=scene.name,
                question=describe_prompt(scene),
                reference=describe(scene),
                load_image=partial(draw_scene, scene),
                facts=frozenset(scene.objects),
                follow_ups=tuple(follow_up_turns(scene, self.num_follow_ups)),
            )
            for scene in scenes
        ]

    def _questions(self, scene: Scene) -> Iterator[Example]:
        for number, turn in enumerate(follow_up_turns(scene, self.num_follow_ups)):
            yield Example(
                id=f"{scene.name}/{number}",
                cluster=scene.name,
                question=turn.question,
                reference=turn.answer,
                load_image=partial(draw_scene, scene),
            )

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the objects that `text` states."""
        return frozenset(parse_objects(text))
