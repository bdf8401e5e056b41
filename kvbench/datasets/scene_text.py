"""What is said about a scene: descriptions, follow-up questions, and reading objects back.

One fixed grammar, so that an answer can be parsed: a description names every object with its
cell and its four attributes, and `parse_objects` finds them again in generated text.
"""

from __future__ import annotations

import random
import re

from kvbench.datasets.scenes import COLOURS, GRID_CELLS, SHAPES, SIZES, TEXTURES, Scene, SceneObject
from kvbench.datasets.turn import Turn

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
