"""Draw a scene as an RGB picture of 144 x 144 pixels.

Every random choice (background, jitter, noise) comes from the scene's name through Python's own
generator, whose stream is stable over versions; numpy's is not promised to be.
"""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from kvbench.datasets.scenes import CELL_PIXELS, IMAGE_PIXELS, Scene, SceneObject

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
