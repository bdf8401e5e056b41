"""Policies that read pictures or the question: against their papers in plain Python, and on models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from kvbench.cache import Budget, Kind, Needs, Policy, PolicyCache, ScorePolicy, View
from kvbench.cache.policy import needs_of
from kvbench.cache.recording import PromptRecorder, Recording, cache_after
from kvbench.contract.driving import Held, drive, held_positions
from kvbench.datasets.scenes import Scenes
from kvbench.errors import ConfigError
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.policies.fastv import FastV
from kvbench.policies.finch import Finch
from kvbench.policies.look_m import LookM
from kvbench.policies.post_vision import PostVision
from kvbench.policies.prefixkv import PrefixKV
from kvbench.tasks.decode import CacheSetting, Decoding
from tests.covering import YAMLS, share_of
from tests.policies.test_scores import HEADS, ROWS, WINDOW, Cache, cache_of
from tests.tiny_models import random_tokens, tiny_model

NAMES = ("look_m", "fastv", "vl_cache", "prefixkv", "finch")
Scores = list[list[list[float]]]  # [row][head][entry, from the oldest]


def policy_named(name: str) -> Policy:
    (path,) = (path for path in YAMLS if path.stem == name)
    policy: Policy = instantiate(OmegaConf.load(path), _convert_="object")
    return policy


@dataclass(frozen=True, kw_only=True)
class Spanned:
    """A random cache of a prompt with a picture at [start, end) of each row, and a question from `asked` on."""

    cache: Cache
    start: list[int]
    end: list[int]
    asked: list[int]


def spanned(seed: int, lengths: list[int], policy: ScorePolicy, *, has_picture: bool = True) -> Spanned:
    cache, draw = cache_of(seed, lengths, policy, evicted=0, over=None), torch.Generator().manual_seed(seed)
    start, end, asked = [], [], []
    for length in lengths:
        start.append(int(torch.randint(0, length - 2, (), generator=draw)))
        end.append(int(torch.randint(start[-1], length, (), generator=draw)) if has_picture else start[-1])
        asked.append(int(torch.randint(1, length, (), generator=draw)))
    position = cache.view.position
    bounds = [torch.tensor(one)[:, None, None] for one in (start, end, asked)]
    view = replace(
        cache.view,
        picture_or_none=(position >= bounds[0]) & (position < bounds[1]),
        question_or_none=position >= bounds[2],
    )
    return Spanned(cache=replace(cache, view=view), start=start, end=end, asked=asked)


def look_m(one: Spanned) -> Scores:
    return [[[e.mass for e in head] for head in row] for row in one.cache.heads]


def prefixkv(one: Spanned) -> Scores:
    return [
        [[sum(head[i].mass for head in row) / HEADS for i in range(len(row[0]))] for _ in row]
        for row in one.cache.heads
    ]


def vl_cache(one: Spanned) -> Scores:
    """Sum the rows of queries that stand after the last picture token, of the newest in any case."""
    found = []
    for number, row in enumerate(one.cache.heads):
        seen = len(row[0])
        last = one.end[number] - 1 if one.end[number] > one.start[number] else -1
        backs = [back for back in range(1, min(WINDOW, seen) + 1) if seen - back > last or back == 1]
        found.append([[sum(e.rows[-back] for back in backs if back <= len(e.rows)) for e in head] for head in row])
    return found


def finch(one: Spanned) -> Scores:
    """Average the question's rows, each times the number of tokens that its query sees."""
    found = []
    for number, row in enumerate(one.cache.heads):
        seen = len(row[0])
        backs = [back for back in range(1, min(WINDOW, seen) + 1) if seen - back >= one.asked[number]]
        found.append([
            [
                sum(e.rows[-back] * (seen - back + 1) for back in backs if back <= len(e.rows)) / len(backs)
                for e in head
            ]
            for head in row
        ])  # fmt: skip
    return found


PAIRS: dict[str, tuple[ScorePolicy, Callable[[Spanned], Scores]]] = {
    "look_m": (LookM(), look_m),
    "prefixkv": (PrefixKV(), prefixkv),
    "vl_cache": (PostVision(), vl_cache),
    "finch": (Finch(), finch),
}
drawn = st.lists(st.integers(WINDOW + 1, 24), min_size=ROWS, max_size=ROWS)


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=share_of(40), deadline=None)
@given(seed=st.integers(0, 2**20), lengths=drawn, has_picture=st.booleans())
def test_a_score_is_what_the_paper_describes(name: str, seed: int, lengths: list[int], has_picture: bool) -> None:
    policy, slow = PAIRS[name]
    one = spanned(seed, lengths, policy, has_picture=has_picture)
    view = one.cache.view
    score = policy.score(view).expand(view.position.shape)
    for row, heads in enumerate(slow(one)):
        for head, expected in enumerate(heads):
            held = view.position[row, head] >= 0
            order = view.position[row, head][held].argsort()
            torch.testing.assert_close(score[row, head][held][order], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["look_m", "finch"])
@settings(max_examples=share_of(40), deadline=None)
@given(seed=st.integers(0, 2**20), lengths=drawn)
def test_what_stays_is_the_window_then_the_span_then_the_best(name: str, seed: int, lengths: list[int]) -> None:
    policy, slow = policy_named(name), PAIRS[name][1]
    assert isinstance(policy, ScorePolicy)
    one = spanned(seed, lengths, policy)
    view, plan = one.cache.view, policy.plan(one.cache.view)
    assert plan is not None
    for row, heads in enumerate(slow(one)):
        seen, budget = lengths[row], int(view.budget[row])
        recent = int(policy.recent_fraction * budget)
        spans = [
            one.start[row] > p or p >= one.end[row] if name == "look_m" else p >= one.asked[row] for p in range(seen)
        ]
        for head, scores in enumerate(heads):
            order = sorted(range(seen), key=lambda p: (p >= seen - recent, spans[p], scores[p], p))
            kept = view.position[row, head][plan.keep[row, head]].tolist()
            margin = abs(scores[order[-budget]] - scores[order[-budget - 1]])
            if margin > 1e-5 or margin == 0:
                assert sorted(kept) == sorted(order[-budget:])


@dataclass(frozen=True, kw_only=True)
class Rows(Policy):
    """Keeps everything, and notes the newest row of each layer by position, averaged over heads."""

    needs: ClassVar[Needs] = Needs.PROBS
    bounded: ClassVar[bool] = True
    rows: dict[int, Tensor]

    def plan(self, view: View) -> Any:
        raise AssertionError("the budget holds everything")

    def hand_over(self, view: View) -> Tensor | None:
        self.rows[view.layer] = view.probs.mean(dim=1)
        return None


PROMPT, PICTURE = 20, slice(3, 13)


def kinds(shift: int = 0) -> Tensor:
    kind = torch.zeros(1, PROMPT, dtype=torch.int8)
    kind[:, PICTURE.start + shift : PICTURE.stop + shift] = int(Kind.IMAGE)
    return kind


def held_of(policy: Policy, *, shift: int = 0, budget: int = 9, asked: int = 4) -> Held:
    model = tiny_model("llama_gqa")
    cache = PolicyCache(model, policy, Budget(tokens=budget), prompt_kind=kinds(shift), question_tokens=(asked,))
    return drive(model, cache, random_tokens(2, 1, PROMPT), PROMPT).held[0]


@pytest.mark.parametrize("budget", [12, 14, 17])
@pytest.mark.parametrize("first_layer", [1, 2])
def test_fastv_drops_from_all_later_layers_what_one_layers_newest_query_passes_over(
    first_layer: int, budget: int
) -> None:
    rows = Rows(rows={})
    held_of(rows, budget=PROMPT)
    held = held_of(FastV(first_layer=first_layer, protect="text"), budget=budget)
    for layer, heads in enumerate(one[0] for one in held):
        ranks = rows.rows[first_layer - 1 if layer >= first_layer else layer][0].tolist()
        picture = sorted(range(PICTURE.start, PICTURE.stop), key=lambda p: ranks[p])
        text = {p for p in range(PROMPT) if not PICTURE.start <= p < PICTURE.stop}
        stays = text | set(picture[len(picture) - (budget - len(text)) :])
        assert [set(head) for head in heads] == [stays] * 2
    assert (held[0] == held[1]) == (first_layer == 1)


@pytest.mark.parametrize("name", NAMES)
def test_other_spans_keep_other_entries_where_the_policy_reads_them(name: str) -> None:
    policy = policy_named(name)
    budget = 8 if name == "finch" else 14
    plain = held_of(policy, budget=budget)
    assert plain == held_of(policy, budget=budget), "the same prompt, the same entries"
    assert (plain != held_of(policy, budget=budget, shift=4)) == (Needs.PICTURE in needs_of(policy))
    assert (plain != held_of(policy, budget=budget, asked=7)) == (Needs.QUESTION in needs_of(policy))


def test_a_question_that_is_not_known_leaves_finch_all_its_window() -> None:
    one = spanned(5, [20, 20], Finch())
    view = replace(one.cache.view, question_or_none=torch.zeros_like(one.cache.view.valid))
    every = replace(one.cache.view, question_or_none=one.cache.view.valid)
    assert torch.equal(Finch().score(view), Finch().score(every))


@pytest.mark.parametrize(("kind", "wrong"), [(FastV, {"first_layer": 0}), (PrefixKV, {"fixed_point": 0})])
def test_a_setting_out_of_range_is_refused(kind: type[Policy], wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)


@pytest.fixture(scope="module")
@torch.inference_mode()
def described(bundled: LoadedModel) -> tuple[PromptBatch, Recording, Tensor]:
    """Two scenes, one asked another question, and what their prompts leave for all of the policies."""
    batch = prompt_batch(bundled, Scenes(num_samples=2, ask="both").examples()[:2])
    recorder = PromptRecorder(bundled.model, [policy_named(name) for name in NAMES])
    logits = Decoding(bundled, batch, recorder).logits
    return batch, recorder.prompt, logits


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_on_the_picture_model_a_policy_keeps_what_its_spans_say(
    bundled: LoadedModel, described: tuple[PromptBatch, Recording, Tensor], name: str
) -> None:
    policy, (batch, recording, logits) = policy_named(name), described
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.2), positions=policy.native_positions)
    cache = cache_after(recording, setting.cache(bundled, batch, 2))
    decoding = setting.decoding_with(bundled, batch, cache, prompt_logits=logits)
    assert batch.find_question_tokens is not None
    prompt, held, asked = batch.prompt_tokens, held_positions(cache), batch.find_question_tokens()
    assert sum(len(head) for layer in held for row in layer for head in row) <= sum(
        int(0.2 * length) * len(held) * HEADS for length in prompt
    )
    for row, length in enumerate(prompt):
        text = set((batch.kind[row, -length:] != int(Kind.IMAGE)).nonzero()[:, 0].tolist())
        question = set(range(length - asked[row], length))
        assert question < text
        for layer in held:
            for head in layer[row]:
                assert name not in ("look_m", "fastv") or text <= set(head)
                assert name != "finch" or question <= set(head)
    decoding.step(decoding.logits.argmax(dim=-1))
    assert bool(decoding.logits.isfinite().all())
