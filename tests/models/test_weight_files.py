"""Weights that are not whole, or not those of their config: told by name, never loaded as random numbers."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbench.config.checks import check_model
from kvbench.errors import ConfigError, KvbenchError, ModelSupportError
from kvbench.models.loader import load_model
from kvbench.models.spec import ModelSpec, check_weight_files
from tests.models.checkpoints import FAMILIES, save_checkpoint

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a\nsize 3\n"
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: save_checkpoint(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def copied(originals: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: shutil.copytree(originals(family), tmp_path / family)


@pytest.fixture
def llama(copied: Callable[[str], Path]) -> Path:
    return copied("llama")


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def with_config(folder: Path, **changes: Any) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def sharded(folder: Path) -> dict[str, str]:
    """Write the weights in two files with an index, as large checkpoints come; return its map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(KvbenchError) as caught:
        act()
    assert isinstance(caught.value, ConfigError | ModelSupportError)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refused_before_loading(folder: Path) -> str:
    """Return what the command line says; loading says the same."""
    spec = ModelSpec(checkpoint=str(folder))
    message = refusal(lambda: check_model(spec, NoPictures(), "original", "eager"))
    assert refusal(lambda: load_model(spec, "cpu")) == message
    return message


def refused_by_loading(folder: str) -> str:
    return refusal(lambda: load_model(ModelSpec(checkpoint=folder), "cpu"))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.long) for name in FAMILIES[:4]] + [*FAMILIES[4:]]
)
def test_a_layer_that_the_file_lacks_is_named_and_never_drawn(copied: Callable[[str], Path], family: str) -> None:
    lacked: list[str] = []

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        lacked.extend(name for name in tensors if ".1." in name and "vis" not in name)
        assert len(lacked) >= 4
        for name in lacked:
            tensors.pop(name)

    message = refused_by_loading(with_tensors(copied(family), drop))
    assert f"lacks {len(lacked)} tensors that its config.json asks for" in message
    assert f"and {len(lacked) - 3} more" in message
    assert ".1." in message


@pytest.mark.parametrize("family", ["llama", "llava", "qwen"])
def test_a_tensor_that_the_config_has_no_place_for_is_named(copied: Callable[[str], Path], family: str) -> None:
    folder = with_tensors(copied(family), lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    assert "holds 1 tensor that the model of its config.json does not have (extra.weight)" in refused_by_loading(folder)


def test_a_config_of_fewer_layers_than_the_file_is_refused(llama: Path) -> None:
    message = refused_by_loading(with_config(llama, num_hidden_layers=1))
    assert "holds 9 tensors that the model of its config.json does not have (model.layers.1." in message


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_a_config_of_other_sizes_than_the_file_is_refused_with_both_shapes(
    copied: Callable[[str], Path], family: str
) -> None:
    folder = copied(family)
    config = json.loads((folder / "config.json").read_text())
    inner = {"text_config": {**config["text_config"], "intermediate_size": 40}} if "text_config" in config else {}
    message = refused_by_loading(with_config(folder, **(inner or {"intermediate_size": 40})))
    assert "6 tensors of other shapes than its config.json asks for" in message
    assert "is 48 x " in message or "x 48" in message
    assert "40" in message


def test_tied_weights_and_buffers_of_older_checkpoints_are_not_missed(copied: Callable[[str], Path]) -> None:
    tied = copied("qwen2")
    with_tensors(tied, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lacks 1 tensor that its config.json asks for (lm_head.weight)" in refused_by_loading(str(tied))
    model = load_model(ModelSpec(checkpoint=with_config(tied, tie_word_embeddings=True)), "cpu").model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    load_model(ModelSpec(checkpoint=with_tensors(tied, lambda tensors: tensors.update(buffers))), "cpu")
    ported = with_tensors(
        copied("qwen"), lambda tensors: tensors.update({"transformer.rotary_emb.inv_freq": torch.ones(4)})
    )
    load_model(ModelSpec(checkpoint=ported), "cpu")


def test_a_whole_checkpoint_in_shards_loads(llama: Path) -> None:
    sharded(llama)
    spec = ModelSpec(checkpoint=str(llama))
    check_model(spec, NoPictures(), "original", "eager")
    assert load_model(spec, "cpu").model.config.model_type == "llama"


class NoPictures:
    """A data set that a text model can be asked about."""

    fingerprint = "none"

    def examples(self) -> list[Any]:
        return []

    def facts_in(self, text: str) -> frozenset[Any]:
        return frozenset()


@pytest.mark.parametrize("kept", [0, 5, 60, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_a_download_that_broke_off_is_refused(llama: Path, kept: int) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    message = refused_before_loading(llama)
    assert "model.safetensors" in message
    assert "download it again" in message


def test_a_download_that_broke_off_says_how_much_is_there(llama: Path) -> None:
    weights = llama / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"has {size - 100} bytes, and its header tells of {size}" in refused_before_loading(llama)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>Sign in", b"\0" * 4096, struct.pack("<Q", 2) + b"[]"])
def test_what_is_no_safetensors_file_is_refused(llama: Path, content: bytes) -> None:
    (llama / "model.safetensors").write_bytes(content)
    assert "model.safetensors is not a whole safetensors file" in refused_before_loading(llama)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_in_the_place_of_a_file_is_refused(llama: Path, name: str) -> None:
    (llama / name).write_text(POINTER)
    if name == "config.json":
        message = refusal(lambda: ModelSpec(checkpoint=str(llama)))
    else:
        message = refused_before_loading(llama)
    assert f"{name} is a pointer of git-lfs and not the file itself" in message
    assert "git lfs pull" in message


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_among_shards_is_refused(llama: Path, name: str) -> None:
    places = sharded(llama)
    (llama / (name if name.endswith("json") else min(places.values()))).write_text(POINTER)
    assert "is a pointer of git-lfs" in refused_before_loading(llama)


def test_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b", "peft_type": "LORA"}))
    save_file({"lora_A": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    message = refusal(lambda: ModelSpec(checkpoint=str(tmp_path)))
    assert "is an adapter" in message
    assert "'a/b'" in message
    assert "merge" in message


def test_an_adapter_beside_a_model_is_refused_as_it_would_be_left_out(llama: Path) -> None:
    (llama / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b"}))
    save_file({"lora_A": torch.ones(2)}, llama / "adapter_model.safetensors")
    assert "holds an adapter" in refused_before_loading(llama)


def test_a_missing_shard_is_named(llama: Path) -> None:
    places = sharded(llama)
    (llama / max(places.values())).unlink()
    assert "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names" in refused_before_loading(
        llama
    )


def test_a_missing_index_is_named(llama: Path) -> None:
    sharded(llama)
    (llama / "model.safetensors.index.json").unlink()
    message = refused_before_loading(llama)
    assert "model.safetensors.index.json" in message
    assert "model-00001-of-00002.safetensors" in message


def test_weights_under_another_name_are_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "consolidated.safetensors")
    message = refused_before_loading(llama)
    assert "has no model.safetensors" in message
    assert "consolidated.safetensors" in message


@pytest.mark.parametrize("places", [[], {}, None, {"a": 3}, {"a": "../model.safetensors"}])
def test_an_index_of_another_form_is_refused(llama: Path, places: Any) -> None:
    sharded(llama)
    write_index(llama, places)
    assert "model.safetensors.index.json" in refused_before_loading(llama)


def test_an_index_that_names_what_its_shard_does_not_hold_is_refused(llama: Path) -> None:
    places = sharded(llama)
    name = min(places)
    write_index(llama, places | {name: next(file for file in places.values() if file != places[name])})
    assert f"does not hold {name}" in refused_before_loading(llama)


@pytest.mark.parametrize(
    ("family", "name", "fragment"),
    [
        ("llama", "tokenizer.json", "cannot be loaded (Couldn't instantiate the backend tokenizer"),
        ("llava", "processor_config.json", "cannot be loaded (Can't load image processor"),
        ("qwen2_5_vl", "preprocessor_config.json", "cannot be loaded (Can't load image processor"),
        ("qwen", "qwen.tiktoken", "has no qwen.tiktoken"),
    ],
)
def test_a_missing_file_of_tokenizer_or_processor_is_told_in_one_line(
    copied: Callable[[str], Path], family: str, name: str, fragment: str
) -> None:
    folder = copied(family)
    (folder / name).unlink()
    assert fragment in refused_by_loading(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_settings_file_that_broke_off_is_refused(llama: Path, name: str) -> None:
    (llama / name).write_bytes((llama / name).read_bytes()[:30])
    assert f"{name} is not JSON (" in refused_before_loading(llama)
    (llama / name).write_text("{}")
    check_model(ModelSpec(checkpoint=str(llama)), NoPictures(), "original", "eager")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json"]
)  # `check_model` looks at config.json
@pytest.mark.parametrize("content", ["[]", "null", '"llama"', "3"])
def test_a_settings_file_that_holds_no_object_is_refused(llama: Path, name: str, content: str) -> None:
    (llama / name).write_text(content)
    assert f"{name} holds a " in refused_before_loading(llama)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_weights_that_are_whole_numbers_are_refused_unless_the_config_says_what_they_stand_for(
    llama: Path, dtype: torch.dtype
) -> None:
    """Without a scale they are no weights, and load as if they were."""
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = (10 * tensors[name]).to(dtype)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    assert f"holds whole numbers as weights ({name})" in refused_before_loading(llama)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mine"}}))
    check_weight_files(llama)
