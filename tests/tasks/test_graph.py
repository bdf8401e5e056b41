"""The captured step and the step run operation by operation: the same tokens, the same entries."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.cache import UNLIMITED, Budget, Policy, PolicyCache, View, decisions
from kvbench.contract.driving import Held, held_positions, left_padded
from kvbench.errors import ModelSupportError, PolicyError
from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.policies.tova import TOVA
from kvbench.tasks import decode as capture
from kvbench.tasks import decode as graph
from kvbench.tasks.decode import CacheSetting, Decoding, captured
from tests.tasks.benches import NanAtDecode
from tests.tiny_models import random_tokens, tiny_model

STEPS = 9
ON = "cuda" if torch.cuda.is_available() else "cpu"


def loaded(name: str, dtype: torch.dtype) -> LoadedModel:
    model = copy.deepcopy(tiny_model(name)).to(ON, dtype)
    return LoadedModel(model=model, processor=None, tokenizer=None, device=torch.device(ON), image_token_id=None)


def padded_batch() -> PromptBatch:
    prompt, mask = left_padded([random_tokens(2, 11), random_tokens(3, 17)])
    tensors = {"input_ids": prompt.to(ON), "attention_mask": mask.to(ON)}
    return PromptBatch(tensors=tensors, kind=torch.zeros_like(prompt, dtype=torch.int8).to(ON), row_seeds=(3, 4))


def greedy(decoding: Decoding, num_steps: int) -> tuple[Tensor, list[Held], list[Tensor]]:
    tokens, held, logits = [decoding.logits.argmax(-1)], [], []
    for _ in range(num_steps):
        logits.append(decoding.step(tokens[-1]).clone())
        tokens.append(logits[-1].argmax(-1))
        held.append(held_positions(decoding.cache))
    return torch.stack(tokens), held, logits


@pytest.mark.gpu
@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("num_steps", [STEPS, STEPS + 5], ids=["as_announced", "longer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_engines_give_the_same_tokens(policy: Policy, positions: Any, dtype: torch.dtype, num_steps: int) -> None:
    model, runs = loaded("llama_gqa", dtype), []
    for engine in ("eager", "graph"):
        setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=positions, engine=engine)
        with torch.inference_mode():
            decoding = setting.decoding(model, padded_batch(), STEPS)
            decoding.prepare()
            runs.append((*greedy(decoding, num_steps), decoding.cache.occupancy()))
    (tokens, held, logits, occupancy), (graph_tokens, graph_held, graph_logits, graph_occupancy) = runs
    assert torch.equal(graph_tokens, tokens)
    assert graph_held == held
    assert all(torch.equal(a, b) for a, b in zip(logits, graph_logits, strict=True))
    assert graph_occupancy == occupancy


@pytest.mark.gpu
@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("layers_together", [1, 3, 100])
@pytest.mark.parametrize(
    "decides", [H2O(), Elastic(), StreamingLLM(), TOVA()], ids=lambda policy: type(policy).__name__
)
def test_decisions_beside_the_model_are_those_taken_at_once(
    decides: Policy, layers_together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers branch off together."""
    monkeypatch.setattr(decisions, "_LAYERS_TOGETHER", layers_together)
    model, runs = loaded("llama_gqa", torch.bfloat16), []
    for engine in ("eager", "graph"):
        setting = CacheSetting(
            policy=decides, budget=Budget(fraction=0.3), positions=decides.native_positions, engine=engine
        )
        with torch.inference_mode():
            decoding = setting.decoding(model, padded_batch(), 4 * STEPS)
            tokens, held, _ = greedy(decoding, 4 * STEPS)
            runs.append(
                (tokens, held, [tensor.clone() for layer in decoding.cache.policy_layers for tensor in layer.state()])
            )
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][2], runs[1][2], strict=True))


@dataclass(frozen=True, kw_only=True)
class Waits(H2O):
    """Looks at a number of the device at every step."""

    def score(self, view: View) -> Tensor:
        assert view.seen.tolist()
        return super().score(view)


@pytest.mark.gpu
@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
def test_a_policy_that_waits_is_refused_and_the_next_is_captured() -> None:
    model, tokens = loaded("llama_gqa", torch.float32), []
    for policy, engine in ((Waits(), "graph"), (H2O(), "graph"), (H2O(), "eager")):
        setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions="original", engine=engine)
        with torch.inference_mode():
            decoding = setting.decoding(model, padded_batch(), STEPS)
            if isinstance(policy, Waits):
                with pytest.raises(PolicyError, match=r"waits for the device \(.*tolist.* in score\).*engine=eager"):
                    decoding.prepare()
            else:
                decoding.prepare()
                tokens.append(greedy(decoding, STEPS)[0])
    assert torch.equal(*tokens)


@dataclass(frozen=True, kw_only=True)
class Beyond(H2O):
    """Names a slot that does not exist."""

    def victim(self, view: View) -> Tensor:
        return view.position[..., 0] * 0 + 10**6


@pytest.mark.gpu
@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_what_is_no_choice_is_found_without_a_wait_and_disturbs_nobody(engine: Any) -> None:
    model, tokens = loaded("llama_gqa", torch.bfloat16), []
    for policy, message in ((H2O(), ""), (NanAtDecode(), "NaN at decode"), (Beyond(), "no token"), (H2O(), "")):
        setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions="original", engine=engine)
        with torch.inference_mode():
            decoding = setting.decoding(model, padded_batch(), STEPS)
            decoding.prepare()
            with capture._forbidden():
                for _ in range(STEPS):
                    decoding.step(decoding.logits.argmax(-1))
            if message:
                with pytest.raises(PolicyError, match=message):
                    decoding.cache.check()
            else:
                decoding.cache.check()
                tokens.append(decoding.logits.clone())
    assert torch.equal(*tokens)


@pytest.mark.gpu
@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
def test_a_conversation_in_graphs_is_that_of_the_eager_engine() -> None:
    model, told = loaded("llama_gqa", torch.bfloat16), []
    for engine in ("eager", "graph"):
        setting = CacheSetting(policy=H2O(), budget=Budget(tokens=6), positions="original", engine=engine)
        with torch.inference_mode():
            decoding = setting.decoding(model, padded_batch(), STEPS)
            turns = [greedy(decoding, STEPS)]
            for _ in range(2):
                decoding.extend(torch.tensor([[5, 9, 2], [4, 4, 8]], device=ON))
                turns.append(greedy(decoding, STEPS))
            told.append(turns)
    for ours, theirs in zip(*told, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]
        assert all(torch.equal(a, b) for a, b in zip(ours[2], theirs[2], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
def test_a_capture_that_failed_does_not_disturb_the_next() -> None:
    device, numbers = torch.device("cuda", 0), torch.ones(3, device="cuda:0")
    stream = torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError, match="captur"):
        captured(lambda: numbers.sum().item(), device)
    assert torch.cuda.current_stream(device) == stream
    captured(lambda: numbers.add_(1), device).replay()
    assert numbers.tolist() == [2, 2, 2]


def test_copies_for_the_undo_are_gone_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    real = PolicyCache.snapshot

    def snapshot(cache: PolicyCache) -> Any:
        state = real(cache)
        copies.extend(weakref.ref(value) for value in state.values)
        return state

    def warm_up(work: Callable[[], None], device: torch.device, *, undo: Callable[[], None]) -> None:
        work()
        assert all(ref() is not None for ref in copies)
        undo()

    def captured(work: Callable[[], None], device: torch.device) -> object:
        assert [ref() for ref in copies] == [None] * len(copies)
        work()
        return object()

    monkeypatch.setattr(PolicyCache, "snapshot", snapshot)
    monkeypatch.setattr(graph, "warm_up", warm_up)
    monkeypatch.setattr(graph, "captured", captured)
    setting = CacheSetting(policy=H2O(), budget=Budget(fraction=0.5), positions="original", engine="graph")
    with torch.inference_mode():
        decoding = setting.decoding(loaded("llama_gqa", torch.float32), padded_batch(), STEPS)
        before = [copy.deepcopy(layer.ledger) for layer in decoding.cache.policy_layers]
        decoding.prepare()
    assert copies
    assert [layer.ledger for layer in decoding.cache.policy_layers] == before


@pytest.mark.cover("mechanisms")
def test_a_step_that_was_undone_leaves_no_trace(policy: Policy, positions: Any) -> None:
    model, runs = loaded("llama_gqa", torch.float32), []
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=positions)
    for disturbed in (False, True):
        with torch.inference_mode():
            decoding = setting.decoding(model, padded_batch(), STEPS)
            if disturbed:
                before = decoding.cache.snapshot()
                position = decoding._position.clone()
                decoding._forward()
                assert decoding.cache.steps_announced == STEPS - 1
                decoding.cache.restore(before)
                decoding._position.copy_(position)
            runs.append((*greedy(decoding, STEPS), decoding.cache.occupancy()))
    (tokens, held, logits, occupancy), (tokens_again, held_again, logits_again, occupancy_again) = runs
    assert torch.equal(tokens, tokens_again)
    assert held == held_again
    assert all(torch.equal(a, b) for a, b in zip(logits, logits_again, strict=True))
    assert occupancy == occupancy_again


@pytest.mark.cover("mechanisms")
def test_counting_a_replayed_step_is_what_a_step_counts(policy: Policy) -> None:
    model = loaded("llama_gqa", torch.float32)
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions="original")
    caches: list[PolicyCache] = []
    with torch.inference_mode():
        for by_device in (False, True):
            decoding = setting.decoding(model, padded_batch(), STEPS)
            for _ in range(STEPS):
                if by_device:
                    decoding.cache.count_replayed_step()
                    decoding.cache.cut_blocks()
                else:
                    decoding.step(torch.tensor([5, 6], device=ON))
            caches.append(decoding.cache)
    for stepped, counted in zip(*(cache.policy_layers for cache in caches), strict=True):
        assert counted.ledger == stepped.ledger


@pytest.mark.parametrize("kind", ["dynamic", "longrope", {"full_attention": "default", "sliding_attention": "dynamic"}])
def test_rotary_positions_that_are_read_on_the_host_are_refused_before_the_prompt(kind: Any) -> None:
    model = loaded("llama_gqa", torch.float32)
    setting = CacheSetting(policy=Full(), budget=UNLIMITED, positions="original", engine="graph")
    assert setting.decoding(model, padded_batch(), STEPS).logits.shape[0] == 2
    model.model.get_decoder().rotary_emb.rope_type = kind
    with pytest.raises(ModelSupportError, match=r"engine=graph .*engine=eager"):
        setting.decoding(model, padded_batch(), STEPS)
