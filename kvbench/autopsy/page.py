"""The page's autopsy: which patches and tokens every policy held, per layer and head and over decode time.

`autopsy_section` renders it: drawings, which the script `autopsy.js` makes of the data that stands in the page (what
samples share once, eviction as short texts per head), and what every policy kept, in a table and in words.

Autopsies are read beside the record with every shape checked once, then told in numbers and words.

>>> autopsy = load_autopsy(cell)
>>> kept(autopsy.samples).image, sentence(autopsy.samples)
"""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from kvbench.errors import RecordError
from kvbench.report.compare import declared_budget
from kvbench.report.load import CellResult, Group, Results, natural_key
from kvbench.report.markup import Head, TableCell, TableView, listed, render, row_head, safe_json, text_cell
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


_NARROW, _NARROW_NEVER = 250, 255  # steps that one byte can tell, and what stands for NEVER in it
MOST_BYTES = 8_000_000  # of eviction patterns on one page

Pairs = Sequence[tuple[CellResult, Autopsy]]


def group_data(group: Group, pairs: Pairs, room_bytes: int) -> tuple[dict[str, Any], int]:
    """Return one group for the script and the bytes of its patterns.

    A sample that does not fit is left out under every policy, so that what is shown can be compared.
    """
    cells: list[dict[str, Any]] = [
        {
            "label": group.series_label(cell),
            "budget": "" if cell.is_full else cell.budget,
            "layers": autopsy.num_layers,
            "heads": autopsy.num_heads,
            "views": {},
        }
        for cell, autopsy in pairs
    ]
    items: dict[str, dict[str, Any]] = {}
    most_layers: dict[str, Sample] = {}  # each sample under the first policy of which most layers are stored
    views: dict[str, dict[int, dict[str, Any]]] = {}  # by the sample and the policy's place
    for index, (cell, autopsy) in enumerate(pairs):
        for sample in autopsy.samples:
            views.setdefault(sample.id, {})[index] = _view(cell, sample)
            known = most_layers.setdefault(sample.id, sample)
            if len(sample.layers) > len(known.layers):
                most_layers[sample.id] = sample
    spent = 0
    for name, sample in sorted(most_layers.items(), key=lambda pair: natural_key(pair[0])):
        parts = [view[part] for view in views[name].values() for part in ("freed", "merged") if part in view]
        size = sum(len(text) for part in parts for text in part["patterns"])
        if spent + size <= room_bytes:
            spent += size
            items[name] = _item(sample)
            for index, view in views[name].items():
                cells[index]["views"][name] = view
    # The budgets at which there is something to see, smallest first; "" is the full cache's.
    seen = [cell for (cell, _), shown in zip(pairs, cells, strict=True) if shown["budget"] and shown["views"]]
    budgets = list(dict.fromkeys(cell.budget for cell in sorted(seen, key=lambda cell: cell.budget_order))) or [""]
    data = {
        "title": group.title,
        "asked": declared_budget(group) or "",
        "budgets": budgets,
        "ids": list(items),
        "items": items,
        "cells": cells,
    }
    return data, spent


def _item(sample: Sample) -> dict[str, Any]:
    """Return what is the same under every policy."""
    prompt = sample.prompt_tokens
    item: dict[str, Any] = {
        "tokens": list(sample.tokens[:prompt]),
        "kinds": "".join(map(str, sample.kinds[:prompt].tolist())),
        "layers": list(sample.layers),
        "attention": [_text(layer) for layer in sample.attention],
    }
    picture = sample.picture
    if picture is not None:
        places = [-1 if row == NEVER else int(row) * picture.columns + int(column) for row, column in picture.places]
        item["picture"] = {"source": picture.source, "width": picture.width, "height": picture.height}
        item["picture"] |= {"rows": picture.rows, "columns": picture.columns, "places": places}
    return item


def _view(cell: CellResult, sample: Sample) -> dict[str, Any]:
    """Return one sample under one policy; it "differs" where the replay did not say what was measured."""
    measured: Mapping[str, Any] = next((row for row in cell.samples if str(row.get("id")) == sample.id), {})
    text = measured.get("text")
    view: dict[str, Any] = {
        "steps": sample.steps,
        "answer": list(sample.tokens[sample.prompt_tokens :]),
        "layers": list(sample.layers),
        "freed": _patterns(sample.freed, sample.steps),
        "checkpoints": list(sample.checkpoints),
        "statistics": {name: values.ravel().tolist() for name, values in sample.statistics.items()},
        "says": sentence([sample]),
        "differs": isinstance(text, str) and not text.startswith(sample.answer),
    }
    if sample.merged is not None:
        view["merged"] = _patterns(sample.merged, NEVER)
    return view


def _patterns(rows: Array, largest: int) -> dict[str, Any]:
    """Return every different row once: base64 of a byte per token where the numbers allow, else of two."""
    narrow = largest <= _NARROW
    numbers = np.where(rows == NEVER, _NARROW_NEVER, rows).astype(np.uint8) if narrow else rows.astype("<u2")
    texts = [[_text(head) for head in layer] for layer in numbers]
    different = list(dict.fromkeys(text for layer in texts for text in layer))
    of = [[different.index(text) for text in layer] for layer in texts]
    return {"wide": not narrow, "patterns": different, "of": of}


def _text(numbers: Array) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


_KEPT_HEADS = (
    Head("policy", kind="text"),
    Head("budget", kind="amount"),
    *(
        Head(when, group=what)
        for what in ("image patches kept", "prompt text kept", "attention held", "merged, in a held entry")
        for when in ("after the prompt", "at the end")
    ),
    Head("mean age", "tokens, at the end"),
    Head("answer tokens", "at the end"),
)


def _numbers(group: Group, pairs: Pairs) -> dict[str, object]:
    """Return the table of what was kept, the same in words, and overlaps; no table of the full cache alone."""
    budgeted = [(cell, autopsy) for cell, autopsy in pairs if not cell.is_full]
    if not budgeted:
        return {"kept": None}
    by_budget: dict[str, list[tuple[CellResult, Autopsy]]] = {}
    for cell, autopsy in sorted(budgeted, key=lambda pair: pair[0].budget_order):
        by_budget.setdefault(cell.budget, []).append((cell, autopsy))
    nums = sorted({len(autopsy.samples) for _, autopsy in budgeted})
    what = f"{nums[0]} to {nums[-1]} samples" if len(nums) > 1 else "1 sample" if nums == [1] else f"{nums[0]} samples"
    rows = [list(_kept_cells(group, cell, one, several=len(nums) > 1)) for cell, one in budgeted]
    caption = (
        f"What was kept of the prompt, {group.title}: mean over {what}, layers and KV heads; "
        "small: lowest and highest layer"
    )
    return {
        "kept": TableView(caption=caption, heads=_KEPT_HEADS, rows=rows, classes="ap-kept"),
        "words": [(group.cell_label(cell), sentence(autopsy.samples)) for cell, autopsy in budgeted],
        "overlaps": [_overlaps(group, some, budget) for budget, some in by_budget.items() if len(some) > 1],
        "left_out": sorted({text for _, autopsy in pairs for text in autopsy.left_out}),
    }


def _kept_cells(group: Group, cell: CellResult, autopsy: Autopsy, *, several: bool) -> Iterator[TableCell]:
    found = kept(autopsy.samples)
    size = cell.budget_fraction if cell.budget_fraction is not None else cell.budget_tokens
    yield row_head(group.series_label(cell), f"n = {len(autopsy.samples)}" if several else "")
    yield text_cell(cell.budget, sort=size)
    for shares, by_layer in (
        (found.image, found.image_by_layer),
        (found.text, None),
        (found.attention, found.attention_by_layer),
        (found.merged, None),
    ):
        low, high = map(percent, by_layer or (0.0, 0.0))
        for value, spread in zip(shares or (None, None), (f"{low} to {high}" if low != high else "", ""), strict=True):
            yield TableCell("-" if value is None else f"{100 * value:.0f} %", spread, sort=value)
    yield TableCell(f"{found.mean_age_tokens:.0f}", sort=found.mean_age_tokens)
    fewest, most = found.steps
    yield TableCell(str(fewest) if fewest == most else f"{fewest} to {most}", sort=(fewest + most) / 2)


def _overlaps(group: Group, pairs: Pairs, budget: str) -> TableView:
    rows = []
    for cell, one in pairs:
        cells = [row_head(group.series_label(cell))]
        for other_cell, other in pairs:
            share = 1.0 if cell is other_cell else overlap(one.samples, other.samples)
            chance = f"blind {chance_overlap(one.samples, other.samples):.2f}" if cell is not other_cell else ""
            cells.append(TableCell("-" if share is None else f"{share:.2f}", chance, sort=share))
        rows.append(cells)
    caption = (
        f"At {budget}, {group.title}: tokens that both hold after the prompt over those that either holds (Jaccard), "
        "mean over layers, KV heads and samples; small: two blind choices of the same sizes"
    )
    heads = [Head("policy", kind="text"), *(Head(group.series_label(cell)) for cell, _ in pairs)]
    return TableView(caption=caption, heads=heads, rows=rows)


def asked_of(results: Results) -> dict[str, dict[str, tuple[str, str]]]:
    """Return, by a group's title and a sample's id, what was asked and the small picture; a damaged file has none."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for group in results.groups:
        for cell in (cell for cell in group.cells if cell.is_full):
            with contextlib.suppress(RecordError):
                autopsy = load_autopsy(cell)
                for sample, glance in (autopsy.glances if autopsy else {}).items():
                    found.setdefault(group.title, {})[sample] = (glance.question, glance.source)
    return found


_MOST_NAMES = 5


def autopsy_section(results: Results) -> Markup:
    """Return what stands below the heading; "" without records. Damaged files are named, missing ones cost nothing."""
    groups: list[Mapping[str, object]] = []
    data: list[dict[str, Any]] = []
    problems: list[str] = []
    is_same = True
    room = MOST_BYTES
    for group in results.groups:
        pairs = []
        for cell in group.cells:
            try:
                found = load_autopsy(cell)
            except RecordError as error:
                folder = "" if cell.cell_folder is None else str(cell.cell_folder.parent.parent)
                problems.append(str(error).replace(f"{folder}/", ""))
                continue
            if found is not None and found.samples:
                pairs.append((cell, found))
        if not pairs:
            continue
        one, spent = group_data(group, pairs, room)
        room -= spent
        data.extend([one] if one["items"] else [])
        by_cell = [{sample.id for sample in autopsy.samples} for _, autopsy in pairs]
        every = set().union(*by_cell)
        is_same &= all(ids == every for ids in by_cell)
        undrawn = sorted(every.difference(one["ids"]), key=natural_key)
        drawn = {"title": group.title, "num_samples": len(every), "undrawn": undrawn}
        groups.append(drawn | _numbers(group, pairs))
    return render(
        "autopsy.html.j2",
        has_records=bool(results.records),
        several=len(results.groups) > 1,
        problems=problems,
        groups=groups,
        data=safe_json(data) if data else None,
        is_same=is_same,
        most_names=_MOST_NAMES,
    )
