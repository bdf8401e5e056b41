"""The peers do what they are said to do: on a tiny model their tokens are kvbench's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, Policy
from kvbench.datasets.text import Synthetic
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.tasks.decode import CacheSetting, greedy
from tests.gpu.peers import (
    FixedCache,
    GrowingCache,
    KvpressProcess,
    Peer,
    ReleasedH2O,
    other_attention,
    stock_twin,
    timed,
)
from tests.models.architectures import small_spec

NEW_TOKENS = 24
FAMILIES = ["llava-1.5-7b", "llama-3.1-8b"]  # a query head for each KV head, and several


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest) -> tuple[LoadedModel, Any]:
    """A model of ours, its weights large enough that tokens differ, and the stock one over the same weights."""
    spec = small_spec(request.param)
    loaded = load_model(spec, "cpu")
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    return loaded, stock_twin(loaded, spec, "sdpa")


def prompts(loaded: LoadedModel, length: int) -> Any:
    return prompt_batch(loaded, Synthetic(prompt_tokens=length, num_images=0, num_examples=3).examples())


def ours(loaded: LoadedModel, batch: Any, policy: Policy, budget: Budget) -> Tensor:
    setting = CacheSetting(policy=policy, budget=budget, positions="original")
    decoding = setting.decoding(loaded, batch, NEW_TOKENS)
    return torch.tensor(greedy(decoding, end_token_ids=(), max_new_tokens=NEW_TOKENS))


@pytest.mark.parametrize("kind", [GrowingCache, pytest.param(FixedCache, marks=pytest.mark.long)])
def test_transformers_caches_give_the_tokens_of_the_full_cache(both: tuple[LoadedModel, Any], kind: type[Any]) -> None:
    loaded, stock = both
    peer = kind(model=stock) if kind is GrowingCache else kind(model=stock, backend="eager")
    for length in (40, 40, 31):  # one shape twice: a cache that is used again, then another shape
        batch = prompts(loaded, length)
        launch, tokens = timed(peer, batch.tensors["input_ids"], NEW_TOKENS)
        assert torch.equal(tokens, ours(loaded, batch, Full(), UNLIMITED))
        assert len(launch.steps_ms) == NEW_TOKENS - 1
    assert len(set(tokens.flatten().tolist())) > 10, "a model that says one thing compares nothing"


@pytest.mark.parametrize("budget_tokens", [12, 44])  # 44: the prompt of 40 fits, and the decode goes over
def test_h2o_by_the_releases_way_gives_the_tokens_of_the_policy(
    both: tuple[LoadedModel, Any], budget_tokens: int
) -> None:
    loaded, stock = both
    peer = ReleasedH2O(model=other_attention(stock, "eager"), budget_tokens=budget_tokens)
    batch = prompts(loaded, 40)
    _, tokens = timed(peer, batch.tensors["input_ids"], NEW_TOKENS)
    assert torch.equal(tokens, ours(loaded, batch, H2O(), Budget(tokens=budget_tokens)))
    assert not torch.equal(tokens, ours(loaded, batch, Full(), UNLIMITED)), "evicting must change something"


def test_all_hold_one_copy_of_the_weights(both: tuple[LoadedModel, Any]) -> None:
    loaded, stock = both
    eager = other_attention(stock, "eager")
    for name, parameter in loaded.model.named_parameters():
        held = {dict(model.named_parameters())[name].data_ptr() for model in (stock, eager)}
        assert held == {parameter.data_ptr()}
    implementations = [m.config.get_text_config()._attn_implementation for m in (loaded.model, stock, eager)]
    assert implementations == ["kvbench", "sdpa", "eager"]


def test_a_peer_rotates_by_the_stock_function(both: tuple[LoadedModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, stock = both
    modeling = sys.modules[type(stock.get_decoder()).__module__]
    own = modeling.apply_rotary_pos_emb

    def refuses(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a peer was given our rotation")

    refuses.kvbench_stock = own  # type: ignore[attr-defined]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", refuses)
    peer: Peer = GrowingCache(model=stock)
    timed(peer, prompts(loaded, 20).tensors["input_ids"], 3)
    assert modeling.apply_rotary_pos_emb is refuses, "ours stands there again"


FAKE = """
from contextlib import contextmanager
class SnapKVPress:
    def __init__(self, compression_ratio):
        print("a library that talks")
    @contextmanager
    def __call__(self, model):
        yield
"""


@pytest.mark.long
def test_kvpress_is_timed_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvpress.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    press = {"class": "SnapKVPress", "compression_ratio": 0.8}
    peer = KvpressProcess(sys.executable, small_spec("llava-1.5-7b"), "cpu", press)
    assert peer.versions["kvpress"] == "unknown"
    for _ in range(2):
        launch = peer.launch(2, 30, 5)
        assert len(launch.steps_ms) == 4
        assert min(launch.ttft_ms, *launch.steps_ms) > 0
    with pytest.raises(RuntimeError, match="the process of kvpress ended with 1"):
        peer.launch(-1, 30, 5)
    peer.close()


def test_a_python_without_kvpress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(RuntimeError, match="the process of kvpress ended with 1"):
        KvpressProcess(sys.executable, small_spec("llava-1.5-7b"), "cpu", {"class": "SnapKVPress"})
