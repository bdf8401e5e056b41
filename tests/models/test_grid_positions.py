"""Positions on three axes: what a picture takes, where an answer goes on, and that pads do not count."""

from __future__ import annotations

import pytest
import torch

from kvbench.cache import UNLIMITED
from kvbench.models.inputs import PromptBatch, prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.tasks.decode import CacheSetting, Decoding
from tests.covering import YAMLS
from tests.models.checkpoints import save_checkpoint
from tests.models.test_families import examples, policy_of

PIXELS_PER_TOKEN = 8  # a patch of 4 pixels, 2 x 2 patches merged


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_checkpoint(request.param, tmp_path_factory.mktemp("grid"))
    return load_model(ModelSpec(checkpoint=str(folder)), "cpu")


def expected_rows(kinds: list[int], rows: int, columns: int) -> list[list[int]]:
    """Time, row and column of each token, counted by hand: text steps by one, a picture by its longer side."""
    axes: list[list[int]] = [[], [], []]
    at, cell = 0, 0
    for index, kind in enumerate(kinds):
        if kind != 1:
            for axis in axes:
                axis.append(at)
            at += 1
            continue
        axes[0].append(at)
        axes[1].append(at + cell // columns)
        axes[2].append(at + cell % columns)
        cell += 1
        if index + 1 == len(kinds) or kinds[index + 1] != 1:
            at += max(rows, columns)
    return axes


def row_of(batch: PromptBatch, row: int) -> torch.Tensor:
    return batch.position_ids[:, row, -batch.prompt_tokens[row] :]


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (24, 24), (56, 8)])
def test_a_picture_counts_by_its_longer_side(ours: LoadedModel, size: tuple[int, int]) -> None:
    batch = prompt_batch(ours, examples(True, (size,)))
    columns, rows = (edge // PIXELS_PER_TOKEN for edge in size)
    kinds = batch.tensors["mm_token_type_ids"][0].tolist()
    assert sum(kinds) == rows * columns
    assert batch.tensors["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    index, *axes = row_of(batch, 0).tolist()
    assert index == list(range(len(kinds)))
    assert axes == expected_rows(kinds, rows, columns)
    following = max(max(axis) for axis in axes) + 1
    assert (batch.last_position_ids[:, 0, 0] + 1).tolist() == [len(kinds), following, following, following]
    assert following == len(kinds) - rows * columns + max(rows, columns)


def test_every_generated_token_steps_by_one_on_every_axis(ours: LoadedModel) -> None:
    batch = prompt_batch(ours, examples(True))
    seen: list[torch.Tensor] = []
    original = ours.model.forward

    def noting(**inputs: torch.Tensor) -> object:
        seen.append(inputs["position_ids"].clone())
        return original(**inputs)

    ours.model.forward = noting
    try:
        full = policy_of(next(path for path in YAMLS if path.stem == "full"))
        setting = CacheSetting(policy=full, budget=UNLIMITED, positions="original")
        with torch.inference_mode():
            decoding = Decoding(ours, batch, setting.cache(ours, batch, 3))
            for _ in range(3):
                decoding.step(decoding.logits.argmax(dim=-1))
    finally:
        ours.model.forward = original
    prompt, *steps = seen
    for number, step in enumerate(steps, start=1):
        assert step.shape == (4, 3, 1)
        assert torch.equal(step, prompt[..., -1:] + number)


def test_pads_and_neighbours_move_no_position(ours: LoadedModel) -> None:
    together = prompt_batch(ours, examples(True))
    for row, example in enumerate(examples(True)):
        alone = prompt_batch(ours, [example])
        assert torch.equal(row_of(together, row), row_of(alone, 0))
        assert torch.equal(together.last_position_ids[:, row], alone.last_position_ids[:, 0])


def test_without_pictures_all_axes_are_the_index(ours: LoadedModel) -> None:
    batch = prompt_batch(ours, examples(False))
    assert "pixel_values" not in batch.tensors
    for row, length in enumerate(batch.prompt_tokens):
        assert row_of(batch, row).tolist() == [list(range(length))] * 4
    assert torch.equal(batch.last_position_ids, batch.position_ids[..., -1:])
