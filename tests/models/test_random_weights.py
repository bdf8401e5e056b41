from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.cache import Kind
from kvbench.datasets.text import Synthetic
from kvbench.errors import ConfigError, DataError, ModelSupportError
from kvbench.models import loader
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel, architecture, load_model, random_model
from kvbench.models.spec import VISION_FAMILIES, ModelSpec, image_tokens
from tests.models.architectures import SMALL, architecture_of, small_spec

META = torch.device("meta")


def loaded_small(name: str, **options: Any) -> LoadedModel:
    return load_model(small_spec(name, **options), "cpu")


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.62)],
)
def test_a_written_architecture_has_as_many_parameters_as_was_published(name: str, billions: float) -> None:
    config = architecture(architecture_of(name))
    model = random_model(config, vision=config.model_type in VISION_FAMILIES, dtype=torch.bfloat16, device=META, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_llama_3_1_has_its_own_rotary_frequencies() -> None:
    config = architecture(architecture_of("llama-3.1-8b"))
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["rope_theta"] == 500_000.0
    assert architecture(architecture_of("qwen2.5-7b")).rope_parameters["rope_theta"] == 1_000_000.0


@pytest.mark.parametrize("name", SMALL)
def test_random_weights_are_drawn_once_per_seed_and_norms_are_the_identity(name: str) -> None:
    first, again, other = (loaded_small(name, weights_seed=seed).model for seed in (0, 0, 1))
    for key, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(key))
        if "norm" in key and key.endswith("weight"):
            assert bool((weight == 1).all())
        elif weight.numel() > 1000:
            assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.15)
            assert not torch.equal(weight, other.get_parameter(key))


@pytest.mark.parametrize("name", SMALL)
def test_buffers_are_those_that_transformers_computes(name: str) -> None:
    ours = loaded_small(name).model
    config = architecture(small_spec(name).known_config() or {})
    theirs = type(ours)(config)
    assert dict(theirs.named_buffers()).keys() == dict(ours.named_buffers()).keys()
    for key, buffer in theirs.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(key)), key


def test_weights_are_made_in_the_dtype_that_was_asked_for() -> None:
    loaded = loaded_small("llava-1.5-7b", dtype="bfloat16")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("name", SMALL)
def test_a_synthetic_prompt_has_the_tokens_and_the_picture_that_were_asked_for(name: str) -> None:
    loaded = loaded_small(name)
    batch = prompt_batch(loaded, Synthetic(prompt_tokens=21, num_examples=3).examples())
    ids = batch.tensors["input_ids"]
    assert batch.prompt_tokens == [21, 21, 21]
    assert len({tuple(row) for row in ids.tolist()}) == 3
    assert 0 <= int(ids.min()) <= int(ids.max()) < loaded.model.config.get_text_config().vocab_size
    pictures = 4 if loaded.takes_images else 0
    assert (batch.kind == Kind.IMAGE).sum(dim=-1).tolist() == [pictures] * 3
    assert ("pixel_values" in batch.tensors) == loaded.takes_images
    with torch.no_grad():
        assert bool(torch.isfinite(loaded.model(**batch.tensors).logits).all())


def test_a_model_that_takes_pictures_also_takes_prompts_without() -> None:
    loaded = loaded_small("llava-1.5-7b")
    batch = prompt_batch(loaded, Synthetic(prompt_tokens=3, num_images=0).examples())
    assert set(batch.tensors) == {"input_ids", "attention_mask"}
    assert not bool((batch.tensors["input_ids"] == loaded.image_token_id).any())


def test_the_same_seed_gives_the_same_prompt_and_another_one_another() -> None:
    loaded = loaded_small("llava-1.5-7b")
    first, again, other = (
        prompt_batch(loaded, Synthetic(prompt_tokens=20, seed=seed).examples()).tensors for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_a_prompt_too_short_for_its_picture_is_refused() -> None:
    with pytest.raises(DataError, match="no room for a picture of 4 and"):
        prompt_batch(loaded_small("llava-1.5-7b"), Synthetic(prompt_tokens=5).examples())
    with pytest.raises(ConfigError, match="give at least 578"):
        Synthetic(prompt_tokens=577).check_image_tokens(576)
    Synthetic(prompt_tokens=578).check_image_tokens(576)
    Synthetic(prompt_tokens=5, num_images=0).check_image_tokens(576)


def test_a_picture_counts_as_the_published_number_of_tokens() -> None:
    assert image_tokens(architecture_of("llava-1.5-7b")) == image_tokens(architecture_of("llava-1.5-13b")) == 576
    assert image_tokens(architecture_of("qwen2.5-7b")) == 0


def test_a_field_that_the_family_does_not_have_is_refused_with_a_close_match() -> None:
    config = architecture_of("llava-1.5-7b")
    config["text_config"]["num_hidden_layer"] = 3
    with pytest.raises(ConfigError, match=r"num_hidden_layer is no field of LlamaConfig.*num_hidden_layers"):
        architecture(config)


def test_the_bundled_architecture_can_be_drawn_at_random_too() -> None:
    loaded = load_model(ModelSpec(checkpoint="bundled", weights="random"), "cpu")
    batch = prompt_batch(loaded, Synthetic(prompt_tokens=600).examples())
    assert (batch.kind == Kind.IMAGE).sum().item() == 576
    assert loaded.tokenizer is None
    assert loaded.eos_token_id == loaded.model.config.get_text_config().eos_token_id


def test_a_model_without_end_token_says_so() -> None:
    spec = small_spec("qwen2.5-7b")
    assert spec.config is not None
    loaded = load_model(
        ModelSpec(checkpoint="x", weights="random", config={**spec.config, "eos_token_id": None}), "cpu"
    )
    with pytest.raises(ModelSupportError, match="end token"):
        _ = loaded.eos_token_id


def test_random_weights_without_an_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.config is not given"):
        ModelSpec(checkpoint="llava-hf/llava-1.5-7b-hf", weights="random")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelSpec(checkpoint=str(tmp_path), weights="random")
    with pytest.raises(ConfigError, match="model_type is 'gpt2'; supported: llava"):
        ModelSpec(checkpoint="x", weights="random", config={"model_type": "gpt2"})


def test_the_fingerprint_of_random_weights_is_that_of_architecture_and_seed() -> None:
    first, again = small_spec("llama-3.1-8b"), small_spec("llama-3.1-8b")
    assert first.fingerprint() == again.fingerprint()
    assert hash(first) == hash(again)
    assert small_spec("llama-3.1-8b", weights_seed=1).fingerprint() != first.fingerprint()
    assert small_spec("qwen2.5-7b").fingerprint() != first.fingerprint()
    assert (
        ModelSpec(checkpoint="bundled").fingerprint() != ModelSpec(checkpoint="bundled", weights="random").fingerprint()
    )


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_the_device_of_a_model_becomes_the_current_one(
    device: str, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []

    def stop(spec: ModelSpec, device: str) -> None:
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr(loader, "_random", stop)
    with pytest.raises(InterruptedError):
        loader.load_model(small_spec("llama-3.1-8b"), device)
    assert chosen == current
