from __future__ import annotations

import copy
import time

import pytest
import torch

from kvbench.tasks.speed import Marks, copy_bandwidth, step_weight_bytes
from tests.models.architectures import small_spec
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")


def test_a_step_reads_the_decoder_and_the_head_but_neither_embeddings_nor_the_vision_tower() -> None:
    model = tiny_model("llava")
    read = [
        parameter.numel() * 4
        for name, parameter in model.named_parameters()
        if ("language_model" in name or "lm_head" in name) and "embed_tokens" not in name
    ]
    assert step_weight_bytes(model) == sum(read)
    assert sum(read) < sum(p.numel() * 4 for p in model.parameters())


def test_an_embedding_that_is_the_head_too_is_read_once() -> None:
    model = copy.deepcopy(tiny_model("llama_gqa"))
    apart = step_weight_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert step_weight_bytes(model) == apart == step_weight_bytes(model.bfloat16()) * 2


def test_a_7b_reads_13_gib_a_step() -> None:
    """6.74e9 parameters less an embedding table of 0.13e9, in two bytes: as published measurements reckon."""
    from kvbench.models.loader import architecture, random_model
    from tests.models.architectures import architecture_of

    config = architecture(architecture_of("llava-1.5-7b"))
    model = random_model(config, vision=True, dtype=torch.bfloat16, device=torch.device("meta"), seed=0)
    assert step_weight_bytes(model) == pytest.approx(2 * (6.7388e9 - 0.1313e9), rel=1e-3)
    assert small_spec("llava-1.5-7b").is_random


def test_the_copy_bandwidth_is_that_of_a_machine() -> None:
    assert 1e8 < copy_bandwidth(CPU) < 1e14


def test_marks_tell_the_time_between_them_and_inside() -> None:
    marks = Marks(CPU)
    with marks.around():
        time.sleep(0.02)
    time.sleep(0.05)
    with marks.around():
        time.sleep(0.01)
    first, between, second = marks.between_ms()
    assert first >= 20
    assert between >= 50
    assert marks.inside_ms() == pytest.approx(first + second)


def test_without_marks_no_time_has_passed() -> None:
    assert Marks(CPU).inside_ms() == 0
