"""The autopsies of a group of cells: what each cell's cache kept of a few samples, written beside its record.

An autopsy is taken after the cell's record, so that nothing here can cost a measurement; what goes wrong costs the
file and a line in the log. The same samples for every cell. Stored are patterns of eviction, and numbers per layer
and head at a few steps.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.autopsy.replay import Replayed, Subject, full_attention, glance_of, replay, subject_of, token_pieces
from kvbench.autopsy.settings import AutopsySettings
from kvbench.cache import Kind, Needs, Policy
from kvbench.cache.policy import needs_of
from kvbench.datasets.base import Example
from kvbench.errors import is_poisoned
from kvbench.models.inputs import answer_text
from kvbench.models.loader import LoadedModel
from kvbench.results.files import Array, pack
from kvbench.results.record import AUTOPSY_SCHEMA, GENERATED, NEVER, autopsy_path, write_autopsy
from kvbench.results.redaction import hide_known, redacted_body
from kvbench.sweep.cell import Cell
from kvbench.tasks.foresight import Watching
from kvbench.tasks.task import BatchTask, Part, Prompts

if TYPE_CHECKING:
    from kvbench.sweep.group import Watcher


PHASE = "autopsy"
NUM_CHECKPOINTS, FEW_CHECKPOINTS = 9, 5  # after the prompt, and at steps of the answer up to its end
MANY_HEADS = 256  # over all layers; then numbers are stored at few moments
_MOST_BYTES = 22_000  # of one sample's patterns, compressed
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
        if count <= 2 or sum(sizes[layer] for layer in layers) <= _MOST_BYTES:
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
