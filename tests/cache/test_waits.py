"""A prompt waits for the device once, not in every layer; what is wrong in a layer is told at the end of its pass."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from kvbench.cache import Budget, Plan, Policy, PolicyCache, ScorePolicy, View, When
from kvbench.cache import layer as cache_layer
from kvbench.cache.attention import attach, cache_argument
from kvbench.cache.slots import Entries, settle
from kvbench.cache.view import Doubts, Needs
from kvbench.contract.driving import drive
from kvbench.errors import NonFiniteChoiceError, PolicyError
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.voronoi import Voronoi
from kvbench.policies.released.elastic import ElasticReleased
from kvbench.policies.released.local_elastic import LocalElasticRelease
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.policies.tova import TOVA
from tests.tiny_models import random_tokens, tiny_model

PROMPT = 24
MERGING = SnapKV(num_recent=4, merge=Voronoi())


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts whatever would make a host wait for a GPU: reading a number, and copying one there."""
    counted: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            counted[name] += 1
            return original(*args, **options)

        return call

    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
    monkeypatch.setattr(torch, "tensor", counting("tensor", torch.tensor))
    return counted


def with_layers(number: int, heads: int | None = None) -> Any:
    config = copy.deepcopy(tiny_model("llama_gqa", attached=False).config)
    config.num_hidden_layers, config.layer_types = number, None
    config.num_key_value_heads = heads or config.num_key_value_heads
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    assert len(model.model.layers) == number
    attach(model)
    return model


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "policy",
    [
        Full(),
        H2O(),
        SnapKV(num_recent=4),
        StreamingLLM(),
        TOVA(),
        Elastic(),
        ElasticReleased(),
        LocalElasticRelease(),
        MERGING,
    ],
)
def test_a_prompt_of_more_layers_waits_no_more_often(policy: Policy, padded: bool, waits: Counter[str]) -> None:
    found = []
    for number in (2, 5):
        model, tokens = with_layers(number), random_tokens(3, 2, PROMPT)
        mask = torch.ones_like(tokens)
        mask[1, : 3 if padded else 0] = 0
        cache = PolicyCache(model, policy, Budget(fraction=0.5))
        waits.clear()
        model(tokens, attention_mask=mask if padded else None, **cache_argument(model, cache))
        found.append(Counter(waits))
    assert found[0] == found[1]


@dataclass(frozen=True, kw_only=True)
class Sparing(Policy):
    """Keeps the newest, fewer than it may in some layers, rows and heads."""

    when: ClassVar[When] = When.BOTH
    layers: tuple[int, ...] = (0, 2)

    def plan(self, view: View) -> Plan:
        batch, heads, _ = view.position.shape
        fewer = (1 + torch.arange(batch)[:, None] + 2 * torch.arange(heads)) * (view.layer in self.layers)
        most = (view.budget[:, None] - fewer).clamp(min=1)[..., None]
        return Plan(keep=view.valid & (view.position >= view.seen[:, None, None] - most))

    def victim(self, view: View) -> Tensor:
        return torch.where(view.valid, view.position, 2**40).argmin(dim=-1)


@dataclass(frozen=True, kw_only=True)
class SparingPrompt(Sparing):
    """The same, and what is generated stays."""

    when: ClassVar[When] = When.PREFILL


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("reserve_tokens", [0, 6])
@pytest.mark.parametrize("sparing", [(), (0, 2), (1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("kind", [Sparing, SparingPrompt])
def test_what_a_plan_kept_is_counted_after_the_pass_as_it_is_in_each_layer(
    kind: type[Sparing], sparing: tuple[int, ...], reserve_tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = with_layers(4, heads=rows), random_tokens(3, rows, PROMPT + 6)
    mask = torch.ones_like(tokens)
    mask[-1, :5] = 0
    found = []
    for safely in (True, False):
        monkeypatch.setattr(cache_layer, "plans_safely", lambda _, safely=safely: safely)
        cache = PolicyCache(model, kind(layers=sparing), Budget(fraction=0.5), reserve_tokens=reserve_tokens)
        trace = drive(model, cache, tokens, PROMPT, mask)
        cache.expect_prompt(PROMPT)
        more = torch.cat((mask, torch.ones_like(tokens[:, :PROMPT])), dim=-1)
        position = more.cumsum(-1)[:, -PROMPT:] - 1
        later = model(tokens[:, :PROMPT], attention_mask=more, position_ids=position, **cache_argument(model, cache))
        trace.logits.append(later.logits)
        layers = cache.policy_layers
        counted = [(one.ledger, one.slots.capacity, one.counts.budget.tolist()) for one in layers]
        found.append((trace, [*counted, cache.occupancy()]))
    (late, late_counts), (soon, soon_counts) = found
    assert late_counts == soon_counts
    assert late.held == soon.held
    assert all(torch.equal(one, other) for one, other in zip(late.logits, soon.logits, strict=True))


@dataclass(frozen=True, kw_only=True)
class NanFrom(ScorePolicy):
    """Scores are no numbers from a layer on."""

    first: int

    def score(self, view: View) -> Tensor:
        return torch.full(view.position.shape, torch.nan if view.layer >= self.first else 1.0)


@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_first_layer_that_went_wrong_is_told_before_the_prompt_returns(first: int) -> None:
    model = with_layers(4)
    with pytest.raises(NonFiniteChoiceError, match=f"in layer {first};"):
        drive(model, PolicyCache(model, NanFrom(first=first), Budget(tokens=9)), random_tokens(3, 1, PROMPT), PROMPT)


def test_a_cache_that_is_reset_forgets_what_it_doubted() -> None:
    doubts = Doubts()
    doubts.note(torch.tensor(False), lambda: PolicyError("not this"))
    doubts.note(torch.tensor(True), lambda: PolicyError("this one"))
    doubts.note(torch.tensor(True), lambda: PolicyError("nor this"))
    with pytest.raises(PolicyError, match="this one"):
        doubts.look()
    doubts.look()
    doubts.note(torch.tensor(True), lambda: PolicyError("of an earlier prompt"))
    doubts.clear()
    doubts.look()


@dataclass(frozen=True, kw_only=True)
class ReadsOutput(ScorePolicy):
    """Notes which output projection each layer's view has; frozen, so notes lie in the class."""

    needs: ClassVar[Needs] = Needs.OUTPUT
    seen: ClassVar[dict[tuple[bool, int], list[int]]] = {}

    def score(self, view: View) -> Tensor:
        place = view.output_weight.untyped_storage().data_ptr()
        type(self).seen.setdefault((view.prefill, view.layer), []).append(place)
        return view.position.float()


def test_layers_that_share_counts_see_their_own_weights_at_every_step() -> None:
    model = with_layers(3)
    ReadsOutput.seen.clear()
    drive(model, PolicyCache(model, ReadsOutput(), Budget(tokens=9)), random_tokens(3, 1, PROMPT + 3), PROMPT)
    own = [layer.self_attn.o_proj.weight.untyped_storage().data_ptr() for layer in model.model.layers]
    assert {key[0] for key in ReadsOutput.seen} == {True, False}
    assert all(set(places) == {own[layer]} for (_, layer), places in ReadsOutput.seen.items())


@given(st.integers(1, 9), st.integers(0, 4), st.booleans(), st.integers(0, 2**31))
def test_what_stays_whole_and_in_order_is_settled_as_anything_else(
    length: int, more: int, has_mass: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    position = torch.arange(length).expand(2, 3, length)
    entries = Entries(
        keys=torch.randn(2, 3, length, 4, generator=draw),
        values=torch.randn(2, 3, length, 4, generator=draw),
        position=position,
        kind=torch.randint(0, 2, position.shape, generator=draw, dtype=torch.int8),
        mass=torch.rand(position.shape, generator=draw) if has_mass else None,
    )
    by_order, plain = (settle(entries, None, length + more, in_order=given) for given in (True, False))
    for name in ("position", "kind", "mass"):
        one, other = getattr(by_order.entries, name), getattr(plain.entries, name)
        assert (one is None and other is None) or torch.equal(one, other)
    for name in ("keys", "values"):
        assert torch.equal(getattr(by_order.entries, name)[:, :, :length], getattr(plain.entries, name)[:, :, :length])
        assert getattr(by_order.entries, name).isfinite().all(), "a slot without a token is multiplied by 0"
        assert getattr(by_order.entries, name).data_ptr() != getattr(entries, name).data_ptr()
    assert torch.equal(by_order.length, plain.length)
    assert torch.equal(by_order.free, plain.free)
    assert torch.equal(by_order.faults, plain.faults)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU tells what waits for it")
@pytest.mark.parametrize("policy", [Full(), H2O(), SnapKV(num_recent=4), StreamingLLM(), TOVA(), Elastic(), MERGING])
def test_on_a_gpu_a_prompt_of_more_layers_waits_no_more_often(policy: Policy) -> None:
    found = []
    for number in (2, 5):
        model = with_layers(number).cuda().bfloat16()
        tokens = random_tokens(3, 2, PROMPT).cuda()
        for sync_mode in ("default", "warn"):  # the first compiles kernels
            cache = PolicyCache(model, policy, Budget(fraction=0.5))
            torch.cuda.set_sync_debug_mode(sync_mode)
            with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
                warnings.simplefilter("always")
                model(tokens, **cache_argument(model, cache))
            torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchronizing" in str(one.message) for one in caught))
    assert found[1] <= found[0], found
