"""A model over several devices: what may be asked for, where its parts go, and that nothing else changes.

There is no second device here that computes, so two names of the CPU stand for two devices: accelerate's hooks, the
placement and the cache go the way that they go on GPUs, and tests/gpu/test_two_gpus.py runs them there.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kvbench import measures
from kvbench.cache import Budget, Policy
from kvbench.contract.driving import held_positions
from kvbench.errors import ConfigError, ModelSupportError
from kvbench.models import devices
from kvbench.models.devices import Crossing, checked_devices, chosen_devices, gathered, place_of, placement, spread
from kvbench.models.loader import LoadedModel, architecture, empty_model, random_model
from kvbench.models.spec import ModelSpec
from kvbench.tasks.decode import CacheSetting, Decoding
from tests.models.architectures import small_spec
from tests.tiny_models import tiny_model

pytest.importorskip("accelerate", reason="accelerate is not installed")

CPU = torch.device("cpu")
OTHER = torch.device("cpu", 0)  # another name, the same device
SHAPE = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
SHAPE |= {"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
ROOM = {0: 10**9, 1: 10**9}


@pytest.mark.parametrize(
    "wrong", ["all", "0,1", [], [0, -1], [0, True], [0, "1"], [1.0], 1, {"0": 1}, [0, 0], [2, 1, 2]], ids=repr
)
def test_what_is_no_list_of_different_gpus_is_refused_in_one_line(wrong: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.devices is .*; it must be null .*auto .*list of different"
    ) as raised:
        checked_devices(wrong)
    assert "\n" not in str(raised.value)


def test_a_list_is_kept_in_order_and_makes_a_spec_that_can_be_hashed() -> None:
    assert checked_devices([3, 1]) == (1, 3)
    assert {ModelSpec(checkpoint="bundled", devices=[1, 0]): 1}  # type: ignore[arg-type]
    assert ModelSpec(checkpoint="bundled").key() == ModelSpec(checkpoint="bundled", devices=None).key()
    assert ModelSpec(checkpoint="bundled", devices=(0, 1)).key()["devices"] == 2


def test_auto_takes_all_gpus_and_a_list_what_it_names() -> None:
    assert chosen_devices("auto", 4) == (0, 1, 2, 3)
    assert chosen_devices((1, 3), 4) == (1, 3)
    assert chosen_devices("auto", 1) == (0,)


@pytest.mark.parametrize(
    ("asked", "num_gpus", "told"),
    [
        ("auto", 0, "torch sees no CUDA device"),
        ((0, 1), 1, r"torch sees 1 CUDA device \(GPU 0\)"),
        ((0, 4), 4, r"torch sees 4 CUDA devices \(GPU 0 to 3\)"),
        ("auto", 9, "at most 8"),
    ],
)
def test_more_than_there_is_is_refused_in_one_line(asked: Any, num_gpus: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as raised:
        chosen_devices(asked, num_gpus)
    assert "\n" not in str(raised.value)


def test_a_missing_accelerate_is_told_with_the_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvbench\[devices\]'"):
        chosen_devices("auto", 2)
    assert chosen_devices("auto", 1) == (0,), "one device needs nothing"


def test_every_device_that_is_taken_has_its_measures() -> None:
    assert devices.MAX_DEVICES == measures.MAX_DEVICES
    assert f"device{measures.MAX_DEVICES - 1}_peak_memory_bytes" in measures.MEASURES


def shape(dtype: torch.dtype = torch.float32) -> Any:
    return empty_model(architecture(SHAPE), vision=False, dtype=dtype)


def test_layers_are_shared_out_in_order_and_what_has_no_weights_is_on_the_first_device() -> None:
    places = placement(shape(), ROOM, told="it")
    layers = [place_of(f"model.layers.{number}.self_attn.q_proj.weight", places) for number in range(8)]
    assert layers == sorted(layers)
    assert 3 <= sum(layers) <= 5, "half of them"
    assert places["model.rotary_emb"] == 0
    assert places["lm_head"] == 1


def test_layers_that_lie_on_one_device_all_together_are_each_given_their_inputs_there() -> None:
    """A list of layers is never called, so a hook before it would move nothing; as in a model with a large tower."""
    model = shape()
    model.model.embed_tokens = nn.Embedding(5_000, 64)
    places = placement(model, ROOM, told="it")
    assert {places[f"model.layers.{number}"] for number in range(8)} == {1}
    assert not any(isinstance(model.get_submodule(name), nn.ModuleList) for name in places)


def test_a_70b_fits_two_gpus_of_its_size_in_halves_and_one_not_at_all() -> None:
    whole = ModelSpec(checkpoint="meta-llama/Llama-3.1-70B", weights="random", config={**BIG}, dtype="bfloat16")
    model = empty_model(architecture(whole.known_config() or {}), vision=False, dtype=torch.bfloat16)
    places = placement(model, {0: 138 * 2**30, 1: 138 * 2**30}, told="it")
    held = [0, 0]
    for name, parameter in model.named_parameters():
        held[place_of(name, places)] += parameter.numel() * parameter.element_size()
    assert sum(held) / 2**30 == pytest.approx(131.4, abs=0.1)
    assert max(held) - min(held) < 3 * 2**30
    with pytest.raises(ModelSupportError, match=r"it has 131\.4 GiB of weights, which fit no split .*cuda:0 has 79\.0"):
        placement(model, {0: 79 * 2**30}, told="it")


BIG = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672}
BIG |= {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False}


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_the_same_however_they_are_spread(tied: bool) -> None:
    config = architecture({**SHAPE, "tie_word_embeddings": tied})
    of = {"vision": False, "dtype": torch.float32, "device": CPU, "seed": 3}
    places = placement(empty_model(config, vision=False, dtype=torch.float32), ROOM, told="it")
    one, two = random_model(config, **of), random_model(config, **of, places=places)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert (two.get_input_embeddings().weight is two.get_output_embeddings().weight) == tied
    assert torch.equal(one.model.rotary_emb.inv_freq, two.model.rotary_emb.inv_freq)


def behind_hooks(model: Any) -> Any:
    """Every block takes its inputs from another device than it lies on, as far as the hooks can tell."""
    places = dict.fromkeys(placement_names(model), CPU)
    return spread(copy.deepcopy(model), places, OTHER)


def placement_names(model: Any) -> list[str]:
    layers = [f"model.layers.{number}" for number in range(len(model.model.layers))]
    return ["model.embed_tokens", *layers, "model.norm", "model.rotary_emb", "lm_head"]


def run(model: Any, policy: Policy, positions: Any) -> tuple[list[Any], Any]:
    loaded = LoadedModel(model=model, processor=None, tokenizer=None, device=CPU, image_token_id=None)
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.5), positions=positions)
    from tests.tasks.test_graph import padded_batch

    with torch.inference_mode():
        decoding: Decoding = setting.decoding(loaded, padded_batch(), 6)
        logits = [decoding.logits]
        for _ in range(6):
            logits.append(decoding.step(logits[-1].argmax(-1)).clone())
    return logits, held_positions(decoding.cache)


@pytest.mark.cover("mechanisms")
def test_a_model_behind_hooks_gives_what_it_gives_without(policy: Policy, positions: Any) -> None:
    plain = tiny_model("llama_gqa")
    wide = behind_hooks(plain)
    assert type(wide.model.layers[1]._hf_hook).__name__ == "AlignDevicesHook"
    assert not hasattr(wide.model.layers[1].mlp, "_hf_hook"), "what lies in a block is called as it is"
    (logits, held), (wide_logits, wide_held) = run(plain, policy, positions), run(wide, policy, positions)
    assert all(torch.equal(a, b) for a, b in zip(logits, wide_logits, strict=True))
    assert held == wide_held


def test_hooks_that_loading_left_go_and_hide_no_forward_of_a_class() -> None:
    model = behind_hooks(tiny_model("llama_gqa"))
    assert not any("forward" in vars(module) or hasattr(module, "_hf_hook") for module in gathered(model).modules())


class Moved:
    """Counts its copies."""

    def __init__(self) -> None:
        self.device, self.num_copies = CPU, 0

    def to(self, device: Any) -> Moved:
        self.num_copies += 1
        return Moved()


def test_what_all_layers_read_crosses_once_a_pass() -> None:
    crossing, angles, mask = Crossing(), (Moved(), Moved()), Moved()
    hooks = [crossing.before(1), crossing.before(1), crossing.before(2)]
    for passes in (1, 2):
        found = [
            hook(nn.Identity(), ("hidden",), {"position_embeddings": angles, "mask": mask, "cache": None})
            for hook in hooks
        ]
        assert (angles[0].num_copies, mask.num_copies) == (2 * passes, 2 * passes), "one for each device"
        assert found[0][1]["position_embeddings"][0] is found[1][1]["position_embeddings"][0]
        assert isinstance(found[0][1]["position_embeddings"], tuple)
        assert (found[0][0], found[0][1]["cache"]) == (("hidden",), None)
        crossing.forget()


def test_a_norm_of_the_next_device_is_not_taken_into_the_launch_before_it() -> None:
    from kvbench.kernels.dispatch import kernels_forced
    from kvbench.models.fused import _takes

    pytest.importorskip("triton", reason="triton is not installed")
    x = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    here, elsewhere = (torch.zeros(16, dtype=torch.bfloat16, device=device) for device in ("cpu", "meta"))
    with kernels_forced(True):
        assert _takes(x, here)
        assert not _takes(x, here, elsewhere)


def test_auto_is_resolved_where_a_model_is_loaded_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbench.models import loader

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        loader.load_model(ModelSpec(checkpoint="bundled", devices="auto"), "cpu")


def test_the_split_is_asked_for_before_any_weight_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from kvbench.models import loader

    monkeypatch.setattr(loader, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(loader, "random_model", lambda *args, **options: pytest.fail("weights were made"))
    with pytest.raises(ModelSupportError, match="fit no split") as raised:
        loader.load_model(replace(small_spec("llama-3.1-8b"), devices=(0, 1)), "cpu")
    assert "\n" not in str(raised.value)


def test_a_launcher_runs_on_the_device_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbench.kernels.dispatch import on_its_device

    entered: list[torch.device] = []

    class Entered:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: object) -> None:
            entered.append(CPU)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Entered)
    launch = on_its_device(lambda chunk, more=0: (len(entered), more))
    for number, expected in ((1, (1, 5)), (0, (2, 5))):
        chunk = SimpleNamespace(keys=SimpleNamespace(device=torch.device("cuda", number)))
        assert launch(chunk, more=5) == expected
    assert entered == [torch.device("cuda", 1), CPU]
