"""Every task tells the watchdog of each pass; what scored tokens attend to is told by a task that knows them only."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor

from kvbench.cache import Budget, PolicyCache
from kvbench.contract.driving import held_positions
from kvbench.errors import ConfigError
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.policies.oracle import Oracle
from kvbench.tasks import decode as graph
from kvbench.tasks import speed
from kvbench.tasks.decode import CacheSetting, Decoding, GraphDecoding
from kvbench.tasks.generation import Generation
from kvbench.tasks.perplexity import Fidelity, Perplexity, PerplexityReleased
from kvbench.tasks.task import BatchTask, Prompts, Task, foreseen, is_timed
from tests.config.test_policy_parts import cell_of
from tests.covering import one_in
from tests.tasks.benches import SCENES, bench_of, cut
from tests.tasks.test_graph import loaded, padded_batch
from tests.tiny_models import random_tokens, tiny_model

YAMLS = sorted((Path(__file__).parents[2] / "conf" / "task").glob("*.yaml"))
TASKS = {path.stem: OmegaConf.load(path)._target_ for path in YAMLS if "_target_" in OmegaConf.load(path)}
SMALL = {"max_new_tokens": 4, "new_tokens": 4, "check_tokens": 2, "num_blocks": 1, "num_launches": 1}
SMALL |= {"max_batch_size": 2, "max_turns": 2}
EXAMPLES = SCENES.examples()[:1]  # of two turns and more


def small(target: str) -> Task:
    kind: Any = get_class(target)
    task: Task = kind(**{field.name: SMALL[field.name] for field in fields(kind) if field.name in SMALL})
    return task


class Counting:
    """Counts passes of a model since the last beat."""

    def __init__(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.since = self.most = self.num_beats = 0
        forward = loaded.model.forward

        def counted(*arguments: Any, **options: Any) -> Any:
            self.since += 1
            self.most = max(self.most, self.since)
            return forward(*arguments, **options)

        monkeypatch.setattr(loaded.model, "forward", counted)
        self.loaded = replace(loaded, beat=self.beat)

    def beat(self) -> None:
        self.num_beats += 1
        self.since = 0


@pytest.fixture
def counting(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """The bundled model, its passes counted."""
    return Counting(bundled, monkeypatch)


@pytest.mark.parametrize("name", one_in(3, TASKS))
def test_no_two_passes_of_the_model_are_without_a_beat(
    name: str, counting: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = replace(bench_of(counting.loaded, tmp_path, cut()), examples=EXAMPLES)
    monkeypatch.setattr(speed, "reference_ms", lambda device: 1.0)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)
    task: Any = small(TASKS[name])
    task.run(bench)
    assert counting.num_beats > 4
    assert (counting.most, counting.since) == (1, 0)


def test_an_engine_that_replays_beats_at_every_step_and_around_what_it_prepares(
    counting: Counting, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Replayed:
        def replay(self) -> None:
            counting.since += 1
            counting.most = max(counting.most, counting.since)

    def warm_up(work: Any, device: torch.device, *, undo: Any) -> None:
        for _ in range(2):
            work()
            undo()

    def captured(work: Any, device: torch.device) -> Replayed:
        work()
        return Replayed()

    monkeypatch.setattr(graph, "warm_up", warm_up)
    monkeypatch.setattr(graph, "captured", captured)
    setting: CacheSetting = replace(cut(), engine="graph")
    with torch.inference_mode():
        decoding: Decoding = setting.decoding(counting.loaded, prompt_batch(counting.loaded, EXAMPLES), 3)
        assert isinstance(decoding, GraphDecoding)
        for _ in range(3):
            decoding.step(decoding.logits.argmax(dim=-1))
    assert (counting.most, counting.since) == (1, 0)
    assert counting.num_beats == 1 + 4 + 3, "the prompt; warm-ups, between and after the capture; the steps"


def test_what_a_task_needs_beside_it_is_said_by_its_class() -> None:
    timed = {name for name, target in TASKS.items() if is_timed(small(target))}
    assert timed == {"speed", "memory", "capacity"}
    assert is_timed(object()), "a task of somebody else is taken for timed"


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
