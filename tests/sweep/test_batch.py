"""The batch that is chosen: it fits, it is large where that costs nothing, and no number depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Needs, Policy
from kvbench.cache.policy import needs_of
from kvbench.contract.driving import Held, held_positions, left_padded
from kvbench.kernels.dispatch import MAX_ROWS
from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.key_norm import KeyNorm
from kvbench.policies.snapkv import SnapKV
from kvbench.sweep import group
from kvbench.sweep import group as batch
from kvbench.sweep.cell import Cell
from kvbench.sweep.group import ModelShelf, auto_batch_size
from kvbench.tasks.decode import CacheSetting, forced
from kvbench.tasks.generation import Generation
from kvbench.tasks.perplexity import Perplexity
from kvbench.tasks.task import BatchTask, Bench, Part, Payload, TaskResult, joined
from tests.models.checkpoints import save_checkpoint
from tests.sweep.watching import KeptInMemory, run_cells
from tests.tasks.benches import bench_of, cell_of
from tests.tasks.test_windows import window
from tests.tiny_models import random_tokens, tiny_model

SIZES = (1, 4, 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelSpec(checkpoint=str(save_checkpoint("llama", tmp_path_factory.mktemp("llama")))), "cpu")


def under(policy: Policy, *, engine: Any = "eager") -> CacheSetting:
    return CacheSetting(policy=policy, budget=Budget(fraction=0.4), positions=policy.native_positions, engine=engine)


def cells(*policies: Policy, engine: Any = "eager", tasks: Any = None) -> list[Cell]:
    return [cell_of(tasks or {"ppl": Perplexity()}, setting=under(policy, engine=engine)) for policy in policies]


def size(loaded: LoadedModel, some: list[Cell], *, prompts: int = 1000, free_bytes: int = 2**40) -> int:
    return auto_batch_size(loaded, some, [512] * prompts, free_bytes=free_bytes)


def test_as_many_prompts_as_fit_and_at_least_one(llama: LoadedModel) -> None:
    found = [size(llama, cells(H2O()), free_bytes=free) for free in (0, 2**31, 2**31 + 2**24, 2**31 + 2**26, 2**40)]
    assert found == sorted(found)
    assert found[0] == found[1] == 1
    assert found[2] < found[-1] == 32


def test_a_gpu_gets_as_many_rows_as_the_kernels_of_a_step_take() -> None:
    assert batch._MOST_ON_GPU == MAX_ROWS


def test_few_prompts_are_one_batch_and_more_are_spread_evenly(llama: LoadedModel) -> None:
    sizes = {count: size(llama, cells(H2O()), prompts=count) for count in (0, 1, 8, 20, 32, 33, 48, 100)}
    assert sizes == {0: 1, 1: 1, 8: 8, 20: 20, 32: 32, 33: 17, 48: 24, 100: 25}


def test_batches_are_larger_where_every_answer_goes_in_chunks(llama: LoadedModel) -> None:
    generated = {"ppl": Perplexity(), "generation": Generation()}
    assert size(llama, cells(SnapKV())) > size(llama, cells(SnapKV(), H2O())) == size(llama, cells(H2O()))
    assert size(llama, cells(SnapKV(), tasks=generated)) == size(llama, cells(H2O()))


def test_the_larger_of_two_caches_decides_and_not_their_number(llama: LoadedModel) -> None:
    few, many = cells(H2O()), cells(*[H2O(num_sinks=number) for number in range(40)])
    frees = [2**31 + number * 2**21 for number in range(1, 40)]
    sizes, same, tight = (
        [size(llama, some, free_bytes=free) for free in frees]
        for some in (few, many, [replace(few[0], setting=under(Full()))])
    )
    assert same == sizes
    assert tight < sizes
    assert all(fits <= other for fits, other in zip(tight, sizes, strict=True))


@dataclass(frozen=True)
class Together(BatchTask):
    """Says of each example how many there were in its batch."""

    protocol: ClassVar[str] = "together_v1"

    def measure(self, bench: Bench, part: Part) -> Payload:
        return {example.id: {"together": len(part.examples)} for example in part.examples}

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        return TaskResult(samples=joined(payloads))


def test_a_record_says_how_many_prompts_were_decoded_together(tmp_path: Path, shelf: ModelShelf) -> None:
    (cell,) = cells(H2O(), tasks={"together": Together()})
    (body,) = run_cells([replace(cell, batch_size=None)], tmp_path, shelf=shelf).bodies.values()
    assert body["prompts"]["batch_size"] == 3
    assert [row["together"] for row in body["samples"]] == [3, 3, 3]


def test_kept_batches_of_another_size_are_measured_anew(
    tmp_path: Path, shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, KeptInMemory] = {}
    for size, together in ((1, [1, 1, 1]), (2, [2, 2, 1]), (3, [3, 3, 3])):
        monkeypatch.setattr(group, "auto_batch_size", lambda *given, size=size: size)
        (cell,) = cells(H2O(), tasks={"together": Together()})
        (body,) = run_cells([replace(cell, batch_size=None)], tmp_path, shelf=shelf, batches=kept).bodies.values()
        assert [row["together"] for row in body["samples"]] == together


@pytest.mark.cover("one")
def test_the_likelihood_does_not_depend_on_the_batch(llama: LoadedModel, tmp_path: Path, policy: Policy) -> None:
    if Needs.QUESTION in needs_of(policy):
        pytest.skip("it reads the question, and a window of text asks none")
    if isinstance(policy, KeyNorm):
        pytest.skip("keys of a word are equally long in the first layer wherever it stands, so rounding breaks ties")
    examples = [window(f"w{number}", 2 * number, 20 + 3 * (number % 4), 5 + number % 3) for number in range(16)]
    means = []
    for batch_size in SIZES:
        bench = replace(bench_of(llama, tmp_path, under(policy), batch_size=batch_size), examples=examples)
        rows = Perplexity().run(bench).samples.values()
        means.append(sum(row["nll_sum"] for row in rows) / sum(row["num_scored_tokens"] for row in rows))
    assert means == pytest.approx([means[0]] * 3, abs=1e-4)


@torch.inference_mode()
def kept_sets(policy: Policy, num_rows: int, batch_size: int) -> list[list[Held]]:
    """What each of `num_rows` holds after its prompt and after three more tokens, [row][moment]; in double precision.

    So that only scores that are equal in truth tie, and ties are broken by age.
    """
    model = tiny_model("llama_gqa", double=True)
    loaded = LoadedModel(model=model, processor=None, tokenizer=None, device=torch.device("cpu"), image_token_id=None)
    prompts, answers = [random_tokens(number, 17 + number % 5) for number in range(num_rows)], random_tokens(99, 16, 3)
    found: list[list[Held]] = []
    for start in range(0, num_rows, batch_size):
        rows = range(start, start + batch_size)
        tokens, mask = left_padded([prompts[row] for row in rows])
        prompt = PromptBatch(
            tensors={"input_ids": tokens, "attention_mask": mask},
            kind=torch.zeros_like(tokens, dtype=torch.int8),
            row_seeds=tuple(rows),
        )
        decoding = under(policy).decoding(loaded, prompt, 8)
        moments = [held_positions(decoding.cache)]
        given: Tensor = answers[start : start + batch_size]
        for _ in forced(decoding, given, [3] * batch_size):
            pass
        moments.append(held_positions(decoding.cache))
        found += [[[[layer[row]] for layer in held] for held in moments] for row in range(batch_size)]
    return found


@pytest.mark.few(8)
@pytest.mark.cover("mechanisms")
@pytest.mark.parametrize("sizes", [(1, 2, 6), pytest.param(SIZES, marks=pytest.mark.long)], ids=str)
def test_the_kept_entries_do_not_depend_on_the_batch(policy: Policy, sizes: tuple[int, ...]) -> None:
    alone, some, together = (kept_sets(policy, max(sizes), batch_size) for batch_size in sizes)
    assert alone == some == together
