"""What an answer would have been had the cache kept one more entry of its evidence: runs that differ in that alone.

The evidence is what the full cache attends to most when it says its first different token, of all that the policy had
let go by then. Attention is no proof, so the sample is answered again with that entry pinned within the same budget
(`kvbench.cache.policy.pinned`), once where it was missed and once everywhere, and beside it with entries that were
drawn from all that had gone: what those bring back too is no doing of the evidence.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvbench.autopsy.replay import Replayed, Subject, masses, replay, seen_picture, subject_of, token_pieces
from kvbench.cache import UNLIMITED, Kind, Policy, View
from kvbench.cache.policy import Pin, chosen_by, pinned
from kvbench.cache.recording import EvictionLog
from kvbench.datasets.base import Dataset, Example
from kvbench.errors import MeasureError
from kvbench.models.inputs import answer_text, prompt_batch, reference_text
from kvbench.models.loader import LoadedModel
from kvbench.results.files import Array
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.generation import Generation, answer_fields, fact_fields
from kvbench.tasks.rouge import first_divergence
from kvbench.tasks.task import Part, Prompts, Watching

_CONTEXT_TOKENS = 5  # to both sides of a word that is named


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One sample of one cell, and how it was answered."""

    loaded: LoadedModel
    dataset: Dataset
    example: Example
    setting: CacheSetting
    full_policy: Policy
    task: Generation
    query_visible: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """An entry that had gone, layers and heads from 0: where the full cache attends to it most among where it had.

    attention_fraction: of all that this head gives in that step. left_at: the answer's token at which it left, 0 with
    the prompt. rank: its place by score when it left, from 1, among `num_ranked` held, `num_kept` of which stayed.
    missing_fraction: of all layers and heads. joined: the entry that a plan merged it into, None where it was dropped.
    """

    position: int
    name: str
    layer: int
    head: int
    attention_fraction: float
    missing_fraction: float
    left_at: int = 0
    joined: str | None = None
    rank: int | None = None
    num_ranked: int | None = None
    num_kept: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One way to answer. token: what it says where full and policy part, "" for the end.

    probability: of the full cache's token there; None, as the token, where it has left the common beginning before.
    is_held: whether every pinned entry was held to the end.
    """

    kept: str
    pins: tuple[Pin, ...]
    text: str
    token: str | None
    probability: float | None
    brings_back: bool
    scores: Mapping[str, float]
    first_divergence_tokens: int | None
    is_held: bool = True


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """All that was found. at: the first different token, from 0; None where policy and full cache say the same.

    runs: with each entry of the evidence where it was missed, then everywhere; controls: with drawn ones, everywhere.
    """

    id: str
    question: str
    reference: str
    at: int | None
    full: Run
    policy: Run
    evidence: tuple[Evidence, ...] = ()
    runs: tuple[Run, ...] = ()
    controls: tuple[Run, ...] = ()
    num_missing: int = 0


def counterfactual(
    asked: Asked, recorded: Mapping[str, Any], *, num_evidence: int = 1, num_controls: int = 3, where: str = ""
) -> Counterfactual:
    """Replay a sample, find the evidence of its first different token, and answer with that kept.

    recorded: the sample's row; where: what its record was measured on. Raises: MeasureError if the replay does not
    give the recorded answers; ConfigError as `check_pinnable`.
    """
    scene = _Scene(asked)
    full, policy = scene.answer(scene.full), scene.answer(asked.setting)
    scene.compare_with(recorded, full.replayed.answer, policy.replayed.answer, where)
    at = first_divergence(policy.replayed.answer, full.replayed.answer)
    scene.note_full(full, at)
    found = Counterfactual(
        id=asked.example.id,
        question=asked.example.question,
        reference=reference_text(asked.loaded, asked.example),
        at=at,
        full=scene.run(full, "everything: full cache"),
        policy=scene.run(policy, "nothing: as recorded"),
    )
    if at is None:
        return found
    missing = scene.missing(policy.replayed)
    evidence = _traced(scene, policy.replayed, _most_attended(scene, missing, num_evidence))
    runs = [run for number, one in enumerate(evidence, start=1) for run in _kept(scene, one, number)]
    if len(evidence) > 1:
        runs.append(scene.with_pins([Pin(position=one.position) for one in evidence], "all of these (everywhere)"))
    return replace(
        found,
        evidence=tuple(evidence),
        runs=tuple(runs),
        controls=tuple(_controls(scene, missing, evidence, num_controls)),
        num_missing=int(missing.any(axis=(0, 1)).sum()),
    )


def check_pinnable(policy: Policy) -> None:
    """Raise ConfigError, by name, for a policy in which no entry can be kept in the place of its lowest one."""
    chosen_by(policy, lambda _, ranked: ranked)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """A replay with the tokens that were chosen, an end token too, and the probabilities (V,) of each."""

    replayed: Replayed
    tokens: list[int]
    probabilities: list[Tensor]
    pins: tuple[Pin, ...] = ()


@dataclass(kw_only=True)
class _Chosen:
    """Takes the likeliest token and notes what there was to choose from."""

    tokens: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the tokens (1,) of logits (1, V)."""
        found = logits.argmax(dim=-1)
        self.tokens.append(int(found))
        self.probabilities.append(logits[0].softmax(dim=-1).cpu())
        return found


class _Scene:
    """The sample, ready to be answered in several ways."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.full = CacheSetting(policy=asked.full_policy, budget=UNLIMITED, positions="original")
        self.subject: Subject = subject_of(asked.loaded, asked.example)
        share = [asked.setting.policy, asked.full_policy]  # one prompt for all runs, whose needs pins do not change
        prompts = Prompts(asked.loaded, [asked.example], 1, share=share, query_visible=asked.query_visible)
        self._batch: Part = prompts.part(0)
        self._full: _Answer | None = None
        self.at: int | None = None

    @property
    def common(self) -> list[int]:
        """The tokens that policy and full cache both say first."""
        assert self._full is not None
        assert self.at is not None
        return self._full.replayed.answer[: self.at]

    def note_full(self, full: _Answer, at: int | None) -> None:
        """Note the full cache's answer and the first token in which the policy's differs."""
        self._full, self.at = full, at

    def answer(self, setting: CacheSetting, pins: tuple[Pin, ...] = ()) -> _Answer:
        """Answer under `setting`, with `pins`."""
        chosen, task = _Chosen(), self.asked.task
        setting = replace(setting, policy=pinned(setting.policy, pins)) if pins else setting
        ends = self.asked.loaded.end_token_ids if task.natural_stop else ()
        (found,) = replay(self._batch, setting, end_token_ids=ends, max_new_tokens=task.max_new_tokens, choose=chosen)
        return _Answer(replayed=found, tokens=chosen.tokens, probabilities=chosen.probabilities, pins=pins)

    def with_pins(self, pins: Sequence[Pin], kept: str) -> Run:
        """Return the run of the cell's own policy with `pins`."""
        return self.run(self.answer(self.asked.setting, tuple(pins)), kept)

    def run(self, answer: _Answer, kept: str) -> Run:
        """Return what is said of an answer."""
        assert self._full is not None
        loaded, tokens, full = self.asked.loaded, answer.replayed.answer, self._full.replayed.answer
        fields = answer_fields(loaded, tokens, full, reference_text(loaded, self.asked.example))
        fields |= fact_fields(self.asked.dataset, self.asked.example, fields["text"])
        token, probability, brings_back = None, None, False
        if self.at is not None and answer.tokens[: self.at] == self.common and len(answer.tokens) > self.at:
            said = self._full.tokens[self.at]
            token = self.piece(answer.tokens[: self.at + 1])
            probability, brings_back = float(answer.probabilities[self.at][said]), answer.tokens[self.at] == said
        texts = ("text", "full_text", "reference")
        return Run(
            kept=kept,
            pins=answer.pins,
            text=fields["text"],
            token=token,
            probability=probability,
            brings_back=brings_back,
            scores={name: float(one) for name, one in fields.items() if name not in texts and _is_score(name, one)},
            first_divergence_tokens=fields["first_divergence_tokens"],
            is_held=all(self._holds(answer.replayed.freed, pin) for pin in answer.pins),
        )

    @staticmethod
    def _holds(freed: Array, pin: Pin) -> bool:
        """Whether nothing that is pinned ever left; freed (L, H, N)."""
        layers = slice(None) if pin.layer is None else pin.layer
        heads = slice(None) if pin.head is None else pin.head
        return bool((freed[layers, heads, pin.position] < 0).all())

    def piece(self, tokens: Sequence[int]) -> str:
        """Return the text of the last of `tokens` as it stands after the others, "" for an end token."""
        if tokens[-1] in self.asked.loaded.end_token_ids:
            return ""
        return token_pieces(self.asked.loaded, tokens)[-1]

    def missing(self, policy: Replayed) -> Array:
        """(L, H, N) bool: what had gone when the first different token was chosen, of the prompt and the answer.

        An entry that a step frees is attended in that step, and one that a prompt's cut frees in the whole of it; only
        of a question that comes after its context is cut the context's cut comes first.
        """
        assert self.at is not None
        if self.at > 0:
            missing = (policy.freed >= 0) & (policy.freed < self.at)
        elif self._batch.batch.question_ids is not None:
            missing = self._gone_before_question(policy.freed.shape[-1])
        else:
            missing = np.zeros(policy.freed.shape, dtype=bool)
        missing[..., len(self.subject.pieces) + self.at :] = False
        return missing

    def _gone_before_question(self, num_tokens: int) -> Array:
        batch, log = replace(self._batch.batch, question_ids=None), EvictionLog(num_tokens=num_tokens)
        with torch.inference_mode():
            log.after_prompt(self.asked.setting.decoding(self.asked.loaded, batch, 1).cache)
        found: Array = log.freed(0).numpy() == 0
        return found

    @torch.inference_mode()
    def attention(self) -> Array:
        """(L, H, N) float32: what the full cache gives each token when it says its first different one.

        It is the row of the one query behind that token, the mean over the query heads of a KV head: what sums grow by
        when the last token of what comes before it is fed by itself.
        """
        loaded, before = self.asked.loaded, self.common
        batch = prompt_batch(loaded, [self.asked.example], num_question_tokens=0 if before else 1)
        setting = CacheSetting(policy=Watching(), budget=UNLIMITED, positions="original")
        decoding = setting.decoding(loaded, replace(batch, question_ids=None), len(before) + 1)
        fed = [torch.tensor([token], device=loaded.device) for token in before]
        for token in fed[:-1]:
            decoding.step(token)
        first = masses(decoding.cache)
        if fed:
            decoding.step(fed[-1])
        else:
            assert batch.question_ids is not None
            decoding.extend(batch.question_ids)
        num_tokens = len(self.subject.pieces) + len(before)
        rows = [
            late[0, :, :num_tokens].cpu() - torch.nn.functional.pad(early[0].cpu(), (0, num_tokens))[:, :num_tokens]
            for early, late in zip(first, masses(decoding.cache), strict=True)
        ]
        found: Array = torch.stack(rows).float().numpy()
        return found

    def name(self, position: int) -> str:
        """Return a token as a reader calls it: a patch by row and column from 1, a word with what stands around it."""
        loaded, prompt = self.asked.loaded, len(self.subject.pieces)
        if position < prompt and self.subject.kinds[position] == int(Kind.IMAGE):
            index = int((self.subject.kinds[:position] == int(Kind.IMAGE)).sum())
            picture = seen_picture(loaded, self.asked.example, prompt_batch(loaded, [self.asked.example]))
            place = None if picture is None else picture.places[index]
            return f"image token {index + 1}" if place is None else f"patch row {place[0] + 1}, column {place[1] + 1}"
        pieces = [*self.subject.pieces, *token_pieces(loaded, self.common)]
        around = "".join(pieces[max(0, position - _CONTEXT_TOKENS) : position + _CONTEXT_TOKENS + 1])
        word = pieces[position].strip() or "(white space)"
        of = " of the answer" if position >= prompt else ""
        return f"\u201c{word}\u201d{of} in \u201c{' '.join(around.split())}\u201d"

    def compare_with(self, row: Mapping[str, Any], full: list[int], policy: list[int], where: str) -> None:
        """Raise MeasureError, one line, unless the answers are those that the sample's row holds."""
        loaded = self.asked.loaded
        pairs = (("full_text", full, "the full cache answers"), ("text", policy, "the policy answers"))
        for name, tokens, what in pairs:
            if (text := answer_text(loaded, tokens)) != row.get(name):
                raise MeasureError(
                    f"replayed here {what} {text!r:.60} to {self.asked.example.id}, where the record has "
                    f"{row.get(name)!r:.60}, so another answer would be explained; the record was measured {where}: "
                    "replay it there, or measure the cell again here"
                )
        at = first_divergence(policy, full)
        if "first_divergence_tokens" in row and row["first_divergence_tokens"] != at:
            raise MeasureError(
                f"replayed here the answers to {self.asked.example.id} part at token {at}, in the record at "
                f"{row['first_divergence_tokens']}; the record was measured {where}: replay it there"
            )


def _is_score(name: str, value: object) -> bool:
    return isinstance(value, int | float) and "divergence" not in name


def _most_attended(scene: _Scene, missing: Array, count: int) -> list[Evidence]:
    """Return the `count` entries of most attention among what is missing, each where it gets most; not the first token.

    The first token is looked at whatever it says, and so it is the evidence of nothing.
    """
    if not missing.any():
        return []
    attention = scene.attention()
    gone = missing[..., : attention.shape[-1]]
    found = np.where(gone, attention, -1.0)
    found[..., 0] = -1.0
    best = found.max(axis=(0, 1))
    evidence = []
    for position in np.argsort(-best, kind="stable")[:count].tolist():
        if best[position] > 0:
            layer, head = np.unravel_index(int(found[..., position].argmax()), found.shape[:2])
            evidence.append(
                Evidence(
                    position=position,
                    name=scene.name(position),
                    layer=int(layer),
                    head=int(head),
                    attention_fraction=float(best[position]),
                    missing_fraction=float(gone[..., position].mean()),
                )
            )
    return evidence


def _traced(scene: _Scene, policy: Replayed, evidence: Sequence[Evidence]) -> list[Evidence]:
    """Return `evidence` with when each entry left, whom it joined, and its rank then, from one more run."""
    last = _last_ranks(scene, evidence) if evidence else {}
    places, found = np.arange(policy.freed.shape[-1]), []
    for one in evidence:
        freed = policy.freed[one.layer, one.head]
        left = int(freed[one.position])
        stayed = ((freed < 0) | (freed > left)) & (places < len(scene.subject.pieces) + left)
        into = -1 if policy.merged is None else int(policy.merged[one.layer, one.head, one.position])
        rank, num_ranked = last.get(one.position, (None, None))
        joined, num_kept = None if into < 0 else scene.name(into), int(stayed.sum())
        found.append(replace(one, left_at=left, joined=joined, rank=rank, num_ranked=num_ranked, num_kept=num_kept))
    return found


def _last_ranks(scene: _Scene, evidence: Sequence[Evidence]) -> dict[int, tuple[int, int]]:
    """Return by position the rank, from 1, among how many, when the policy last chose with the entry there."""
    last: dict[int, tuple[int, int]] = {}

    def note(view: View, ranked: Tensor) -> Tensor:
        for one in evidence:
            place = view.position[0, one.head]
            if one.layer == view.layer and bool((place == one.position).any()):
                score = ranked[0, one.head]
                own = score[place == one.position]
                above = (place >= 0) & ((score > own) | ((score == own) & (place > one.position)))
                last[one.position] = int(above.sum()) + 1, int((place >= 0).sum())
        return ranked

    setting = scene.asked.setting
    scene.answer(replace(setting, policy=chosen_by(setting.policy, note)))
    return last


def _kept(scene: _Scene, one: Evidence, number: int) -> list[Run]:
    """Return the runs with an entry kept in the one layer and head, and everywhere."""
    here = Pin(position=one.position, layer=one.layer, head=one.head)
    return [
        scene.with_pins([here], f"{number} (layer {one.layer + 1}, head {one.head + 1})"),
        scene.with_pins([Pin(position=one.position)], f"{number} (everywhere)"),
    ]


def _controls(scene: _Scene, missing: Array, evidence: Sequence[Evidence], count: int) -> list[Run]:
    """Return runs with other entries kept, drawn from those that had gone from where the first evidence had."""
    if not evidence:
        return []
    taken = {0, *(one.position for one in evidence)}
    gone = [
        place for place in np.nonzero(missing[evidence[0].layer, evidence[0].head])[0].tolist() if place not in taken
    ]
    drawn = random.Random(scene.asked.example.id).sample(gone, min(count, len(gone)))
    return [scene.with_pins([Pin(position=place)], f"drawn: {scene.name(place)} (everywhere)") for place in drawn]
