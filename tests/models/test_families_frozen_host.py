"""Both engines for every family, loaded from a folder; on a CPU replays run with a host that stands still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget
from kvbench.contract.driving import held_positions
from kvbench.kernels.dispatch import kernels_forced
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.h2o import H2O
from kvbench.tasks.decode import CacheSetting, GraphDecoding
from tests.models.checkpoints import FAMILIES, save_checkpoint
from tests.models.test_families import examples
from tests.tasks.frozen import freeze_host

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures the step for real")

STEPS = 3


def decoded(loaded: LoadedModel, engine: Any) -> tuple[list[Tensor], Any]:
    setting = CacheSetting(policy=H2O(), budget=Budget(fraction=0.3), positions="original", engine=engine)
    batch = prompt_batch(loaded, examples(loaded.takes_images)[:2])
    with torch.inference_mode():
        decoding = setting.decoding(loaded, batch, STEPS)
        assert isinstance(decoding, GraphDecoding) == (engine == "graph")
        with kernels_forced(True):
            decoding.prepare()
            logits = [decoding.logits]
            for _ in range(STEPS):
                logits.append(decoding.step(logits[-1].argmax(-1)).clone())
    return logits, held_positions(decoding.cache)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_give_the_same_logits(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(ModelSpec(checkpoint=str(save_checkpoint(family, tmp_path))), "cpu")
    logits, held = decoded(loaded, "eager")
    freeze_host(monkeypatch)
    again, held_again = decoded(loaded, "graph")
    assert held_again == held
    assert all(torch.equal(a, b) for a, b in zip(logits, again, strict=True))
