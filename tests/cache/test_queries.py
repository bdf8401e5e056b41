"""Statistics of queries, each computed only if declared: against plain loops over what a model's layers made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Needs, Plan, PolicyCache, ScorePolicy, View, When, cache_argument
from kvbench.cache import attention as queries_of
from kvbench.cache.attention import QueryRing, query_moments, ring_after, rows_of
from kvbench.cache.layer import PolicyLayer
from kvbench.cache.positions import Rotation
from kvbench.cache.recording import PromptRecorder, cache_after
from kvbench.contract.driving import drive, held_positions
from kvbench.errors import ConfigError, ModelSupportError, PolicyError
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

quick = settings(max_examples=share_of(40), deadline=None, derandomize=True)
ROTATION = Rotation(frequencies=torch.tensor([1.0, 0.1]))
PROMPT, STEPS, WINDOW = 24, 13, 4


@quick
@given(seed=st.integers(0, 2**32), length=st.integers(1, 12), pads=st.integers(0, 5), skip=st.integers(0, 4))
def test_moments_are_those_of_the_queries_before_rotation(seed: int, length: int, pads: int, skip: int) -> None:
    torch.manual_seed(seed)
    plain = torch.randn(2, 3, length, 5)
    position = torch.arange(length).expand(2, length).clone()
    position[1] = (position[1] - pads).clamp(min=-1)
    rotated = ROTATION.turn(plain, position[:, None].expand(2, 3, length))
    before, queries_of._BLOCK = queries_of._BLOCK, 5
    try:
        mean, covariance = query_moments(rotated, position, ROTATION, skip)
    finally:
        queries_of._BLOCK = before
    for row in range(2):
        kept = [q for q in range(length) if position[row, q] >= skip]
        for head in range(3):
            states = plain[row, head, kept].double()
            wanted = states.mean(dim=0) if kept else torch.zeros(5, dtype=torch.float64)
            torch.testing.assert_close(mean[row, head].double(), wanted, rtol=1e-4, atol=1e-5)
            spread = (states - wanted).T @ (states - wanted) / max(1, len(kept))
            torch.testing.assert_close(covariance[row, head].double(), spread, rtol=1e-4, atol=1e-5)


@quick
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 5),
    prompt=st.integers(1, 7),
    pads=st.integers(0, 6),
    steps=st.integers(0, 9),
)
def test_a_ring_holds_the_last_queries_of_each_row(seed: int, size: int, prompt: int, pads: int, steps: int) -> None:
    torch.manual_seed(seed)
    lists: list[list[tuple[int, Tensor]]] = [[], []]
    ring: QueryRing | None = None
    position = torch.arange(prompt).expand(2, prompt).clone()
    position[1] = (position[1] - min(pads, prompt - 1)).clamp(min=-1)
    for chunk in range(2):  # a prompt, then a second one
        query = torch.randn(2, 4, prompt, 3)
        at = position if chunk == 0 else torch.arange(prompt) + 1 + position[:, -1:]
        ring = ring_after(ring, query[:, :, -size:], at[:, -size:], size, 0.5)
        for row in range(2):
            lists[row] += [(int(p), query[row, :, n]) for n, p in enumerate(at[row].tolist()) if p >= 0]
        position = at
    assert ring is not None
    address = ring.queries.data_ptr()
    for _ in range(steps):
        position = position[:, -1:] + 1
        query = torch.randn(2, 4, 1, 3)
        ring.put(query, position[:, 0])
        for row in range(2):
            lists[row].append((int(position[row, 0]), query[row, :, 0]))
    assert ring.queries.data_ptr() == address
    keys, key_position = torch.randn(2, 2, 6, 3), torch.randint(-1, 12, (2, 2, 6))
    rows = ring.rows(keys, key_position)
    for row in range(2):
        last = lists[row][-size:]
        for place, (at_token, states) in enumerate(last, start=size - len(last)):
            for head in range(4):
                sees = [t for t in range(6) if 0 <= int(key_position[row, head // 2, t]) <= at_token]
                expected = torch.zeros(6)
                if sees:
                    expected[sees] = (0.5 * keys[row, head // 2, sees] @ states[head]).softmax(-1)
                torch.testing.assert_close(rows[row, head // 2, head % 2, place], expected, rtol=1e-5, atol=1e-6)
        assert bool((rows[row, :, :, : size - len(last)] == 0).all())


@dataclass(frozen=True, kw_only=True)
class Watcher(ScorePolicy):
    """Keeps the newest and notes what it saw; frozen, so notes lie in the class."""

    needs: ClassVar[Needs] = Needs.WINDOW | Needs.HEAD_ROWS | Needs.OUTPUT
    window_tokens: ClassVar[int] = WINDOW
    views: ClassVar[list[View]] = []

    def plan(self, view: View) -> Plan | None:
        kept = replace(view, keys=view.keys.clone(), position=view.position.clone(), seen=view.seen.clone())
        type(self).views.append(kept)  # a block is cut in place
        return super().plan(view)

    def score(self, view: View) -> Tensor:
        return view.position.float()


@dataclass(frozen=True, kw_only=True)
class MomentWatcher(Watcher):
    needs: ClassVar[Needs] = Needs.MOMENTS
    when: ClassVar[When] = When.PREFILL
    moments_from: ClassVar[int] = 3


@pytest.fixture(autouse=True)
def _forget() -> None:
    Watcher.views.clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """Every query that each layer was asked with, rotated, one row."""
    found: dict[int, list[Tensor]] = {}
    attend = PolicyLayer.attend

    def noting(layer: PolicyLayer, query: Tensor, *arguments: Any) -> Tensor:
        found.setdefault(layer.setup.layer, []).extend(query[0].split(1, dim=1))
        return attend(layer, query, *arguments)

    monkeypatch.setattr(PolicyLayer, "attend", noting)
    return found


def test_rows_of_the_last_queries_are_there_wherever_a_plan_is_made(asked: dict[int, list[Tensor]]) -> None:
    model, policy = tiny_model("llama_gqa"), Watcher(every_tokens=3)
    cache = PolicyCache(model, policy, Budget(tokens=9), reserve_tokens=STEPS)
    drive(model, cache, random_tokens(3, 1, PROMPT + STEPS), PROMPT)
    assert len(Watcher.views) == 2 * (1 + STEPS // 3)
    for number, view in enumerate(Watcher.views):
        seen = int(view.seen)
        assert view.prefill == (number < 2)
        torch.testing.assert_close(view.window, view.head_rows.mean(dim=2), rtol=1e-5, atol=1e-6)
        last = torch.cat(asked[view.layer][seen - WINDOW : seen], dim=1)[None]
        at = torch.arange(seen - WINDOW, seen)[None]
        expected = rows_of(last, at, view.keys, view.position, 8**-0.5)
        torch.testing.assert_close(view.head_rows, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.head_rows.sum(dim=-1), torch.ones(1, 2, 2, WINDOW), rtol=1e-5, atol=1e-5)


def test_a_ring_is_counted_and_only_where_blocks_are_cut() -> None:
    model, bytes_of = tiny_model("llama_gqa"), {}
    for every in (1, 3):
        cache = PolicyCache(model, SeesWindow(every_tokens=every), Budget(tokens=9), reserve_tokens=STEPS)
        drive(model, cache, random_tokens(3, 1, PROMPT), PROMPT)
        bytes_of[every] = cache.occupancy().statistics_bytes
    assert bytes_of == {1: 0, 3: 2 * WINDOW * (4 * 8 * 4 + 8)}  # layers, queries, heads x numbers x float32, position


@dataclass(frozen=True, kw_only=True)
class SeesWindow(Watcher):
    needs: ClassVar[Needs] = Needs.WINDOW


def test_a_block_is_cut_from_a_ring_alike_alone_and_in_a_padded_batch() -> None:
    @dataclass(frozen=True, kw_only=True)
    class ByRing(ScorePolicy):
        needs: ClassVar[Needs] = Needs.WINDOW
        window_tokens: ClassVar[int] = WINDOW

        def score(self, view: View) -> Tensor:
            return view.window.sum(dim=2)

    model, policy, budget = tiny_model("llama_gqa"), ByRing(num_recent=2, every_tokens=3), Budget(tokens=9)
    rows, more = [random_tokens(4, PROMPT), random_tokens(5, 6), random_tokens(6, 2)], random_tokens(7, STEPS)
    tokens, mask = torch.zeros(3, PROMPT + STEPS, dtype=torch.int64), torch.ones(3, PROMPT + STEPS, dtype=torch.int64)
    for index, row in enumerate(rows):
        mask[index, : PROMPT - len(row)] = 0
        tokens[index] = torch.cat((torch.zeros(PROMPT - len(row), dtype=torch.int64), row, more))
    together = drive(model, PolicyCache(model, policy, budget), tokens, PROMPT, mask)
    for index, row in enumerate(rows):
        alone = drive(model, PolicyCache(model, policy, budget), torch.cat((row, more))[None], len(row))
        for one, other in zip(together.held, alone.held, strict=True):
            assert [layer[index] for layer in one] == [layer[0] for layer in other]


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3"])
def test_moments_and_output_weights_are_the_models_own(name: str, asked: dict[int, list[Tensor]]) -> None:
    model = tiny_model(name)
    drive(model, PolicyCache(model, MomentWatcher(), Budget(tokens=9)), random_tokens(3, 1, PROMPT), PROMPT)
    for view in Watcher.views:
        queries = torch.cat(asked[view.layer], dim=1)  # (Hq, T, D), rotated
        plain = view.rotation.turn(queries, -torch.arange(PROMPT).expand(queries.shape[:2]))[:, 3:].double()
        mean = plain.mean(dim=1)
        torch.testing.assert_close(view.query_mean[0].flatten(0, 1).double(), mean, rtol=1e-4, atol=1e-4)
        centred = plain - mean[:, None]
        covariance = centred.transpose(-1, -2) @ centred / plain.shape[1]
        torch.testing.assert_close(view.query_covariance[0].flatten(0, 1).double(), covariance, rtol=1e-4, atol=1e-4)
    Watcher.views.clear()
    drive(model, PolicyCache(model, Watcher(), Budget(tokens=9)), random_tokens(3, 1, PROMPT), PROMPT)
    for view in Watcher.views:
        heads = torch.randn(4, 8)
        projected = model.model.layers[view.layer].self_attn.o_proj(heads.flatten())
        assert view.output_weight.shape == (2, 2, 8, 32)
        by_head = torch.einsum("hd,hde->e", heads, view.output_weight.flatten(0, 1))
        torch.testing.assert_close(by_head, projected, rtol=1e-4, atol=1e-4)
        assert view.output_weight.untyped_storage().data_ptr() == (
            model.model.layers[view.layer].self_attn.o_proj.weight.untyped_storage().data_ptr()
        )


@pytest.mark.parametrize("policy", [Watcher(every_tokens=3), MomentWatcher()], ids=["rows", "moments"])
def test_a_cache_from_a_recording_sees_the_same_statistics(policy: Watcher) -> None:
    model, tokens = tiny_model("llama_gqa"), random_tokens(3, 1, PROMPT + STEPS)
    own = PolicyCache(model, policy, Budget(tokens=9), reserve_tokens=STEPS)
    drive(model, own, tokens, PROMPT)
    seen, held = list(Watcher.views), held_positions(own)
    Watcher.views.clear()
    recorder = PromptRecorder(model, [policy, SeesWindow()])
    with torch.no_grad():
        model(tokens[:, :PROMPT], **cache_argument(model, recorder), use_cache=True)
    cache = cache_after(recorder.prompt, PolicyCache(model, policy, Budget(tokens=9), reserve_tokens=STEPS))
    for at in range(PROMPT, PROMPT + STEPS):
        drive(model, cache, tokens[:, at : at + 1], 1)
    assert held_positions(cache) == held
    fields = ("window_or_none", "head_rows_or_none", "query_mean_or_none", "query_covariance_or_none")
    for one, other in zip(seen, Watcher.views, strict=True):
        for name in fields:
            mine, theirs = getattr(one, name), getattr(other, name)
            assert (mine is None) == (theirs is None)
            assert mine is None or torch.equal(mine, theirs)


def test_what_is_not_declared_is_not_there() -> None:
    model = tiny_model("llama_gqa")
    drive(model, PolicyCache(model, SeesWindow(), Budget(tokens=9)), random_tokens(3, 1, PROMPT), PROMPT)
    (view, _) = Watcher.views
    for name, need in (("head_rows", "HEAD_ROWS"), ("query_mean", "MOMENTS"), ("query_covariance", "MOMENTS"),
                       ("rotation", "MOMENTS"), ("output_weight", "OUTPUT")):  # fmt: skip
        with pytest.raises(PolicyError, match=rf"reads Needs\.{need}, which it did not declare"):
            getattr(view, name)


def test_what_cannot_be_had_is_refused() -> None:
    model = tiny_model("llama_gqa")
    with pytest.raises(ConfigError, match="kept as they were rotated, but positions is 'in_cache'"):
        PolicyCache(model, SeesWindow(every_tokens=3), Budget(tokens=9), positions="in_cache")

    class Other:
        config, _get = model.config, None

        def get_decoder(self) -> Any:
            return self

        rotary_emb = None
        layers: ClassVar[list[Any]] = [None, None]

    with pytest.raises(ModelSupportError, match="reads moments of queries before rotation, and Other"):
        PolicyCache(Other(), MomentWatcher(), Budget(tokens=9))
    with pytest.raises(ModelSupportError, match="Other has no plain weight self_attn"):
        PolicyCache(Other(), Watcher(), Budget(tokens=9))
