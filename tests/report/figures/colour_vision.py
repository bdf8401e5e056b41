"""How colours look to readers with colour-blindness, and how far apart two of them then are.

Simulation: Machado, Oliveira and Fernandes (2009), severity 1, matrices for linear RGB. Distance: Euclidean
in Oklab (Ottosson 2020), times 100; 2 is about what an eye just tells apart side by side.
"""

from __future__ import annotations

import numpy as np

VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear(colour: str) -> np.ndarray:
    """Return linear RGB of #rrggbb."""
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def distance(one: str, two: str, vision: str) -> float:
    """Return how far apart two colours look."""
    seen = [np.clip(VISIONS[vision] @ linear(colour), 0.0, 1.0) for colour in (one, two)]
    first, second = (_TO_LAB @ np.cbrt(_TO_CONES @ rgb) for rgb in seen)
    return float(100 * np.linalg.norm(first - second))


def contrast(one: str, two: str) -> float:
    """Return the contrast ratio of the web's accessibility guidelines, 1 to 21."""
    lights = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) + 0.05 for colour in (one, two))
    return lights[1] / lights[0]
