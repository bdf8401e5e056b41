"""A policy that is told what the scored tokens will attend to: only by a task that knows them, and never wrongly."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, PolicyCache
from kvbench.contract.driving import held_positions
from kvbench.errors import ConfigError
from kvbench.models.loader import LoadedModel
from kvbench.policies.oracle import Oracle
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.generation import Generation
from kvbench.tasks.perplexity import Fidelity, Perplexity, PerplexityReleased
from kvbench.tasks.task import BatchTask, Prompts, foreseen
from tests.config.test_policy_parts import cell_of
from tests.covering import one_in
from tests.tasks.benches import SCENES, bench_of, cut
from tests.tasks.test_graph import loaded, padded_batch
from tests.tiny_models import random_tokens, tiny_model

LENGTHS = (3, 6)
PROMPTS = (11, 17)  # of the padded batch
ANSWERS = torch.stack([random_tokens(8, 6), random_tokens(9, 6)])
SETTING = CacheSetting(policy=Oracle(), budget=Budget(tokens=5), positions="original")


def attention_to_come(row: int) -> list[Tensor]:
    """Of each layer (H, P): the sum over answer tokens of stock attention, of the row alone."""
    model = copy.deepcopy(tiny_model("llama_gqa", attached=False))
    model.set_attn_implementation("eager")
    prompt = random_tokens(row + 2, PROMPTS[row])
    with torch.no_grad():
        out = model(torch.cat((prompt, ANSWERS[row, : LENGTHS[row]]))[None], output_attentions=True)
    after = [layer[0, :, len(prompt) :, : len(prompt)].sum(dim=1) for layer in out.attentions]
    return [layer.unflatten(0, (2, 2)).mean(dim=1) for layer in after]


def test_the_future_is_what_the_full_cache_gives_the_prompt() -> None:
    told = foreseen(loaded("llama_gqa", torch.float32), padded_batch(), ANSWERS, LENGTHS)
    for row, length in enumerate(PROMPTS):
        for layer, wanted in zip(told, attention_to_come(row), strict=True):
            torch.testing.assert_close(layer[row, :, :length], wanted, rtol=1e-4, atol=1e-5)
            assert not bool(layer[row, :, length:].any())


def test_the_oracle_keeps_what_will_be_attended_to_most() -> None:
    model, batch = loaded("llama_gqa", torch.float32), padded_batch()
    told = foreseen(model, batch, ANSWERS, LENGTHS)
    with torch.inference_mode():
        held = held_positions(SETTING.decoding(model, batch, 6, future=told).cache)
    for row in range(2):
        for layer, wanted in zip(held, attention_to_come(row), strict=True):
            for head, received in zip(layer[row], wanted, strict=True):
                assert set(head) == set(received.topk(5).indices.tolist())


@pytest.mark.few(1)
@pytest.mark.parametrize("task", one_in(3, [Perplexity(), PerplexityReleased(), Fidelity(max_new_tokens=8)]))
def test_a_task_that_knows_its_tokens_tells_them_shared_or_alone(
    bundled: LoadedModel, tmp_path: Path, task: BatchTask
) -> None:
    setting = cut(Budget(tokens=12), Oracle())
    alone = bench_of(bundled, tmp_path, setting)
    shared = replace(alone, shared_prompts=Prompts(bundled, SCENES.examples(), 2, share=[Oracle()]))
    for number in range(2):
        assert task.measure(alone, alone.prompts.part(number)) == task.measure(shared, shared.prompts.part(number))


def test_a_hidden_question_is_a_part_of_the_prompt(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = replace(bench_of(bundled, tmp_path, cut(Budget(tokens=12), Oracle())), query_visible=False)
    part = bench.prompts.part(0)
    assert part.batch.question_ids is not None
    found = Perplexity().measure(bench, part)
    assert len(found) == len(part.examples)


def test_without_being_told_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="Oracle sees the future, which only a task can tell"):
        PolicyCache(tiny_model("llama_gqa"), Oracle(), Budget(tokens=5))


def test_a_task_that_chooses_its_tokens_is_refused_before_a_model_is_loaded(
    bundled: LoadedModel, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"sees the tokens that are scored.*leave ~task\.generation out"):
        cell_of("policy=oracle", "task=generation")
    bench: Any = bench_of(bundled, tmp_path, cut(Budget(tokens=12), Oracle()))
    with pytest.raises(ConfigError, match="Oracle sees the future"):
        Generation(max_new_tokens=3).measure(bench, bench.prompts.part(0))


def test_records_and_tables_say_that_it_sees_the_future() -> None:
    assert cell_of("policy=oracle", "task=perplexity").labels["policy"] == "oracle (sees the future)"
