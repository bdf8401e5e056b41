"""A known answer fed in chunks is the answer fed token by token, wherever nothing is freed between two tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Policy, When
from kvbench.cache.released import departures_of
from kvbench.contract.driving import Held, held_positions
from kvbench.kernels.dispatch import kernels_forced
from kvbench.models.loader import LoadedModel
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.snapkv import SnapKV
from kvbench.tasks import decode
from kvbench.tasks.decode import CacheSetting, Decoding, forced
from kvbench.tasks.perplexity import Fidelity, Perplexity, PerplexityReleased
from kvbench.tasks.task import BatchTask, Bench
from tests.tasks.benches import FULL, MostAttended, bench_of, cut
from tests.tasks.test_graph import loaded, padded_batch
from tests.tiny_models import random_tokens

STEPS = 14
CLOSE = {"rtol": 0.0, "atol": 1e-4}
NEXT = torch.tensor([[5, 9, 2], [4, 4, 8]])


def at_the_prompt_only(policy: Policy) -> Policy:
    """The same policy, but that it frees nothing at decode; one that knows no budget is as it was."""
    kind = dataclasses.make_dataclass(
        type(policy).__name__, [], bases=(type(policy),), frozen=True, kw_only=True, namespace={"when": When.PREFILL}
    )
    fields = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    if "every_tokens" in fields:  # which is a rhythm of decode
        fields["every_tokens"] = 1
    made: Policy = kind(**fields)
    return made


def decoding_of(policy: Policy, positions: Any, *, reserve_tokens: int = STEPS) -> Decoding:
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.4), positions=positions)
    return setting.decoding(loaded("llama_gqa", torch.float32), padded_batch(), reserve_tokens)


def masses(decoding: Decoding) -> list[Tensor]:
    found = []
    for layer in decoding.cache.policy_layers:
        assert layer.slots is not None
        if layer.slots.entries.mass is not None:
            found.append(layer.slots.entries.mass.masked_fill(layer.slots.entries.position < 0, 0.0))
    return found


@torch.inference_mode()
def fed(decoding: Decoding, *, one_by_one: bool) -> tuple[Tensor, list[Any], list[Held]]:
    """Log-probabilities of the answer, one more step and one more turn; what the cache says of itself after each."""
    logits = list(forced(decoding, random_tokens(5, 2, STEPS), [STEPS, STEPS - 3], one_by_one=one_by_one))
    said, held = [[layer.ledger.seen for layer in decoding.cache.policy_layers]], [held_positions(decoding.cache)]
    for layer in decoding.cache.policy_layers:
        assert layer.counts is not None
        said.append([layer.ledger.held, layer.ledger.padded_tokens, layer.ledger.steps_since_settled])
        said.append([layer.counts.seen.tolist(), layer.counts.budget.tolist()])
    after = masses(decoding)
    logits.append(decoding.step(torch.tensor([3, 7])).clone())
    held.append(held_positions(decoding.cache))
    logits.append(decoding.extend(NEXT))
    held.append(held_positions(decoding.cache))
    decoding.cache.check()
    return torch.stack(logits).log_softmax(-1), [said, after], held


@pytest.mark.few(7)
@pytest.mark.cover("mechanisms")
def test_chunks_give_what_steps_give(policy: Policy, positions: Any) -> None:
    prompt_only = at_the_prompt_only(policy)
    runs = []
    for one_by_one in (True, False):
        decoding = decoding_of(prompt_only, positions)
        if departures_of(policy).pools_layers:
            assert decoding.tokens_per_pass == 1
            return
        assert decoding.tokens_per_pass > STEPS
        runs.append(fed(decoding, one_by_one=one_by_one))
    (steps, (said, mass), held), (chunks, (said_too, mass_too), held_too) = runs
    torch.testing.assert_close(chunks, steps, **CLOSE)
    assert said_too == said
    assert held_too == held
    torch.testing.assert_close(mass_too, mass, **CLOSE)


@pytest.mark.parametrize("reserve_tokens", [0, 3, STEPS + 4])
def test_a_chunk_finds_room_however_few_tokens_were_announced(reserve_tokens: int) -> None:
    policy = SnapKV(num_recent=3)
    runs = [
        fed(decoding_of(policy, "in_cache", reserve_tokens=reserve), one_by_one=one_by_one)
        for reserve, one_by_one in ((STEPS + 4, True), (reserve_tokens, False))
    ]
    torch.testing.assert_close(runs[1][0], runs[0][0], **CLOSE)
    assert runs[1][2] == runs[0][2]


@pytest.mark.long
def test_steps_by_kernels_go_on_after_a_chunk() -> None:
    runs = []
    for by_kernels in (False, True):
        with kernels_forced(by_kernels):
            runs.append(fed(decoding_of(SnapKV(num_recent=3), "in_cache"), one_by_one=not by_kernels))
    torch.testing.assert_close(runs[1][0], runs[0][0], **CLOSE)
    assert runs[1][2] == runs[0][2]


@pytest.mark.parametrize(("tokens_per_pass", "passes"), [(1, STEPS), (4, 4), (13, 2), (STEPS, 1), (99, 1)])
def test_a_chunk_is_as_long_as_its_logits_may_be_large(
    monkeypatch: pytest.MonkeyPatch, tokens_per_pass: int, passes: int
) -> None:
    decoding, beats = decoding_of(Full(), "original"), []
    monkeypatch.setattr(decode, "_MOST_LOGITS_BYTES", tokens_per_pass * decoding.logits.nbytes)
    monkeypatch.setattr(decoding, "_beat", lambda: beats.append(1))
    with torch.inference_mode():
        logits = list(forced(decoding, random_tokens(5, 2, STEPS), [STEPS, STEPS]))
    assert (len(logits), len(beats)) == (STEPS, passes)
    assert torch.equal(decoding.logits, logits[-1])


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_a_short_answer_is_fed_as_any_other(num_tokens: int) -> None:
    """An answer of one token feeds nothing at all: it is scored by what the prompt says."""
    tokens, runs = random_tokens(5, 2, num_tokens), []
    with torch.inference_mode():
        for one_by_one in (True, False):
            decoding = decoding_of(Full(), "original")
            given = list(forced(decoding, tokens, [num_tokens] * 2, one_by_one=one_by_one))
            assert len(given) == num_tokens
            runs.append(torch.stack([*given, decoding.logits]))
    torch.testing.assert_close(runs[1], runs[0], **CLOSE)


def test_a_policy_that_frees_entries_at_decode_gets_its_tokens_one_by_one() -> None:
    decoding = decoding_of(H2O(), "original")
    assert decoding.tokens_per_pass == 1
    with pytest.raises(ValueError, match="one by one"):
        decoding.feed(random_tokens(5, 2, STEPS))


TASKS = [Perplexity(), PerplexityReleased(), Fidelity(max_new_tokens=8, check_tokens=2)]
HOW = {"nll_tokens_per_pass", "kl_tokens_per_pass", "released_tokens_per_pass"}


def rows(bench: Bench, task: BatchTask) -> tuple[dict[str, dict[str, float]], set[int]]:
    """Return the rows without how they were scored, and that apart."""
    found = task.run(bench).samples
    how = {int(row[name]) for row in found.values() for name in HOW & set(row)}
    return {name: {key: row[key] for key in row if key not in HOW} for name, row in found.items()}, how


@pytest.mark.few(1)
@pytest.mark.cover
@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("visible", [True, pytest.param(False, marks=pytest.mark.long)], ids=["visible", "hidden"])
@pytest.mark.parametrize("setting", [FULL, cut(policy=at_the_prompt_only(MostAttended()))], ids=["full", "prompt_only"])
def test_a_task_measures_the_same_in_chunks_and_says_which(
    bundled: LoadedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: BatchTask,
    setting: CacheSetting,
    visible: bool,
) -> None:
    bench = replace(bench_of(bundled, tmp_path, setting, batch_size=3), query_visible=visible)
    chunks, how = rows(bench, task)
    monkeypatch.setattr(Decoding, "tokens_per_pass", 1)
    steps, alone = rows(bench, task)
    assert len(how) == 1 or not visible, "hidden questions of other lengths make batches of their own"
    assert min(how) > 1
    assert alone == {1}
    for name, row in steps.items():
        assert chunks[name] == pytest.approx(row, abs=2e-3, rel=1e-5)


@pytest.mark.long
def test_both_sides_of_a_comparison_are_fed_alike(bundled: LoadedModel, tmp_path: Path) -> None:
    """So a policy that frees entries at decode, but never has to, differs from full by nothing at all."""
    task = Fidelity(max_new_tokens=8, check_tokens=2)
    found, how = rows(bench_of(bundled, tmp_path, cut(Budget(fraction=1.0))), task)
    assert [row["kl_sum"] for row in found.values()] == [0.0] * 3
    assert how == {1}
