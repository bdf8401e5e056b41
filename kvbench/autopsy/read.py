"""Autopsies as the report sees them: read beside the record with every shape checked once, then in numbers and words.

>>> autopsy = load_autopsy(cell)
>>> kept(autopsy.samples).image, sentence(autopsy.samples)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvbench.errors import RecordError
from kvbench.report.load import CellResult
from kvbench.report.markup import listed
from kvbench.results.files import Array, unpack
from kvbench.results.record import AUTOPSY_FILE, GENERATED, NEVER, read_autopsy

STATISTICS = ("entries", "image_kept_permille", "mean_age_tokens", "attention_permille")
_IMAGE = 1  # the kind of an image token
_MEDIA = ("image/png", "image/webp")
_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """`places` (image tokens, 2) row and column in a grid of rows x columns, NEVER where a token has none."""

    source: str
    width: int
    height: int
    rows: int
    columns: int
    places: Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample under one policy; N tokens, P of them the prompt, S = `layers` stored layers of L, K checkpoints.

    freed (S, H, N): the answer's token at which an entry left, 0 at the prompt's cut, NEVER for held.
    merged (S, H, P) or None: position that each entry joined. statistics: (K, L, H) by name. attention (S, P).
    coarse: whether departures are known at the checkpoints only, and moved to the next one.
    """

    id: str
    prompt_tokens: int
    steps: int
    answer: str
    tokens: tuple[str, ...]
    kinds: Array
    picture: Picture | None
    layers: tuple[int, ...]
    coarse: bool
    freed: Array
    merged: Array | None
    checkpoints: tuple[int, ...]
    statistics: Mapping[str, Array]
    attention: Array

    def held(self, step: int) -> Array:
        """(S, H, P) bool: tokens of the prompt that are held after `step` tokens of the answer."""
        found: Array = self.freed[..., : self.prompt_tokens] > step
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Glance:
    """What a sample asks, and its picture, "" for text."""

    question: str
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Autopsy:
    """What one cell's file says; `left_out` are items too long to look at, with the reason.

    glances: by id the question and, where there is one, the small picture of every sample; beside the full cache's.
    """

    num_layers: int
    num_heads: int
    samples: tuple[Sample, ...]
    left_out: tuple[str, ...]
    glances: Mapping[str, Glance] = field(default_factory=dict)


def load_autopsy(cell: CellResult) -> Autopsy | None:
    """Return what lies beside the record of `cell`, None if nothing does. Raises: RecordError in one line."""
    path = None if cell.cell_folder is None else cell.cell_folder / AUTOPSY_FILE
    if path is None or not path.exists():
        return None
    body = read_autopsy(path, cell.key)
    try:
        samples = tuple(_sample(sample, body["num_layers"], body["num_heads"]) for sample in body["samples"])
        left_out = tuple(f"{one['id']}: {one['reason']}" for one in body["left_out"])
        glances = {str(one["id"]): _glance(one) for one in body.get("glances", ())}
    except (RecordError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RecordError(f"{path} does not hold what it should ({type(error).__name__}: {error!s:.60}).") from error
    return Autopsy(
        num_layers=body["num_layers"],
        num_heads=body["num_heads"],
        samples=samples,
        left_out=left_out,
        glances=glances,
    )


def _glance(glance: Mapping[str, Any]) -> Glance:
    if glance["data"] is None:
        return Glance(question=str(glance["question"]), source="")
    _require(glance["media"] in _MEDIA and _BASE64.fullmatch(glance["data"]) is not None, "a small picture")
    return Glance(question=str(glance["question"]), source=f"data:{glance['media']};base64,{glance['data']}")


def _sample(sample: Mapping[str, Any], num_layers: int, num_heads: int) -> Sample:
    prompt, steps = _count(sample["prompt_tokens"]), _count(sample["steps"])
    layers, checkpoints = tuple(map(_count, sample["layers"])), tuple(map(_count, sample["checkpoints"]))
    _require(bool(layers) and max(layers) < num_layers, "layers")
    _require(checkpoints == tuple(sorted(set(checkpoints))) and checkpoints[:1] == (0,), "checkpoints")
    kinds = _shaped(unpack(sample["kinds"]), (prompt + steps,), "kinds")
    tokens = tuple(map(str, sample["tokens"]))
    _require(len(tokens) == prompt + steps, "tokens")
    merged = None if sample["merged"] is None else _rows(sample["merged"], (len(layers), num_heads, prompt))
    _require(merged is None or bool(((merged < prompt) | (merged == NEVER)).all()), "merged")
    every = (len(checkpoints), num_layers, num_heads)
    return Sample(
        id=str(sample["id"]),
        prompt_tokens=prompt,
        steps=steps,
        answer=str(sample["answer"]),
        tokens=tokens,
        kinds=kinds,
        picture=None if sample["picture"] is None else _picture(sample["picture"], int((kinds == _IMAGE).sum())),
        layers=layers,
        coarse=sample["coarse"] is True,
        freed=_rows(sample["freed"], (len(layers), num_heads, prompt + steps)),
        merged=merged,
        checkpoints=checkpoints,
        statistics={
            name: _shaped(unpack(sample["statistics"][name]), every, name)
            for name in STATISTICS
            if name in sample["statistics"]
        },
        attention=_shaped(unpack(sample["attention"]), (len(layers), prompt), "attention"),
    )


def _picture(picture: Mapping[str, Any], num_tokens: int) -> Picture:
    _require(picture["media"] in _MEDIA and _BASE64.fullmatch(picture["data"]) is not None, "picture")
    rows, columns = _count(picture["rows"]), _count(picture["columns"])
    places = _shaped(unpack(picture["places"]), (num_tokens, 2), "places")
    inside = (places[:, 0] < rows) & (places[:, 1] < columns)
    _require(bool((inside | (places == NEVER).all(axis=-1)).all()), "places")
    return Picture(
        source=f"data:{picture['media']};base64,{picture['data']}",
        width=_count(picture["width"]),
        height=_count(picture["height"]),
        rows=rows,
        columns=columns,
        places=places,
    )


def _rows(stored: Mapping[str, Any], shape: tuple[int, ...]) -> Array:
    return _shaped(unpack(stored["patterns"])[np.array(stored["of"], dtype=np.int64)], shape, "patterns")


def _shaped(array: Array, shape: tuple[int, ...], name: str) -> Array:
    _require(array.shape == shape, name)
    return array


def _count(value: object) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool) and 0 <= value < NEVER, "a count")
    assert isinstance(value, int)
    return value


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} cannot be right")


def living_on(sample: Sample, step: int) -> Array:
    """(S, H, P) bool: tokens that are gone themselves after `step` answer tokens, but live on in an entry that is held.

    The entry that a token joined may have joined another one in its turn; the last of the chain counts.
    """
    freed = sample.freed[..., : sample.prompt_tokens]
    if sample.merged is None:
        return np.zeros(freed.shape, dtype=bool)
    joined = (sample.merged != NEVER) & (freed <= step)
    last = np.where(joined, sample.merged, np.arange(sample.prompt_tokens)).astype(np.int64)
    for _ in range(sample.prompt_tokens.bit_length()):  # each turn doubles the length of chain that is followed
        last = np.take_along_axis(last, last, axis=-1)
    found: Array = joined & (np.take_along_axis(freed, last, axis=-1) > step)
    return found


_FLAT = 0.005  # layers whose shares differ by less are not told apart


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Shares in [0, 1] of a policy's samples after the prompt and at the end; by layer: lowest and highest.

    image: of the image tokens, None for text; text: of the prompt's other tokens; attention: of what the full
    cache gives to the prompt while it answers; merged: of the prompt's tokens, gone but part of an entry that is held.
    steps: answer tokens, the fewest and the most of any sample.
    """

    image: tuple[float, float] | None
    image_by_layer: tuple[float, float] | None
    text: tuple[float, float] | None
    attention: tuple[float, float]
    attention_by_layer: tuple[float, float]
    mean_age_tokens: float
    merged: tuple[float, float]
    steps: tuple[int, int]


def kept(samples: Sequence[Sample]) -> Kept:
    """Return the numbers of one cell, mean over its samples, layers and heads; stored layers for text and merging."""
    image, attention = (_by_layer(samples, f"{name}_permille") for name in ("image_kept", "attention"))
    assert attention is not None
    texts, merged = [], []
    for one in samples:
        words = one.kinds[: one.prompt_tokens] != _IMAGE
        if words.any():
            texts.append([float(one.held(step)[..., words].mean()) for step in (0, one.steps)])
        merged.append([float(living_on(one, step).mean()) for step in (0, one.steps)])
    steps = [one.steps for one in samples]
    return Kept(
        image=None if image is None else _pair(image),
        image_by_layer=None if image is None else (float(image[0].min()), float(image[0].max())),
        text=_pair(np.transpose(texts)) if texts else None,
        attention=_pair(attention),
        attention_by_layer=(float(attention[0].min()), float(attention[0].max())),
        mean_age_tokens=float(np.mean([float(one.statistics["mean_age_tokens"][-1].mean()) for one in samples])),
        merged=_pair(np.transpose(merged)),
        steps=(min(steps), max(steps)),
    )


def _by_layer(samples: Sequence[Sample], name: str) -> Array | None:
    """(2, L): after the prompt and at the end, mean over heads and samples, as shares."""
    found = [sample.statistics[name][[0, -1]].mean(axis=-1) / 1000 for sample in samples if name in sample.statistics]
    return np.mean(found, axis=0) if found else None


def _pair(shares: Array) -> tuple[float, float]:
    """Return the means after the prompt and at the end, each over one row."""
    before, after = (float(np.mean(row.copy())) for row in shares)
    return before, after


def sentence(samples: Sequence[Sample]) -> str:
    """Return what is seen, in words for one cell; the numbers are those of `kept`."""
    found = kept(samples)
    if all((sample.freed == NEVER).all() for sample in samples):
        return "Holds everything."
    shares = [(found.image, "of the image patches"), (found.text, "of the text"), (found.attention, "of the attention")]
    known = [(share, what) for share, what in shares if share is not None]
    names = [f"{percent(share[0])} {what}" for share, what in known]
    low, high = found.attention_by_layer
    names[-1] += f" ({percent(low)} to {percent(high)} by layer)" if high - low > _FLAT else ""
    parts = [
        f"After the prompt it holds {listed(names)}; at the end {listed([percent(share[1]) for share, _ in known])}."
    ]
    if found.merged[0]:
        before, after = map(percent, found.merged)
        rest = f"; at the end {after} of it lives on in an entry that is held" if after != before else ""
        parts.append(f"{before} of the prompt is merged into other entries{rest}.")
    if any(sample.coarse for sample in samples):
        parts.append("Departures are shown at the stored moments only.")
    elif len(samples) == 1:
        parts.append(first_freed(samples[0]))
    return " ".join(part for part in parts if part)


def first_freed(sample: Sample) -> str:
    """Return a sentence on the first entry that decoding frees, over all stored layers and heads; or nothing."""
    later = np.where((sample.freed > 0) & (sample.freed < NEVER), sample.freed, NEVER)
    if not (later < NEVER).any():
        return "Nothing leaves while it answers." if sample.steps and (sample.freed == 0).any() else ""
    step = int(later.min())
    where = np.unique(np.nonzero(later == step)[2])
    names = sorted({token_name(sample, int(position)) for position in where})
    shown = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    return f"First to go while it answers, at its {_ordinal(step)} token: {shown}."


def token_name(sample: Sample, position: int) -> str:
    """Return a token as a reader calls it: a patch by row and column from 1, a word in quotes."""
    if sample.kinds[position] == _IMAGE and sample.picture is not None:
        index = int((sample.kinds[:position] == _IMAGE).sum())
        row, column = sample.picture.places[index]
        return f"image token {index + 1}" if row == NEVER else f"patch row {row + 1}, column {column + 1}"
    text = sample.tokens[position].strip() or "(white space)"
    return f"\u201c{text}\u201d" + (" of the answer" if sample.kinds[position] == GENERATED else "")


def overlap(one: Sequence[Sample], other: Sequence[Sample]) -> float | None:
    """Return the Jaccard overlap of what two policies hold after the prompt, mean over layers, heads and samples.

    None where they share no sample with the same stored layers.
    """
    theirs = {sample.id: sample for sample in other}
    pairs = [(sample, theirs[sample.id]) for sample in one if sample.id in theirs]
    values = []
    for a, b in ((a.held(0), b.held(0)) for a, b in pairs if a.freed.shape[:2] == b.freed.shape[:2]):
        both, either = (a & b).sum(axis=-1), (a | b).sum(axis=-1)
        values.append(float((both / np.maximum(either, 1)).mean()))
    return float(np.mean(values)) if values else None


def chance_overlap(one: Sequence[Sample], other: Sequence[Sample]) -> float:
    """Return the overlap that two blind choices of the same sizes would have: ab / (a + b - ab)."""
    a, b = (float(np.mean([sample.held(0).mean() for sample in samples])) for samples in (one, other))
    return a * b / max(1e-12, a + b - a * b)


def percent(share: float) -> str:
    """Return a share in words: whole per cent, but no "none" or "all" that is not exact."""
    if share in (0.0, 1.0):
        return "all" if share else "none"
    if 0 < share < 0.005:
        return "under 1 %"
    return "over 99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def _ordinal(number: int) -> str:
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if 10 <= number % 100 <= 20 else ends.get(number % 10, 'th')}"
