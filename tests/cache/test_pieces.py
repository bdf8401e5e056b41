"""A prompt that comes in pieces: left pads, single tokens, what a plan remembers, and who is told how long it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Needs, Plan, Policy, PolicyCache, ScorePolicy, View, When, cache_argument
from kvbench.contract.driving import held_positions, left_padded
from kvbench.errors import ModelSupportError
from kvbench.kernels.dispatch import kernels_forced
from kvbench.policies.elastic import Elastic
from kvbench.policies.h2o import H2O
from kvbench.policies.random import Random
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from tests.contract import CLOSE
from tests.tiny_models import random_tokens, tiny_model

SNAP = SnapKV(num_recent=3)


@torch.no_grad()
def fed(model: Any, cache: PolicyCache, tokens: Tensor, mask: Tensor | None, pieces: tuple[int, ...]) -> list[Tensor]:
    """Return the logits of each piece."""
    logits, start = [], 0
    place = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    for length in pieces:
        given = {} if mask is None or place is None else _given(mask, place, start, start + length)
        logits.append(model(tokens[:, start : start + length], **cache_argument(model, cache), **given).logits)
        start += length
    return logits


def _given(mask: Tensor, place: Tensor, start: int, end: int) -> dict[str, Tensor]:
    return {"attention_mask": mask[:, :end], "position_ids": place[:, start:end]}


def one_by_one(length: int, pads: int, pieces: tuple[int, ...]) -> tuple[int, ...]:
    """Return how many tokens of a row with `pads` pads each piece brings, pieces of pads alone left out."""
    ends = [sum(pieces[: count + 1]) for count in range(len(pieces))]
    real = [max(0, min(end - pads, length)) for end in ends]
    return tuple(now - before for before, now in zip([0, *real], real, strict=False) if now > before)


@pytest.mark.parametrize("budget", [Budget(tokens=6), Budget(fraction=0.4, of="prompt")], ids=["tokens", "of_prompt"])
@pytest.mark.parametrize("policy", [H2O(), SNAP, Elastic(), StreamingLLM(num_sinks=2)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "pieces",
    [
        (8, 8, 8, 1, 1),
        pytest.param((1, 9, 13, 1, 1, 1), marks=pytest.mark.long),
        pytest.param((1, 1, 21, 1, 1), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_rows_that_begin_in_a_later_piece_are_as_they_are_alone(
    policy: Policy, budget: Budget, pieces: tuple[int, ...]
) -> None:
    model, prompt = tiny_model("llama_gqa", double=True), 24
    lengths = (13, 26, 19)
    rows = [random_tokens(20 + index, length) for index, length in enumerate(lengths)]
    tokens, mask = left_padded(rows)
    together = PolicyCache(model, policy, budget, prompt_tokens=prompt)
    logits = torch.cat(fed(model, together, tokens, mask, pieces), dim=1)
    for index, length in enumerate(lengths):
        pads = 26 - length
        alone = PolicyCache(model, policy, budget, prompt_tokens=prompt - pads)
        own = torch.cat(fed(model, alone, rows[index][None], None, one_by_one(length, pads, pieces)), dim=1)
        torch.testing.assert_close(logits[index, pads:], own[0], **CLOSE)
        ours = [layer[index] for layer in held_positions(together)]
        assert ours == [layer[0] for layer in held_positions(alone)]


@pytest.mark.long
def test_pieces_of_pads_go_through_kernels_as_through_plain_torch(tiny_llama: Any) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    tokens, mask = left_padded([random_tokens(1, 2), random_tokens(2, 5)])
    found = []
    for by_kernels in (False, True):
        cache = PolicyCache(tiny_llama, H2O(), Budget(tokens=3))
        with kernels_forced(by_kernels):
            logits = fed(tiny_llama, cache, tokens, mask, (3, 2))
        found.append((torch.cat(logits, dim=1)[mask.bool()], held_positions(cache)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 5, 1), (11, 1), (12,)], ids=str)
def test_a_prompt_of_known_length_is_cut_to_its_budget_however_it_comes(
    tiny_llama: Any, pieces: tuple[int, ...]
) -> None:
    cache = PolicyCache(tiny_llama, SNAP, Budget(tokens=10), prompt_tokens=12)
    tokens = random_tokens(3, 1, 14)
    fed(tiny_llama, cache, tokens[:, :12], None, pieces)
    assert cache.occupancy().entries_peak == 10
    fed(tiny_llama, cache, tokens[:, 12:], None, (1, 1))
    assert cache.occupancy().entries_peak == 12, "generated tokens stay"
    cache.expect_prompt(1)
    fed(tiny_llama, cache, tokens[:, :1], None, (1,))
    assert cache.occupancy().entries_peak == 10, "a question of one token is no generated token"


def test_a_cache_that_was_reset_knows_the_length_of_its_prompt(tiny_llama: Any) -> None:
    cache = PolicyCache(tiny_llama, SNAP, Budget(tokens=10), prompt_tokens=12)
    cache.expect_prompt(99)
    cache.reset()
    fed(tiny_llama, cache, random_tokens(3, 1, 14), None, (11, 1, 1, 1))
    assert cache.occupancy().entries_peak == 12


def test_generate_in_pieces_says_what_one_piece_says_where_nothing_is_dropped(tiny_llama: Any) -> None:
    """22 tokens in pieces of 7: the last one is a single token; the first holds pads of one row only."""
    tokens, mask = left_padded([random_tokens(1, 14), random_tokens(2, 22)])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    whole = tiny_llama.generate(tokens, **cache_argument(tiny_llama, PolicyCache(tiny_llama, H2O())), **options)
    cache = PolicyCache(tiny_llama, H2O(), prompt_tokens=22)
    pieces = tiny_llama.generate(tokens, **cache_argument(tiny_llama, cache), prefill_chunk_size=7, **options)
    assert torch.equal(pieces, whole)
    cut = PolicyCache(tiny_llama, SNAP, Budget(tokens=10), prompt_tokens=22)
    tiny_llama.generate(tokens, **cache_argument(tiny_llama, cut), prefill_chunk_size=7, **options)
    assert cut.occupancy().entries_peak == 10 + 4


@dataclass(frozen=True, kw_only=True)
class Remembers(Policy):
    """Leaves a memory after the first chunk, and counts on it at every later plan and victim."""

    when: ClassVar[When] = When.BOTH
    seen_memories: list[float]

    def plan(self, view: View) -> Plan:
        first = view.memory_or_none is None
        if view.memory_or_none is not None:
            self.seen_memories.append(float(view.memory_or_none[0, 0, 0]))
        memory = torch.full((*view.position.shape[:2], 1), 7.0) if first else None
        return Plan(keep=view.valid & (view.position >= (view.seen - view.budget)[:, None, None]), memory=memory)

    def victim(self, view: View) -> Tensor:
        assert view.memory_or_none is not None
        self.seen_memories.append(float(view.memory_or_none[0, 0, 0]))
        return view.position.masked_fill(~view.valid, 10**6).argmin(dim=-1)


def test_what_a_plan_remembers_is_there_at_the_plan_of_a_later_chunk(tiny_llama: Any) -> None:
    policy = Remembers(seen_memories=[])
    fed(tiny_llama, PolicyCache(tiny_llama, policy, Budget(tokens=5)), random_tokens(4, 1, 16), None, (9, 1, 4, 1, 1))
    assert policy.seen_memories == [7.0] * 8, "two layers, four times"


def test_another_number_of_seeds_than_rows_is_refused(tiny_llama: Any) -> None:
    for seeds in ((5,), (5, 6), (5, 6, 7, 8)):
        cache = PolicyCache(tiny_llama, Random(), Budget(tokens=4), row_seeds=seeds)
        with pytest.raises(ModelSupportError, match=rf"row_seeds has {len(seeds)} numbers, the prompt 3 rows"):
            fed(tiny_llama, cache, random_tokens(5, 3, 9), None, (9,))
    cache = PolicyCache(tiny_llama, Random(), Budget(tokens=4), row_seeds=(5,))
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 2}
    with pytest.raises(ModelSupportError, match="num_return_sequences"):
        tiny_llama.generate(random_tokens(5, 1, 9), **cache_argument(tiny_llama, cache), **options)


@pytest.mark.parametrize(("rows", "more", "length"), [(2, 1, 1), (1, 2, 1), (1, 3, 4)])
def test_other_rows_than_the_cache_holds_are_refused_until_it_is_reset(
    tiny_llama: Any, rows: int, more: int, length: int
) -> None:
    cache = PolicyCache(tiny_llama, H2O(), Budget(tokens=4))
    fed(tiny_llama, cache, random_tokens(5, rows, 9), None, (9,))
    with pytest.raises(ModelSupportError, match=rf"holds {rows} rows, and {more} are to follow; make a new"):
        fed(tiny_llama, cache, random_tokens(5, more, length), None, (length,))
    cache.reset()
    fed(tiny_llama, cache, random_tokens(5, more, 9), None, (9,))


def test_three_answers_to_one_prompt_have_a_row_each(tiny_llama: Any) -> None:
    cache = PolicyCache(tiny_llama, Random(), Budget(tokens=4), row_seeds=(5, 6, 7))
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4}
    answers = tiny_llama.generate(random_tokens(5, 1, 9), **cache_argument(tiny_llama, cache), **options)
    assert answers.shape == (3, 13)
    rows = held_positions(cache)[0]
    assert len({tuple(row) for row in rows}) > 1, "each row draws for itself"


@dataclass(frozen=True, kw_only=True)
class Newest(ScorePolicy):
    """Keeps the newest."""

    needs: ClassVar[Needs] = Needs.NOTHING

    def score(self, view: View) -> Tensor:
        return view.position.float()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.crop(-2), r"crop\(-2\).*assisted decoding"),
        (lambda cache: cache.batch_repeat_interleave(3), r"batch_repeat_interleave\(3\).*rows of the prompt"),
        (lambda cache: cache.batch_select_indices(torch.tensor([0])), "batch_select_indices.*new PolicyCache"),
        (lambda cache: cache.reorder_cache(torch.tensor([0])), "reorder_cache.*num_beams=1"),
    ],
)
def test_what_rewrites_rows_or_takes_tokens_back_is_refused_by_name_in_one_line(
    tiny_llama: Any, call: Any, message: str
) -> None:
    cache = PolicyCache(tiny_llama, Newest(), Budget(tokens=4))
    fed(tiny_llama, cache, random_tokens(6, 1, 6), None, (6,))
    with pytest.raises(ModelSupportError, match=message) as raised:
        call(cache)
    assert "\n" not in str(raised.value)


def test_assisted_decoding_is_refused_and_not_wrong_in_silence(tiny_llama: Any) -> None:
    prompt = random_tokens(6, 1, 4).repeat(1, 5)
    cache = PolicyCache(tiny_llama, Newest(), Budget(tokens=6))
    with pytest.raises((ModelSupportError, ValueError), match="crop"):
        tiny_llama.generate(prompt, **cache_argument(tiny_llama, cache), prompt_lookup_num_tokens=3, max_new_tokens=8)
