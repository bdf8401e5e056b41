"""A model over two GPUs gives what it gives on one, costs add up, and a sweep of single-GPU cells takes half the time.

python -m pytest -m gpu tests/gpu/test_two_gpus.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.cache import Budget, Policy
from kvbench.contract.driving import held_positions, left_padded
from kvbench.datasets.base import Dataset
from kvbench.datasets.text import Synthetic
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.h2o import H2O
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.results.store import RecordStore
from kvbench.tasks.decode import CacheSetting, _forbidden
from kvbench.tasks.memory import Capacity, Memory, free_memory, parameter_bytes
from kvbench.tasks.speed import Speed
from tests.tasks.benches import SCENES, bench_of, cut
from tests.tiny_models import random_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a model over two GPUs needs two CUDA devices"),
]
REPO = Path(__file__).parents[2]
CONFIG = {"model_type": "llama", "vocab_size": 97, "hidden_size": 128, "intermediate_size": 256}
CONFIG |= {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
STEPS = 9


def spec(dtype: str, **options: Any) -> ModelSpec:
    return ModelSpec(checkpoint="none/none", weights="random", config=dict(CONFIG), dtype=dtype, **options)


@cache
def models(dtype: str) -> tuple[LoadedModel, LoadedModel]:
    return load_model(spec(dtype), "cuda:0"), load_model(spec(dtype, devices=(0, 1)), "cuda:0")


def padded_batch(loaded: LoadedModel) -> PromptBatch:
    prompt, mask = left_padded([random_tokens(2, 41), random_tokens(3, 57)])
    tensors = {"input_ids": prompt.to(loaded.device), "attention_mask": mask.to(loaded.device)}
    kind = torch.zeros_like(prompt, dtype=torch.int8).to(loaded.device)
    return PromptBatch(tensors=tensors, kind=kind, row_seeds=(3, 4))


def layer_devices(loaded: LoadedModel) -> list[torch.device]:
    return [next(layer.parameters()).device for layer in loaded.model.get_decoder().layers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_one_device_and_lie_on_both(dtype: str) -> None:
    one, two = models(dtype)
    assert set(layer_devices(two)) == {torch.device("cuda", 0), torch.device("cuda", 1)}
    assert len(set(layer_devices(one))) == 1
    theirs = two.model.state_dict()
    assert all(torch.equal(value, theirs[name].to(value.device)) for name, value in one.model.state_dict().items())


def run(loaded: LoadedModel, setting: CacheSetting, num_steps: int = STEPS) -> Any:
    with torch.inference_mode():
        decoding = setting.decoding(loaded, padded_batch(loaded), STEPS)
        logits = [decoding.logits.clone()]
        for _ in range(num_steps):
            logits.append(decoding.step(logits[-1].argmax(-1)).clone())
    decoding.cache.check()
    return torch.stack(logits), held_positions(decoding.cache), decoding.cache


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_policy_gives_the_same_tokens_on_one_and_on_two(policy: Policy, dtype: str) -> None:
    one, two = models(dtype)
    others: tuple[Any, ...] = ("original", "in_cache", "released") if isinstance(policy, H2O) else ()
    for positions in dict.fromkeys((policy.native_positions, *others)):
        setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=positions)
        (logits, held, _), (wide_logits, wide_held, cache) = run(one, setting), run(two, setting)
        assert torch.equal(logits, wide_logits), positions
        assert held == wide_held, positions
        assert [layer.slots.length.device for layer in cache.policy_layers] == layer_devices(two)  # type: ignore[union-attr]


@pytest.mark.parametrize("policy", [H2O(), SnapKV(), StreamingLLM()], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("more", [0, 70], ids=["as_announced", "longer"])
def test_a_step_over_two_devices_waits_for_neither(policy: Policy, more: int) -> None:
    _, two = models("bfloat16")
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=policy.native_positions)
    with torch.inference_mode():
        decoding = setting.decoding(two, padded_batch(two), STEPS)
        tokens = decoding.logits.argmax(-1)
        for number in range(STEPS + more):
            with _forbidden() if 1 < number < STEPS else _as_ever():
                tokens = decoding.step(tokens).argmax(-1)
    assert bool(decoding.logits.isfinite().all())


@contextmanager
def _as_ever() -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def scenes() -> tuple[LoadedModel, LoadedModel]:
    """The bundled model, a checkpoint with pictures, on one device and over two."""
    found = load_model(ModelSpec(checkpoint="bundled"), "cuda:0")
    return found, load_model(ModelSpec(checkpoint="bundled", devices=(0, 1)), "cuda:0")


def test_a_checkpoint_with_pictures_answers_the_same(scenes: tuple[LoadedModel, LoadedModel]) -> None:
    answers = []
    for loaded in scenes:
        setting = cut(Budget(fraction=0.3))
        with torch.inference_mode():
            decoding = setting.decoding(loaded, prompt_batch(loaded, SCENES.examples()), 8)
            found = [decoding.logits]
            for _ in range(8):
                found.append(decoding.step(found[-1].argmax(-1)))
        answers.append(torch.stack(found).argmax(-1))
    assert torch.equal(*answers)
    assert len({parameter.device for parameter in scenes[1].model.parameters()}) == 2


@pytest.mark.parametrize("dataset", [Synthetic(prompt_tokens=60, num_examples=3), SCENES], ids=["text", "pictures"])
def test_costs_of_two_devices_add_up(dataset: Dataset, scenes: tuple[LoadedModel, LoadedModel], tmp_path: Path) -> None:
    pair = scenes if dataset is SCENES else models("bfloat16")
    benches = [
        replace(bench_of(loaded, tmp_path, cut()), dataset=dataset, examples=dataset.examples()) for loaded in pair
    ]
    of_layers = {device.index for device in layer_devices(pair[1])}  # the small one's lie behind its vision tower
    assert of_layers == {0, 1} or dataset is SCENES
    alone: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for bench, into in zip(benches, (alone, found), strict=True):
        for task in (Speed(new_tokens=4, num_blocks=1), Memory(new_tokens=4), Capacity(new_tokens=3, max_batch_size=4)):
            into |= {name: entry["value"] for name, entry in task.run(bench).measurements.items()}
    for name in (
        "roof_ms",
        "full_roof_ms",
        "kv_stored_bytes",
        "kv_valid_bytes",
        "peak_load_bytes",
        "capacity_kv_bytes",
    ):
        each = [found[f"device{number}_{name}"] for number in range(2)]
        assert found[name] == pytest.approx(sum(each)), name
        if name.startswith("kv_"):
            assert {number for number, value in enumerate(each) if value > 0} == of_layers, name
            assert found[name] == alone[name]
    peaks = [found[f"device{number}_peak_memory_bytes"] for number in range(2)]
    assert max(peaks) < found["peak_memory_bytes"] <= sum(peaks)
    assert all(peak >= found[f"device{number}_peak_load_bytes"] > 0 for number, peak in enumerate(peaks))
    assert found["settle_ms"] > 0
    assert found["policy_ms"] > 0
    free_memory()


def test_weights_of_a_model_over_two_are_never_whole_on_one() -> None:
    free_memory()
    for device in (0, 1):
        torch.cuda.reset_peak_memory_stats(device)
    before = [torch.cuda.memory_allocated(device) for device in (0, 1)]
    wide = replace(spec("float32", devices=(0, 1)), config={**CONFIG, "hidden_size": 1024, "intermediate_size": 4096})
    loaded = load_model(wide, "cuda:0")
    whole = parameter_bytes(loaded.model)
    made = [torch.cuda.max_memory_allocated(device) - before[device] for device in (0, 1)]
    assert max(made) < 0.7 * whole
    del loaded
    free_memory()


def kvbench(*words: str, gpus: str, folder: Path) -> float:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "SLURM"))}
    environment = {**kept, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": gpus}
    command = [sys.executable, "-m", "kvbench", *words, "sink=console", "autopsy=off"]
    start_s = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return time.monotonic() - start_s


def bodies(results: Path) -> list[dict[str, Any]]:
    keys = [json.loads(next(one.glob("attempt-*.json")).read_text())["body"]["key"] for one in _cells(results)]
    return [RecordStore(results).attempts(key)[-1] for key in keys]


def _cells(results: Path) -> list[Path]:
    return sorted((results / "cells").iterdir())


def test_a_cell_over_two_devices_measures_what_one_does(tmp_path: Path) -> None:
    words = (
        "task=quality",
        "dataset.num_samples=4",
        "policy=h2o",
        "budget.fraction=0.3",
        "engine=eager",
        "batch_size=4",
    )
    kvbench(*words, "results=one", gpus="0", folder=tmp_path)
    kvbench(*words, "results=two", "model.devices=auto", gpus="0,1", folder=tmp_path)
    (one,), (two,) = bodies(tmp_path / "one"), bodies(tmp_path / "two")
    assert two["environment"]["devices"] == ["cuda:0", "cuda:1"]
    assert two["labels"]["model"] == f"{one['labels']['model']} over 2 GPUs"
    answers = [[{k: v for k, v in row.items() if k.endswith("text")} for row in one_["samples"]] for one_ in (one, two)]
    assert answers[0] == answers[1]
    assert all(answers[0]), "every sample has its texts"


def test_a_sweep_over_two_gpus_takes_at_most_three_fifths_of_the_time_on_one(tmp_path: Path) -> None:
    """A process for every cell, as with another model for every cell; two workers have a GPU each.

    Kernels are compiled by a sweep of a few batches before, all of one size, so that neither pays for the other. Start
    and end of a sweep are as long on two GPUs as on one, and a cell should take longer than its process needs to start
    (64 scenes: 0.61).
    """
    words = (
        "-m",
        "policy=full,h2o,streaming_llm,snapkv,elastic,random",
        "budget.fraction=0.2",
        "task=perplexity",
        "batch_size=4",
        "worker.isolation=cell",
    )
    kvbench(*words, "dataset.num_samples=8", "results=warm", gpus="0,1", folder=tmp_path)
    two_s = kvbench(*words, "dataset.num_samples=800", "results=two", gpus="0,1", folder=tmp_path)
    one_s = kvbench(*words, "dataset.num_samples=800", "results=one", gpus="0", folder=tmp_path)
    shared = bodies(tmp_path / "two")
    assert {body["environment"].get("num_workers") for body in shared} == {2}
    assert len(shared) == 6
    own_s = [sum(body["duration_s"] for body in bodies(tmp_path / name)) for name in ("one", "two")]
    print(f"six cells: {one_s:.1f} s on one GPU, {two_s:.1f} s on two, {two_s / one_s:.2f}; cells alone {own_s} s")
    assert two_s <= 0.6 * one_s, f"{two_s:.1f} s on two GPUs, {one_s:.1f} s on one"
