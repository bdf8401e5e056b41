"""Each departure of released code from its paper, on small tensors: what it does, and that it can be switched off."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Policy, View
from kvbench.errors import ConfigError
from kvbench.policies.elastic import Elastic
from kvbench.policies.h2o import H2O
from kvbench.policies.released.choice import sorted_order_as_rank
from kvbench.policies.released.elastic import ElasticReleased
from kvbench.policies.released.h2o import H2OReleased
from kvbench.policies.released.h2o_elastic import H2OElasticRelease
from kvbench.policies.released.local_elastic import LocalElasticRelease
from kvbench.policies.released.streaming_llm import StreamingLLMReleased
from kvbench.policies.streaming_llm import StreamingLLM
from tests.policies.released_driving import Drive, policy_layers, run


def as_described(kind: type[Any], **settings: Any) -> Policy:
    """The policy with every option off."""
    options = {field.name: False for field in dataclasses.fields(kind) if field.type == "bool"}
    policy: Policy = kind(**{**options, **settings})
    return policy


PAIRS: dict[str, tuple[Policy, Policy]] = {
    "elastic": (as_described(ElasticReleased), Elastic()),
    "elastic_near": (as_described(ElasticReleased, fixed_point=4), Elastic(fixed_point=4)),
    "h2o_elastic_release": (as_described(H2OElasticRelease), H2O()),
    "local_elastic_release": (as_described(LocalElasticRelease, num_sinks=4), StreamingLLM()),
    "h2o_released": (as_described(H2OReleased), H2O()),
    "h2o_released_in_float32": (H2OReleased(), H2O()),
    "streaming_llm_released": (StreamingLLMReleased(num_sinks=4), StreamingLLM()),
}
HALF = Budget(fraction=0.5)


def view_of_prompt(mass: Tensor, *, budget: int, keys: Tensor | None = None) -> View:
    """A prompt of one row and one head, whose mass (T,) and keys (T, D) are given."""
    length = mass.shape[0]
    states = torch.arange(length, dtype=torch.float32)[:, None] if keys is None else keys
    number = torch.tensor([length])
    return View(
        layer=0,
        num_layers=1,
        new_tokens=length,
        prefill=True,
        prompt=number,
        seen=number,
        budget=torch.tensor([budget]),
        prompt_budget=torch.tensor([budget]),
        row_seed=torch.tensor([0]),
        keys=states[None, None],
        values=states[None, None],
        position=torch.arange(length)[None, None],
        kind=torch.zeros(1, 1, length, dtype=torch.int8),
        mass_or_none=mass[None, None],
    )


def kept(policy: Policy, mass: list[float], budget: int) -> list[int]:
    plan = policy.plan(view_of_prompt(torch.tensor(mass), budget=budget))
    assert plan is not None
    return plan.keep[0, 0].nonzero()[:, 0].tolist()


@pytest.mark.cover
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("budget", [HALF, Budget(fraction=0.3), Budget(fraction=0.21, of="prompt"), Budget(tokens=7)])
@pytest.mark.parametrize("prompt", [3, 40])
def test_with_every_option_off_it_is_the_described_policy(name: str, budget: Budget, prompt: int) -> None:
    released, described = PAIRS[name]
    drive = Drive(prompt=prompt, steps=40, group=2, seed=5)
    assert run(released, budget, drive) == run(described, budget, drive)


def test_an_argsort_taken_for_ranks_is_the_inverse_permutation() -> None:
    position = torch.arange(5)[None, None]
    score = torch.tensor([[[5.0, 1.0, 3.0, 2.0, 9.0]]])
    chosen = sorted_order_as_rank(score, position, first=0, count=torch.tensor([[2]]))
    # Among the four before the newest, 0 and 2 score highest; sorted they are 1, 3, 2, 0, and the numbers
    # 3 and 2 stand at places 1 and 2.
    assert chosen[0, 0].nonzero()[:, 0].tolist() == [1, 2]


def test_rising_scores_hide_that_order_is_taken_for_rank() -> None:
    rising = [float(i) for i in range(20)]
    broken = ElasticReleased()
    whole = dataclasses.replace(broken, order_taken_for_rank=False)
    assert kept(broken, rising, 10) == kept(whole, rising, 10)
    mixed = [float(i * 7 % 20) for i in range(20)]
    assert kept(whole, mixed, 10) == [0, *sorted(sorted(range(1, 19), key=lambda i: mixed[i])[-7:]), 19]
    assert kept(broken, mixed, 10) != kept(whole, mixed, 10)


def test_the_order_keeps_about_as_many_of_the_best_as_chance_does() -> None:
    mass = torch.rand(400, generator=torch.Generator().manual_seed(1))
    best = set(mass[1:399].topk(200).indices.add(1).tolist())
    share = len(best & set(kept(ElasticReleased(), mass.tolist(), 203))) / 200
    assert 0.4 < share < 0.6


def test_a_lost_offset_merges_the_token_before_and_loses_some() -> None:
    """Token i of the prompt has key i. Kept are 0, 3 and 7; 4 and 5 are dropped, among others."""
    mass = torch.tensor([0.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0, 9.0, 1.0, 0.0])
    settings: dict[str, Any] = {"order_taken_for_rank": False, "one_too_few": False}
    view = view_of_prompt(mass, budget=4)
    lost = ElasticReleased(**settings).plan(view)
    right = ElasticReleased(**settings, sink_offset_lost=False).plan(view)
    assert lost.merge_into is not None
    assert lost.merge_source is not None
    assert lost.keep[0, 0].nonzero()[:, 0].tolist() == [0, 3, 7, 9]
    merged = [
        sorted(lost.merge_source[0, 0, i].item() for i in range(10) if lost.merge_into[0, 0, i] == anchor)
        for anchor in (3, 7)
    ]
    # 1, 2, 4, 5, 6, 8 are dropped and bring 0, 1, 3, 4, 5, 7: the first token, both anchors twice, not 2, 6, 8.
    assert merged == [[0, 1, 3, 3, 4, 5], [7, 7]]
    assert right.merge_into is not None
    assert right.merge_into[0, 0].tolist() == [0, 3, 3, 3, 3, 3, 7, 7, 7, 9]


def test_the_prompt_leaves_one_entry_too_few() -> None:
    for policy in (ElasticReleased(), H2OElasticRelease()):
        drive = Drive(prompt=100, steps=2)
        assert [len(step[0]) for step in run(policy, HALF, drive)] == [49, 50, 51]
        whole = dataclasses.replace(policy, one_too_few=False)
        assert [len(step[0]) for step in run(whole, HALF, drive)] == [50, 51, 51]
    assert [len(step[0]) for step in run(LocalElasticRelease(), HALF, Drive(prompt=100, steps=2))] == [50, 51, 51]


def test_the_target_is_rounded_up_in_floating_point() -> None:
    exact, released = Budget(fraction=0.3), LocalElasticRelease()
    drive = Drive(prompt=21, steps=9, layers=1)
    sizes = [len(step[0]) for step in run(released, exact, drive)]
    assert sizes == [7, 7, 7, 8, 8, 8, 9, 9, 9, 10]  # 1 - 0.7 of 30 is 9.000000000000002, which needs ten
    down = dataclasses.replace(released, target_rounded_up=False)
    assert [len(step[0]) for step in run(down, exact, drive)] == [6, 6, 6, 7, 7, 7, 8, 8, 8, 9]


def test_the_fixed_point_eats_the_end_of_the_prompt_and_then_the_first_generated_tokens() -> None:
    steps = run(ElasticReleased(), HALF, Drive(prompt=100, steps=120, layers=1))
    after_prompt, last = steps[0][0], steps[-1][0]
    assert last[:25] == after_prompt[:25]  # below the point nothing ever goes
    assert not set(after_prompt[25:]) & set(last)  # the rest of the prompt is gone, its last token among it
    assert last[25:] == list(range(220 - len(last[25:]), 220))  # and what was generated is a queue
    window = run(ElasticReleased(point_fixed_by_prompt=False), HALF, Drive(prompt=100, steps=120, layers=1))
    assert window[-1][0] != last


@pytest.mark.parametrize(("prompt", "point"), [(60, 5), (40, -5)])
def test_a_fixed_point_below_zero_counts_from_the_newest(prompt: int, point: int) -> None:
    """Of 60 tokens 30 are wanted, and 25 less is index 5; of 40, 20 are wanted and the index is -5."""
    steps = run(ElasticReleased(), HALF, Drive(prompt=prompt, steps=12, layers=1))
    first = next(i for i in range(1, len(steps)) if len(steps[i][0]) == len(steps[i - 1][0]))
    held = [*steps[first - 1][0], prompt + first - 1]
    (lost,) = set(held) - set(steps[first][0])
    assert held[point] == lost


@pytest.mark.parametrize("prompt", [48, 12])
def test_where_the_code_would_double_its_cache_the_rule_of_the_paper_goes_on(prompt: int) -> None:
    """48: the point is -1, where that code doubles the cache; 12: it lies further back than the cache is long."""
    sizes = [len(step[0]) for step in run(ElasticReleased(), HALF, Drive(prompt=prompt, steps=30))]
    assert sizes == [min(prompt // 2 - 1 + i, (prompt + i + 1) // 2) for i in range(31)]


def test_a_prompt_one_token_over_loses_the_first_token() -> None:
    drive, budget = Drive(prompt=100, steps=70, layers=1), Budget(fraction=0.985)
    steps = run(ElasticReleased(), budget, drive)
    assert steps[0][0] == list(range(1, 100))
    assert steps[-1][0] == list(range(170 - len(steps[-1][0]), 170))  # and ever after the oldest
    whole = run(ElasticReleased(sink_lost_when_one_over=False), budget, drive)
    assert whole[-1][0][0] == 0


def test_scores_left_behind_make_it_drop_what_was_just_generated() -> None:
    drive = Drive(prompt=60, steps=60, layers=1, seed=2)
    steps = run(H2OElasticRelease(), HALF, drive)
    right = run(H2OElasticRelease(scores_left_behind=False), HALF, drive)
    assert steps[0] == right[0]
    assert steps[-1] != right[-1]


def test_one_set_for_the_model_is_the_same_in_every_layer() -> None:
    drive = Drive(prompt=40, steps=20, layers=3)
    assert all(step[0] == step[1] == step[2] for step in run(H2OElasticRelease(), HALF, drive))
    own = run(H2OElasticRelease(one_set_for_the_model=False), HALF, drive)
    assert own[0][0] != own[0][1]


def test_without_a_recent_window_only_the_newest_token_is_safe() -> None:
    heavy_first = [10.0 - 0.01 * i for i in range(20)]
    policy = H2OElasticRelease(order_taken_for_rank=False, one_too_few=False)
    assert kept(policy, heavy_first, 6) == [0, 1, 2, 3, 4, 19]
    assert kept(dataclasses.replace(policy, no_recent_window=False), heavy_first, 6) == [0, 1, 2, 17, 18, 19]


def test_room_for_the_sink_alone_keeps_the_sink() -> None:
    drive = Drive(prompt=5, steps=3, layers=1)
    assert run(LocalElasticRelease(), Budget(tokens=1), drive)[-1] == [[0]]
    newest = LocalElasticRelease(sinks_before_newest=False)
    assert run(newest, Budget(tokens=1), drive)[-1] == [[7]]


def test_scores_in_half_precision_stop_growing() -> None:
    """Attention is even, so step n gives every key 1/n: below half a step of float16 at 64 when n > 32."""
    growth = {coarse: growth_of_a_heavy_score(H2OReleased(half_precision_scores=coarse)) for coarse in (True, False)}
    assert growth[True] == 0.0
    assert growth[False] == pytest.approx(sum(1 / n for n in range(41, 61)), rel=1e-3)


def growth_of_a_heavy_score(policy: Policy) -> float:
    """Set the first score to 64 after 40 steps of even attention in float16; return what 20 more add."""
    (layer,) = policy_layers(policy, Budget(fraction=1.0), 1)
    states = torch.zeros(1, 1, 1, 4, dtype=torch.float16)
    for step in range(60):
        keys, values = layer.update(states, states)
        layer.attend(states, keys, values, 0.5, None)
        assert layer.slots is not None
        mass = layer.slots.entries.mass
        assert mass is not None
        if step == 39:
            mass[0, 0, 0] = 64.0
    return float(mass[0, 0, 0]) - 64.0


@pytest.mark.parametrize("settings", [{"fixed_point": 0}, {"num_sinks": 0}])
def test_elastic_released_refuses_what_its_code_has_no_meaning_for(settings: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ElasticReleased(**settings)


@pytest.mark.parametrize("seed", range(4))
def test_a_second_prompt_goes_on_with_the_scores_left_behind(seed: int) -> None:
    """By lists: scores stay in their places over both cuts, and each new token starts with the next one."""
    random = torch.Generator().manual_seed(seed)
    policy = H2OElasticRelease(order_taken_for_rank=False, one_too_few=False)
    prompt, question, budget = 14, 4, 6
    first = view_of_prompt(torch.rand(prompt, generator=random), budget=budget)
    plan = policy.plan(first)
    assert plan.mass is not None
    assert plan.memory is not None
    scores = first.mass[0, 0].tolist()  # that code's vector, which no cut touches
    kept = plan.keep[0, 0]
    new = torch.rand(question, generator=random)
    position = torch.cat((first.position[0, 0][kept], torch.arange(prompt, prompt + question)))
    received = torch.rand(budget, generator=random)
    scores = [a + b for a, b in zip(scores, [*received.tolist(), *new.tolist(), *[0.0] * prompt], strict=False)]
    mass = torch.cat((plan.mass[0, 0][kept] + received, new))
    second = dataclasses.replace(
        view_of_prompt(mass, budget=budget),
        position=position[None, None],
        prompt=torch.tensor([prompt]),
        seen=torch.tensor([prompt + question]),
        memory_or_none=plan.memory,
    )
    again = policy.plan(second)
    assert again.mass is not None
    assert again.memory is not None
    best = sorted(range(budget + question - 1), key=lambda at: scores[at], reverse=True)[: budget - 1]
    assert again.keep[0, 0].nonzero()[:, 0].tolist() == sorted([*best, budget + question - 1])
    assert again.mass[0, 0][again.keep[0, 0]].tolist() == pytest.approx(scores[:budget])
    rest = [0.0] * question + scores[budget : budget + question]
    assert again.memory[0, 0].tolist()[: len(rest)] == pytest.approx(rest)
    assert not again.memory[0, 0][len(rest) :].any()
