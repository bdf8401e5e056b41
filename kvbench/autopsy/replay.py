"""The autopsies of a group of cells: a few prompts decoded once more, to write down what leaves the cache when.

Two replays: the cell's own policy, and once for all cells the full cache, whose attention while it answers
says what there was to lose. Beside them stands what is the same whatever the policy, the `Subject`: its tokens, each
with its own part of the text, and its picture as the model saw it. What a processor crops or stretches is undone by
nothing: the picture is made from the pixels that went into the vision tower, so a token's patch is where the model
looked.

An autopsy of each cell is written beside its record. It is taken after the cell's record, so that nothing here can cost
a measurement; what goes wrong costs the file and a line in the log. The same samples for every cell. Stored are
patterns of eviction, and numbers per layer and head at a few steps.
"""

from __future__ import annotations

import base64
import io
import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kvbench.autopsy import AutopsySettings
from kvbench.cache import UNLIMITED, Kind, Needs, Policy
from kvbench.cache.policy import needs_of
from kvbench.cache.recording import EvictionLog
from kvbench.datasets.base import Example
from kvbench.errors import is_poisoned
from kvbench.models.inputs import PromptBatch, answer_text, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.results.files import Array, pack
from kvbench.results.record import AUTOPSY_SCHEMA, GENERATED, NEVER, autopsy_path, write_autopsy
from kvbench.results.redaction import hide_known, redacted_body
from kvbench.sweep.cell import Cell
from kvbench.tasks.decode import CacheSetting, greedy
from kvbench.tasks.task import BatchTask, Part, Prompts, Watching

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache
    from kvbench.sweep.group import Watcher


Place = tuple[int, int]
THUMBNAIL_PIXELS = 336
GLANCE_PIXELS, _MOST_LETTERS = 112, 2000
_MOST_BYTES = 16_000
_QUALITIES = (90, 75, 60, 45, 30, 15)
_HALF = "\ufffd"  # what decoders write for a character whose last bytes are missing


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One row: its answer, the `steps` tokens of it that went through the cache, and when entries left.

    freed (L, H, N) int64: the decode step that freed an entry, 0 for the prompt's cut, -1 for held. merged
    (L, H, N) int64 or None: the position of the entry that each one joined, -1 for none.
    """

    answer: list[int]
    steps: int
    freed: Array
    merged: Array | None


@torch.inference_mode()
def replay(
    part: Part,
    setting: CacheSetting,
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> list[Replayed]:
    """Return what `setting` does to each row of `part` while it answers greedily, or by `choose`, as `greedy` does.

    Raises: NonFiniteError.
    """
    question = part.batch.question_ids
    longest = max(part.batch.prompt_tokens) + (0 if question is None else question.shape[1])
    log = EvictionLog(num_tokens=longest + max_new_tokens)
    decoding = part.decoding(replace(setting, engine="eager"), max_new_tokens, on_plan=log.note_plan)
    log.after_prompt(decoding.cache)
    steps = [0] * len(part.examples)

    def on_step(cache: PolicyCache, going: list[bool]) -> None:
        log.after_step(cache, going)
        steps[:] = [count + one for count, one in zip(steps, going, strict=True)]

    limits: dict[str, Any] = {"end_token_ids": end_token_ids, "max_new_tokens": max_new_tokens}
    answers = greedy(decoding, **limits, choose=choose, on_step=on_step)
    return [
        Replayed(
            answer=answer,
            steps=steps[row],
            freed=log.freed(row).numpy(),
            merged=None if (into := log.merged_into(row)) is None else into.numpy(),
        )
        for row, answer in enumerate(answers)
    ]


@torch.inference_mode()
def full_attention(part: Part, *, end_token_ids: Collection[int], max_new_tokens: int) -> list[Array]:
    """Return (L, H, N) float32 per row: attention that the full cache gives each token while it answers.

    Summed over the steps of its own greedy answer, mean over the query heads of a KV head. Where nothing was
    decoded, the attention of the prompt's own tokens.
    """
    setting = CacheSetting(policy=Watching(), budget=UNLIMITED, positions="original")
    decoding = part.decoding(setting, max_new_tokens)
    before = masses(decoding.cache)
    latest = [mass.clone() for mass in before]

    def on_step(cache: PolicyCache, going: list[bool]) -> None:
        for known, mass in zip(latest, masses(cache), strict=True):
            rows = torch.tensor(going, device=known.device)
            known[rows] = mass[rows]

    greedy(decoding, end_token_ids=end_token_ids, max_new_tokens=max_new_tokens, on_step=on_step)
    decoded = torch.stack([(after - first).cpu() for first, after in zip(before, latest, strict=True)], dim=1)
    nothing = (decoded.sum(dim=(1, 2, 3)) <= 0)[:, None, None, None]
    found = torch.where(nothing, torch.stack([mass.cpu() for mass in before], dim=1), decoded).float()
    return list(found.numpy())


def masses(cache: PolicyCache) -> list[Tensor]:
    """Return the attention that each token received so far, (B, H, C) per layer, of a cache that evicts nothing.

    Its order of storage is that of tokens.
    """
    found = []
    for layer in cache.policy_layers:
        assert layer.slots is not None
        assert layer.slots.entries.mass is not None
        found.append(layer.slots.entries.mass.masked_fill(layer.slots.entries.position < 0, 0.0).clone())
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class SeenPicture:
    """`places`: row and column of each image token in a grid of `rows` x `columns` patches, None where it has none.

    Tokens of enlarged tiles and tokens that a resampler makes from the whole picture have no place.
    """

    image: Image.Image
    rows: int
    columns: int
    places: tuple[Place | None, ...]


def seen_picture(loaded: LoadedModel, example: Example, batch: PromptBatch) -> SeenPicture | None:
    """Return the picture of `example`, whose prompt alone is `batch`; None for text."""
    if example.load_image is None or "pixel_values" not in batch.tensors:
        return None
    num_tokens = int(batch.kind[0].eq(int(Kind.IMAGE)).sum())
    if "image_grid_thw" in batch.tensors:
        return _from_grid(loaded, example.load_image(), batch.tensors["image_grid_thw"][0], num_tokens)
    pixels = batch.tensors["pixel_values"][0]
    tile = (pixels[0] if pixels.dim() == 4 else pixels).float().cpu()  # the first, as it went into the vision tower
    processor: Any = getattr(loaded.processor, "image_processor", loaded.processor)
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    levels = ((tile * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    edge = getattr(getattr(loaded.model.config, "vision_config", None), "patch_size", None)
    if edge is None:
        return SeenPicture(image=image, rows=0, columns=0, places=(None,) * num_tokens)
    rows, columns = tile.shape[-2] // int(edge), tile.shape[-1] // int(edge)
    return SeenPicture(image=image, rows=rows, columns=columns, places=_places(rows, columns, num_tokens))


def _from_grid(loaded: LoadedModel, image: Image.Image, grid: Tensor, num_tokens: int) -> SeenPicture:
    """Patches of the stretched picture, merged in squares; the stretch keeps every place's share of the picture."""
    merged = loaded.model.config.vision_config.spatial_merge_size
    rows, columns = int(grid[1]) // merged, int(grid[2]) // merged
    edge = 14 * merged
    stretched = image.convert("RGB").resize((columns * edge, rows * edge))
    return SeenPicture(image=stretched, rows=rows, columns=columns, places=_places(rows, columns, num_tokens))


def _places(rows: int, columns: int, num_tokens: int) -> tuple[Place | None, ...]:
    """Row by row; one token before the grid is the class token, those after it belong to enlarged tiles."""
    grid: list[Place | None] = [(index // columns, index % columns) for index in range(rows * columns)]
    if num_tokens < len(grid):
        return (None,) * num_tokens
    before = [None] if num_tokens == len(grid) + 1 else []
    return (*before, *grid, *[None] * (num_tokens - len(grid) - len(before)))


def token_pieces(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token as it stands in the whole; image tokens are empty.

    A character of several tokens is the last one's, those before it are empty.
    """
    pieces: list[str] = []
    context = told = 0  # of tokens[told:] nothing was said yet; tokens[context:told] decide how they join on
    for index, token in enumerate(tokens):
        known = _decoded(loaded, tokens[context:told])
        both = _decoded(loaded, tokens[context : index + 1])
        if both.endswith(_HALF) and index + 1 < len(tokens):
            pieces.append("")
            continue
        piece = both[len(known) :] if both.startswith(known) else _decoded(loaded, tokens[told : index + 1])
        pieces.append("" if token == loaded.image_token_id else piece.encode(errors="replace").decode())
        context, told = told, index + 1
    return pieces


def _decoded(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One sample: `pieces` the text of each prompt token, `kinds` (P,) uint8, `picture` as it is stored or None."""

    example: Example
    pieces: list[str]
    kinds: Array
    picture: dict[str, Any] | None


def subject_of(loaded: LoadedModel, example: Example) -> Subject:
    """Return the sample's prompt as it stands in the cache, question included, without pads."""
    batch = prompt_batch(loaded, [example])
    picture = seen_picture(loaded, example, batch)
    return Subject(
        example=example,
        pieces=token_pieces(loaded, batch.tensors["input_ids"][0].tolist()),
        kinds=batch.kind[0].cpu().numpy().astype(np.uint8),
        picture=None if picture is None else _stored(picture),
    )


def _stored(picture: SeenPicture) -> dict[str, Any]:
    """Return thumbnail, grid and places; a place is row and column, NEVER where a token has none."""
    small = picture.image.copy()
    small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    media, data = thumbnail_file(small)
    places = np.array([place or (NEVER, NEVER) for place in picture.places], dtype=np.uint16).reshape(-1, 2)
    size = {"width": small.width, "height": small.height, "rows": picture.rows, "columns": picture.columns}
    return {"media": media, "data": base64.b64encode(data).decode(), **size, "places": pack(places)}


def glance_of(example: Example, *, with_picture: bool) -> dict[str, Any]:
    """Return what a sample asks, and its picture as small as a reader still recognises it."""
    glance = {"id": example.id, "question": example.question[:_MOST_LETTERS], "media": None, "data": None}
    if example.load_image is None or not with_picture:
        return glance
    small = example.load_image().convert("RGB")
    small.thumbnail((GLANCE_PIXELS, GLANCE_PIXELS))
    media, data = thumbnail_file(small)
    return glance | {"media": media, "data": base64.b64encode(data).decode()}


def thumbnail_file(image: Image.Image) -> tuple[str, bytes]:
    """Return media type and bytes: PNG where that is small, as drawings are, else WebP of falling quality."""
    forms: list[tuple[str, dict[str, Any]]] = [("png", {"optimize": True})]
    for form, options in forms + [("webp", {"quality": quality}) for quality in _QUALITIES]:
        if len(data := _encoded(image, form, **options)) <= _MOST_BYTES:
            return f"image/{form}", data
    half = image.resize((max(1, image.width // 2), max(1, image.height // 2)))
    return "image/webp", _encoded(half, "webp", quality=_QUALITIES[-1])


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


PHASE = "autopsy"
NUM_CHECKPOINTS, FEW_CHECKPOINTS = 9, 5  # after the prompt, and at steps of the answer up to its end
MANY_HEADS = 256  # over all layers; then numbers are stored at few moments
_BODY_MOST_BYTES = 22_000  # of one sample's patterns, compressed
_MOST_GLANCE_BYTES = 500_000  # of the small pictures of all samples
_log = logging.getLogger(__name__)


class Autopsies:
    """The autopsies of a group of cells, each taken after its cell's record is written, by a prefill of its own.

    What is the same for all cells is found once: the samples, and the full cache's attention, both on the host.
    share: the policies of all cells where one prefill may serve them, none where its prompt must not stay alive.
    """

    def __init__(self, results: Path, watcher: Watcher, *, share: Sequence[Policy] = ()) -> None:
        self._results, self._watcher, self._share = results, watcher, share
        self._chosen: dict[AutopsySettings, _Chosen] = {}

    def take(self, cell: Cell, loaded: LoadedModel) -> bool:
        """Write the autopsy of `cell`, if it wants one; return False if nothing works in this process any more.

        One that measures quality wants one, where autopsies are on; a policy that sees the future has none, as its own
        answer is not known before it is given.
        """
        measures_quality = any(isinstance(task, BatchTask) for task in cell.tasks.values())
        if Needs.FUTURE in needs_of(cell.setting.policy):
            return True
        if cell.autopsy.num_samples < 1 or not measures_quality or loaded.tokenizer is None:
            return True
        self._watcher.active(cell.key, PHASE)
        try:
            chosen = self._chosen.get(cell.autopsy)
            if chosen is None:
                chosen = self._chosen[cell.autopsy] = _Chosen(cell, loaded, self._share)
            samples = chosen.samples(cell)
            body = {
                "schema": AUTOPSY_SCHEMA,
                "key": cell.key,
                "num_layers": loaded.model.config.get_text_config().num_hidden_layers,
                "num_heads": int(samples[0]["statistics"]["entries"]["shape"][-1]) if samples else 0,
                "samples": samples,
                "left_out": chosen.left_out,
                "glances": glances(cell.dataset.examples()) if cell.labels.get("policy") == "full" else [],
            }
            write_autopsy(autopsy_path(self._results, cell.key), body)
        except BaseException as error:  # a policy may do anything, once more
            _log.warning("no autopsy of %s: %s: %s", cell.name, type(error).__name__, error)
            return not is_poisoned(str(error))
        return True


def glances(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Return the question and a small picture of every sample, so that a reader of answers sees what was asked.

    They are the same for every policy and stand beside the full cache's record; where room ends, questions alone.
    """
    found, size = [], 0
    for example in examples:
        glance = glance_of(example, with_picture=size < _MOST_GLANCE_BYTES)
        size += len(glance["data"] or "")
        found.append(redacted_body(glance))
    return found


class _Chosen:
    """The samples to look at, and what the full cache attends to in them."""

    def __init__(self, first: Cell, loaded: LoadedModel, share: Sequence[Policy]) -> None:
        self._loaded = loaded
        subjects = [subject_of(loaded, example) for example in first.autopsy.chosen(first.dataset.examples())]
        most = first.autopsy.max_prompt_tokens
        self._subjects = {one.example.id: one for one in subjects if len(one.pieces) <= most}
        self.left_out = [
            {"id": one.example.id, "reason": f"its prompt has {len(one.pieces)} tokens, more than {most}"}
            for one in subjects
            if len(one.pieces) > most
        ]
        self._attention: dict[tuple[int, int], list[Array]] = {}
        self._shared = self._prompts(share, first) if share else None

    def samples(self, cell: Cell) -> list[dict[str, Any]]:
        """Return the samples of `cell` as they are stored."""
        prompts = self._shared or self._prompts([cell.setting.policy], cell)
        return [row for number in range(len(prompts)) for row in self._of_part(cell, prompts.part(number))]

    def _prompts(self, policies: Sequence[Policy], cell: Cell) -> Prompts:
        examples = [one.example for one in self._subjects.values()]
        share, size = [*policies, Watching()], max(1, len(examples))
        return Prompts(self._loaded, examples, size, share=share, query_visible=cell.query_visible)

    def _of_part(self, cell: Cell, part: Part) -> Iterator[dict[str, Any]]:
        # As many steps as the answers that are measured have at most, within the limit.
        asked = [task.max_new_tokens for task in cell.tasks.values() if hasattr(task, "max_new_tokens")]
        steps = min(cell.autopsy.max_new_tokens, max(asked, default=cell.autopsy.max_new_tokens))
        limits: dict[str, Any] = {"end_token_ids": self._loaded.end_token_ids, "max_new_tokens": steps}
        attention = self._attention.get((part.number, steps))
        if attention is None:
            attention = self._attention[part.number, steps] = full_attention(part, **limits)
        rows = replay(part, cell.setting, **limits)
        for example, row, given in zip(part.examples, rows, attention, strict=True):
            yield without_secrets(_sample_body(self._loaded, self._subjects[example.id], row, given))


def without_secrets(body: dict[str, Any]) -> dict[str, Any]:
    """Return `body`, without its words where they hold a secret: in pieces it could not be found again."""
    text = "".join(body["tokens"])
    if hide_known(text) != text:
        body["tokens"] = ["***"] * len(body["tokens"])
    return redacted_body(body)


def _sample_body(loaded: LoadedModel, subject: Subject, row: Replayed, attention: Array) -> dict[str, Any]:
    """Return one sample as JSON holds it. attention (L, H, N): see `full_attention`."""
    prompt = len(subject.pieces)
    tokens = prompt + row.steps
    freed = np.where(row.freed < 0, NEVER, row.freed)[..., :tokens].astype(np.uint16)
    count = FEW_CHECKPOINTS if freed[..., 0].size > MANY_HEADS else NUM_CHECKPOINTS
    checkpoints = sorted({round(index * row.steps / (count - 1)) for index in range(count)})
    layers, shown = stored_layers(freed), freed
    coarse = len(layers) < len(freed)
    if coarse:  # more layers fit when departures are known at the stored moments only
        shown = coarsened(freed, checkpoints)
        layers = stored_layers(shown)
    kinds = np.concatenate((subject.kinds, np.full(row.steps, GENERATED, dtype=np.uint8)))
    shares = attention[layers, :, :prompt].mean(axis=1)
    levels = (255 * shares / np.maximum(shares.max(axis=-1, keepdims=True), 1e-30)).round().astype(np.uint8)
    merged = None
    if row.merged is not None:
        merged = _patterns(np.where(row.merged < 0, NEVER, row.merged)[layers, :, :prompt].astype(np.uint16))
    return {
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
        "merged": merged,
        "checkpoints": checkpoints,
        "statistics": _statistics(freed, subject, checkpoints, attention[..., :prompt]),
        "attention": pack(levels),  # (L, P), 255 for the most attended token of a layer
    }


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
        if count <= 2 or sum(sizes[layer] for layer in layers) <= _BODY_MOST_BYTES:
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
    prompt, image = len(subject.pieces), subject.kinds == int(Kind.IMAGE)
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
