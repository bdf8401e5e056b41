"""Where pictures and the question stand: aligned with what is held, through pads, pieces, turns, cuts and steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Kind, Needs, Policy, PolicyCache, ScorePolicy, View, cache_argument
from kvbench.cache.selection import keep_top, ranked_above
from kvbench.contract.driving import Trace, drive, left_padded
from kvbench.errors import ConfigError, ModelSupportError
from kvbench.kernels.dispatch import interpreted, kernels_forced
from kvbench.policies.allocation.ada import Ada
from kvbench.policies.h2o import H2O
from kvbench.policies.key_norm import KeyNorm
from kvbench.policies.prefixkv import PrefixKV
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

LENGTHS, STEPS = (9, 17), 6
QUESTIONS = (2, 5)
PROMPT = max(LENGTHS)


@dataclass(frozen=True, kw_only=True)
class Spy(ScorePolicy):
    """Loses what lies in the middle, and notes by layer what it was shown at every cut."""

    needs = Needs.PICTURE | Needs.QUESTION
    seen: list[tuple[int, int, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list, compare=False)

    def score(self, view: View) -> Tensor:
        shown = (view.position, view.picture, view.question, view.text)
        self.seen.append((view.layer, int(view.seen[0]), *(one.clone() for one in shown)))
        return (view.position - view.seen[:, None, None] // 2).abs().float()


def prompt() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and mask (B, T + STEPS), kinds (B, T): every third token of a row is of a picture, pads included."""
    tokens, mask = left_padded([random_tokens(row, length) for row, length in enumerate(LENGTHS)])
    kind = torch.where((torch.arange(PROMPT) % 3 == 0) | (mask == 0), int(Kind.IMAGE), int(Kind.TEXT))
    steps = random_tokens(9, len(LENGTHS), STEPS)
    return torch.cat((tokens, steps), dim=1), torch.cat((mask, torch.ones_like(steps)), dim=1), kind.to(torch.int8)


def expected(row: int, position: int, kind: Tensor) -> tuple[bool, bool, bool]:
    """Whether a token is of the picture, of the question, of the prompt's text."""
    length = LENGTHS[row]
    of_prompt = 0 <= position < length
    picture = of_prompt and int(kind[row, PROMPT - length + position]) == int(Kind.IMAGE)
    return picture, of_prompt and position >= length - QUESTIONS[row], of_prompt and not picture


def check(spy: Spy, kind: Tensor) -> None:
    assert spy.seen
    for _, _, position, *masks in spy.seen:
        for row in range(len(LENGTHS)):
            for at, *shown in zip(
                position[row].flatten().tolist(), *(m[row].flatten().tolist() for m in masks), strict=True
            ):
                assert tuple(shown) == expected(row, at, kind), (row, at)


PARTS: dict[str, dict[str, Any]] = {"plain": {}, "blocks": {"every_tokens": 3}, "ragged": {"allocation": Ada()}}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("pieces", [(17,), (5, 11, 1)], ids=str)
def test_spans_follow_pads_pieces_cuts_and_steps(tiny_llama: Any, part: str, pieces: tuple[int, ...]) -> None:
    (tokens, mask, kind), spy = prompt(), Spy(**PARTS[part])
    cache = PolicyCache(
        tiny_llama, spy, Budget(tokens=8), prompt_kind=kind, question_tokens=QUESTIONS, prompt_tokens=PROMPT
    )
    place, start = (mask.cumsum(-1) - 1).clamp(min=0), 0
    for size in (*pieces, *(1,) * STEPS):
        now = slice(start, start + size)
        given = {"attention_mask": mask[:, : now.stop], "position_ids": place[:, now]}
        with torch.no_grad():
            tiny_llama(tokens[:, now], **given, **cache_argument(tiny_llama, cache))
        start += size
    if pieces == (PROMPT,):
        check(spy, kind)
        return
    last = [one for one in spy.seen if one[1] >= LENGTHS[0]]  # once all of the prompt has come, as in one piece
    object.__setattr__(spy, "seen", last)
    check(spy, kind)


def test_a_later_chunk_is_the_question_then_and_so_is_a_hidden_one(tiny_llama: Any) -> None:
    tokens, spy = random_tokens(3, 1, 20), Spy()
    kind = torch.zeros(1, 12, dtype=torch.int8)
    cache = PolicyCache(tiny_llama, spy, Budget(tokens=7), prompt_kind=kind, question_tokens=(0,))
    for start, end, question in ((0, 12, ()), (12, 16, (12, 13, 14, 15)), (16, 20, (16, 17, 18, 19))):
        with torch.no_grad():
            tiny_llama(tokens[:, start:end], **cache_argument(tiny_llama, cache))
        _, _, position, _, asked, _ = spy.seen[-1]
        assert sorted(position[0, 0][asked[0, 0]].tolist()) == list(question)


def test_what_is_not_given_is_told_and_taken_for_none(tiny_llama: Any) -> None:
    with pytest.warns(UserWarning, match="Spy reads Needs.PICTURE, but prompt_kind is not given"):
        PolicyCache(tiny_llama, Spy(), Budget(tokens=5), question_tokens=(3,))
    with pytest.warns(UserWarning, match="H2O reads Needs.QUESTION, but question_tokens is not given"):
        PolicyCache(tiny_llama, H2O(protect="question"), Budget(tokens=5))
    cache = PolicyCache(tiny_llama, H2O(protect="question"), Budget(tokens=5), question_tokens=(3, 3))
    with pytest.raises(ModelSupportError, match="question_tokens has 2 numbers, the prompt 1 rows"):
        tiny_llama(random_tokens(0, 1, 9), **cache_argument(tiny_llama, cache))


NUMBERS = st.floats(allow_nan=False, width=32) | st.sampled_from([0.0, -0.0, torch.inf, -torch.inf, 1e38, -1e38])


@settings(max_examples=share_of(200), deadline=None)
@given(scores=st.lists(st.tuples(NUMBERS, st.booleans()), min_size=2, max_size=12))
def test_what_is_first_is_above_all_else_and_each_keeps_its_order(scores: list[tuple[float, bool]]) -> None:
    values, first = (torch.tensor([column])[None] for column in zip(*scores, strict=True))
    ranked = ranked_above(values.float(), first)[0, 0].tolist()
    limit = torch.finfo(torch.float32).max / 2
    bounded = [min(max(value, -limit), limit) for value, _ in scores]
    for one, (a, mine) in zip(ranked, zip(bounded, first[0, 0].tolist(), strict=True), strict=True):
        assert abs(one) < torch.inf
        for other, (b, theirs) in zip(ranked, zip(bounded, first[0, 0].tolist(), strict=True), strict=True):
            if mine != theirs:
                assert (one > other) == mine
            elif abs(a - b) > 1e-6 * max(abs(a), abs(b), 1e-30) or a == b:
                assert (one > other, one == other) == (a > b, a == b)


def test_no_number_stays_none() -> None:
    ranked = ranked_above(torch.tensor([[[1.0, torch.nan, 2.0]]]), torch.tensor([[[True, True, False]]]))
    assert ranked.isnan().tolist() == [[[False, True, False]]]


def protected_trace(policy: Policy, budget: int, kind: Tensor | None = None) -> tuple[Trace, Tensor]:
    tokens, mask, kinds = prompt()
    given = kinds if kind is None else kind
    cache = PolicyCache(
        tiny_model("llama_gqa"), policy, Budget(tokens=budget), prompt_kind=given, question_tokens=QUESTIONS
    )
    return drive(tiny_model("llama_gqa"), cache, tokens, PROMPT, mask), given


@pytest.mark.parametrize("budget", [3, 8, 12])
@pytest.mark.parametrize("span", ["picture", "question", "text"])
@pytest.mark.parametrize("kind", [H2O, KeyNorm])
def test_a_protected_span_is_kept_first_and_never_above_the_budget(
    kind: type[ScorePolicy], span: Any, budget: int
) -> None:
    trace, kinds = protected_trace(kind(protect=span), budget)
    name = ("picture", "question", "text").index(span)
    for step, held in enumerate(trace.held):
        for layer in held:
            for row, heads in enumerate(layer):
                seen = LENGTHS[row] + step
                spanned = {p for p in range(LENGTHS[row]) if expected(row, p, kinds)[name]}
                recent = budget // 2 if kind is H2O else 0
                window = set(range(seen - recent, seen))
                for head in heads:
                    assert len(head) == min(budget, seen)
                    kept, lost = set(head), set(range(seen)) - set(head)
                    if step == 0 and lost & spanned:  # some of it had to go: nothing else stays but the window
                        assert kept <= spanned | window
                    if len(spanned | window) <= budget and step == 0:
                        assert spanned <= kept


def test_other_spans_keep_other_entries() -> None:
    """The test of the tests above: kinds that are moved by one token change what stays."""
    trace, kinds = protected_trace(KeyNorm(protect="picture"), 6)
    moved, _ = protected_trace(KeyNorm(protect="picture"), 6, kinds.roll(1, dims=1))
    assert trace.held[0] != moved.held[0]
    assert protected_trace(KeyNorm(protect="text"), 6)[0].held[0] != trace.held[0]


def test_of_what_is_protected_the_best_stays_as_the_score_alone_ranks_it() -> None:
    trace, kinds = protected_trace(KeyNorm(protect="picture"), 2)
    model, (tokens, mask, _) = tiny_model("llama_gqa"), prompt()
    whole = PolicyCache(model, KeyNorm(), Budget(tokens=PROMPT))
    drive(model, whole, tokens[:, :PROMPT], PROMPT, mask[:, :PROMPT])
    for layer, cached in enumerate(whole.policy_layers):
        assert cached.slots is not None
        entries = cached.slots.entries
        norm = -entries.keys.norm(dim=-1)
        spanned = torch.tensor([
            [[expected(row, p, kinds)[0] for p in head] for head in heads]
            for row, heads in enumerate(entries.position.tolist())
        ])  # fmt: skip
        keep = keep_top(norm.masked_fill(~spanned, -1e30), entries.position, torch.tensor([2, 2]))
        for row in range(len(LENGTHS)):
            for head in range(2):
                stay = sorted(entries.position[row, head][keep[row, head]].tolist())
                assert trace.held[0][layer][row][head] == tuple(stay)


@pytest.mark.skipif(not interpreted(), reason="on a GPU the engines are compared")
@pytest.mark.long
@pytest.mark.parametrize("span", ["picture", "question", "text"])
def test_kernels_protect_what_plain_torch_protects(span: Any) -> None:
    traces = []
    for by_kernels in (True, False):
        with kernels_forced(by_kernels):
            traces.append(protected_trace(H2O(protect=span), 8)[0])
    assert traces[0].held == traces[1].held


def test_a_policy_that_chooses_by_itself_protects_nothing() -> None:
    with pytest.raises(ConfigError, match=r"policy.protect is carried out by .* and victim, but PrefixKV"):
        PolicyCache(tiny_model("llama_gqa"), PrefixKV(protect="text"), Budget(tokens=5))
    with pytest.raises(ConfigError, match=r"policy.protect is 'texts'; did you mean 'text'"):
        H2O(protect="texts")  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Relayed(ScorePolicy):
    """Every layer scores by what the layers before it handed over; the first two of three hand something over."""

    read: list[tuple[int, float | None]] = field(default_factory=list, compare=False)

    def score(self, view: View) -> Tensor:
        self.read.append((view.layer, None if view.handed is None else float(view.handed[0])))
        return view.position.float()

    def hand_over(self, view: View) -> Tensor | None:
        return view.position.new_full((len(view.position),), 7).float() if view.layer == 0 else None


def test_what_a_layer_hands_over_reaches_later_layers_of_the_same_prompt_only(tiny_llama: Any) -> None:
    policy = Relayed()
    cache = PolicyCache(tiny_llama, policy, Budget(tokens=5))
    drive(tiny_llama, cache, random_tokens(1, 1, 12), 10)
    assert policy.read == [(0, 7.0), (1, 7.0), *[(0, None), (1, None)] * 2]
