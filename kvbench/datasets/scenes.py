"""Procedural pictures whose truth is known exactly: scenes drawn from a seed, with text about them.

A scene is 3 to 6 objects on a 4 x 4 grid. A picture is 144 x 144 pixels; an object covers 8 to 32 of its 576 patches
of 6 x 6 pixels, so that most patches show nothing and no object hangs on one patch. Everything is drawn from
`random.Random(name)`, whose streams are stable over versions; numpy's is not promised to be. What is said follows one
fixed grammar: a cell is a letter for its row and a number for its column, a description names every object in
reading order with cell, colour and shape, and `parse_objects` finds them again in generated text.
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
from PIL import Image, ImageDraw

from kvbench.datasets.base import MOST_MADE, Example, Turn
from kvbench.errors import ConfigError, check_within, close_matches

GRID_CELLS = 4
CELL_PIXELS = 36
IMAGE_PIXELS = GRID_CELLS * CELL_PIXELS
MIN_OBJECTS = 3
MAX_OBJECTS = 6

RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
BACKGROUNDS = ((24, 24, 28), (44, 40, 36), (34, 46, 54), (58, 58, 58))
RADII = (11, 12, 13, 14, 15, 16)
NOISE_LEVELS = 17
_SCALE = 4  # drawn larger and averaged down: smooth edges

COLOURS = tuple(RGB)
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "ring": "rings",
    "diamond": "diamonds",
    "star": "stars",
}
SHAPES = tuple(PLURALS)
ROWS = "ABCD"
COLUMNS = "1234"
SPLITS = ("train", "validation", "test")
SCENES_VERSION = 2
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
DESCRIBE_PROMPTS = (
    "Describe the scene.",
    "Describe every object in the picture.",
    "What does the picture show?",
)
_OBJECT_PATTERN = re.compile(rf"\b([{ROWS}])([{COLUMNS}]) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_ASK = ("describe", "follow_up", "both")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class SceneObject:
    """One drawn object; row and column count from 0 at the top left."""

    row: int
    column: int
    colour: str
    shape: str

    @property
    def cell(self) -> str:
        """Where it is, in words."""
        return cell_name(self.row, self.column)

    @property
    def look(self) -> str:
        """What it is, in words."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A picture's truth: its objects in reading order, and the seed of everything drawn."""

    name: str
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """How a scene is drawn: which background, and per object its radius and its centre, pixels (x, y)."""

    background: int
    radii: tuple[int, ...]
    centres: tuple[tuple[int, int], ...]


def cell_name(row: int, column: int) -> str:
    """Return a cell in words: B3 is the third of the second row."""
    return f"{ROWS[row]}{COLUMNS[column]}"


def scene_at(split: str, index: int) -> Scene:
    """Return scene `index` of `split`; the same arguments give the same scene for ever.

    Raises: ValueError for an unknown split or a negative index.
    """
    if split not in SPLITS or index < 0:
        raise ValueError(f"scene ({split!r}, {index}) does not exist; split is one of {SPLITS}, index >= 0")
    name = f"scenes-v{SCENES_VERSION}/{split}/{index}"
    rng = random.Random(name)
    cells = rng.sample(range(GRID_CELLS**2), rng.randint(MIN_OBJECTS, MAX_OBJECTS))
    looks: dict[tuple[str, str], None] = {}  # unique, so that "where is the ...?" has one answer
    while len(looks) < len(cells):
        looks[(rng.choice(COLOURS), rng.choice(SHAPES))] = None
    objects = tuple(
        SceneObject(row=cell // GRID_CELLS, column=cell % GRID_CELLS, colour=colour, shape=shape)
        for cell, (colour, shape) in zip(sorted(cells), looks, strict=True)
    )
    return Scene(name=name, objects=objects)


def drawing_of(scene: Scene) -> Drawing:
    """Return how `scene` is drawn; an object stays within its cell."""
    rng = random.Random(scene.name + "/drawing")
    background = rng.randrange(len(BACKGROUNDS))
    radii, centres = [], []
    for item in scene.objects:
        radius = rng.choice(RADII)
        slack = CELL_PIXELS // 2 - radius - 1
        x, y = (cell * CELL_PIXELS + CELL_PIXELS // 2 + rng.randint(-slack, slack) for cell in (item.column, item.row))
        radii.append(radius)
        centres.append((x, y))
    return Drawing(background=background, radii=tuple(radii), centres=tuple(centres))


def draw_scene(scene: Scene) -> Image.Image:
    """Return the picture of `scene`, mode RGB, 144 x 144 pixels."""
    drawing = drawing_of(scene)
    canvas = np.empty((IMAGE_PIXELS, IMAGE_PIXELS, 3), dtype=np.int32)
    canvas[:] = BACKGROUNDS[drawing.background]
    half = CELL_PIXELS // 2
    for item, radius, (x, y) in zip(scene.objects, drawing.radii, drawing.centres, strict=True):
        top, left = item.row * CELL_PIXELS, item.column * CELL_PIXELS
        cell = canvas[top : top + CELL_PIXELS, left : left + CELL_PIXELS]
        shift = (y % CELL_PIXELS - half, x % CELL_PIXELS - half)  # rolls nothing but background over the edge
        cover = np.roll(sprite(item.shape, radius), shift, axis=(0, 1)).astype(np.int32)[:, :, None]
        cell += (np.array(RGB[item.colour], dtype=np.int32) - cell) * cover // 255
    raw = random.Random(scene.name + "/noise").randbytes(canvas.size)
    noise = np.frombuffer(raw, dtype=np.uint8).reshape(canvas.shape).astype(np.int32)
    noisy = canvas + noise % NOISE_LEVELS - NOISE_LEVELS // 2
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@cache
def sprite(shape: str, radius: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return how much of each pixel of a cell the shape covers, 0 to 255, its centre in the middle."""
    mask = Image.new("L", (CELL_PIXELS * _SCALE,) * 2, 0)
    _draw_shape(ImageDraw.Draw(mask), shape, CELL_PIXELS * _SCALE // 2, radius * _SCALE)
    return np.asarray(mask.resize((CELL_PIXELS,) * 2, Image.Resampling.BOX), dtype=np.uint8)


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
        number, turn_degrees = {"square": (4, 45.0), "diamond": (4, 0.0), "triangle": (3, 30.0), "star": (10, 18.0)}[
            shape
        ]
        reach = [r if shape != "star" or k % 2 else 0.42 * r for k in range(number)]
        angles = [math.radians(turn_degrees + 360 * k / number) for k in range(number)]
        draw.polygon([(at + d * math.cos(a), at + d * math.sin(a)) for d, a in zip(reach, angles, strict=True)], 255)


def describe(scene: Scene) -> str:
    """Return the full description: the number of objects, then each in reading order."""
    return f"{NUMBERS[len(scene.objects)].capitalize()} objects: {_listed(scene.objects)}."


def _listed(objects: Sequence[SceneObject]) -> str:
    return ", ".join(f"{item.cell} {item.look}" for item in objects)


def describe_prompt(scene: Scene) -> str:
    """Return one of the ways to ask for a description, fixed by the scene."""
    return random.Random(scene.name + "/prompt").choice(DESCRIBE_PROMPTS)


def follow_up_turns(scene: Scene, count: int) -> list[Turn]:
    """Return `count` follow-up questions: what a cell or a row holds, where an object is, how many there are."""
    rng = random.Random(scene.name + "/follow-up")
    kinds = (_ask_cell, _ask_where, _ask_count, _ask_row)
    return [rng.choice(kinds)(scene, rng) for _ in range(count)]


def parse_objects(text: str) -> frozenset[SceneObject]:
    """Return every object that `text` states in the grammar of `describe`."""
    return frozenset(
        SceneObject(row=ROWS.index(row), column=COLUMNS.index(column), colour=colour, shape=shape)
        for row, column, colour, shape in _OBJECT_PATTERN.findall(text)
    )


def _ask_cell(scene: Scene, rng: random.Random) -> Turn:
    """Three quarters of the questions ask about an occupied cell, the others about any cell."""
    by_cell = {(item.row, item.column): item for item in scene.objects}
    cell = rng.choice(list(by_cell)) if rng.random() < 0.75 else tuple(rng.choices(range(GRID_CELLS), k=2))
    found = by_cell.get((cell[0], cell[1]))
    name = cell_name(cell[0], cell[1])
    return Turn(question=f"What is in {name}?", answer=f"{name} {found.look}." if found else f"{name} nothing.")


def _ask_where(scene: Scene, rng: random.Random) -> Turn:
    item = rng.choice(scene.objects)
    return Turn(question=f"Where is the {item.look}?", answer=f"In {item.cell}.")


def _ask_count(scene: Scene, rng: random.Random) -> Turn:
    """Half of the questions count a colour, half a shape; half of them one that an object has."""
    item = rng.choice(scene.objects)
    there = rng.random() < 0.5
    if rng.random() < 0.5:
        colour = item.colour if there else rng.choice(COLOURS)
        number, what = sum(other.colour == colour for other in scene.objects), f"{colour} objects"
    else:
        shape = item.shape if there else rng.choice(SHAPES)
        number, what = sum(other.shape == shape for other in scene.objects), PLURALS[shape]
    return Turn(question=f"How many {what} are there?", answer=f"{NUMBERS[number].capitalize()}.")


def _ask_row(scene: Scene, rng: random.Random) -> Turn:
    row = rng.choice(scene.objects).row
    held = [item for item in scene.objects if item.row == row]
    return Turn(question=f"Describe row {ROWS[row]}.", answer=f"{_listed(held)}.")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """`num_samples` scenes of `split`, from scene `first` on; any number exists.

    ask: `describe` gives one example per scene, `follow_up` one per follow-up question (they share
    the scene as cluster), `both` the description of a scene and then its questions. num_follow_ups:
    questions per scene. Raises: ConfigError.
    """

    num_samples: int = 32
    split: str = "test"
    first: int = 0
    ask: Literal["describe", "follow_up", "both"] = "describe"
    num_follow_ups: int = 3

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ConfigError(f"dataset.split is {self.split!r}; {close_matches(self.split, SPLITS)}")
        if self.ask not in _ASK:
            raise ConfigError(f"dataset.ask is {self.ask!r}; {close_matches(str(self.ask), _ASK)}")
        made = (1, MOST_MADE)
        check_within("dataset", self, num_samples=made, first=(0, None), num_follow_ups=made)

    @property
    def fingerprint(self) -> str:
        """The version of the generator; everything else is in the settings."""
        return f"scenes-v{SCENES_VERSION}"

    def examples(self) -> Sequence[Example]:
        """Return the examples; pictures are drawn when asked for."""
        scenes = (scene_at(self.split, self.first + k) for k in range(self.num_samples))
        return [example for scene in scenes for example in self._of_scene(scene)]

    def _of_scene(self, scene: Scene) -> Iterator[Example]:
        if self.ask != "follow_up":
            yield Example(
                id=scene.name,
                cluster=scene.name,
                question=describe_prompt(scene),
                reference=describe(scene),
                load_image=partial(draw_scene, scene),
                facts=frozenset(scene.objects),
                follow_ups=tuple(follow_up_turns(scene, self.num_follow_ups)),
            )
        if self.ask != "describe":
            yield from self._questions(scene)

    def _questions(self, scene: Scene) -> Iterator[Example]:
        for number, turn in enumerate(follow_up_turns(scene, self.num_follow_ups)):
            yield Example(
                id=f"{scene.name}/{number}",
                cluster=scene.name,
                question=turn.question,
                reference=turn.answer,
                one_answer=True,
                load_image=partial(draw_scene, scene),
            )

    def facts_in(self, text: str) -> frozenset[Hashable]:
        """Return the objects that `text` states."""
        return frozenset(parse_objects(text))
