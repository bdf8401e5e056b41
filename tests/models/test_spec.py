from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import kvbench.models.spec as spec_module
from kvbench.errors import ConfigError
from kvbench.models.spec import BUNDLED_FOLDER, ModelSpec

COMMIT = "0123456789abcdef" * 2 + "01234567"


def folder_with(tmp_path: Path, **files: str) -> str:
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(content)
    return str(tmp_path)


def refused(**arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelSpec(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_dtype_is_refused_with_a_close_match() -> None:
    message = refused(checkpoint="bundled", dtype="bfloat61")
    assert "'bfloat61'" in message
    assert "did you mean 'bfloat16'" in message


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:-1], COMMIT.upper()])
def test_a_hub_name_without_its_commit_is_refused(revision: str | None) -> None:
    message = refused(checkpoint="llava-hf/llava-1.5-7b-hf", revision=revision)
    assert f"model.revision is {revision!r}" in message
    assert "40 hex digits" in message


def test_a_hub_name_with_its_commit_is_its_own_fingerprint() -> None:
    spec = ModelSpec(checkpoint="llava-hf/llava-1.5-7b-hf", revision=COMMIT)
    assert spec.folder is None
    assert spec.fingerprint() == f"llava-hf/llava-1.5-7b-hf@{COMMIT}"


def test_a_checkpoint_is_named_by_its_folder_its_hub_name_or_the_model_of_a_hub_cache(tmp_path: Path) -> None:
    assert ModelSpec(checkpoint="llava-hf/llava-1.5-7b-hf", revision=COMMIT).checkpoint_name == "llava-1.5-7b-hf"
    for place in ("SmolLM2-135M-Instruct", f"models--org--SmolLM2-135M-Instruct/snapshots/{COMMIT}"):
        shutil.copytree(BUNDLED_FOLDER, tmp_path / place)
        assert ModelSpec(checkpoint=f"{tmp_path / place}/").checkpoint_name == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "../up", "a/b/c", "a b/c", "a/b\n"])
def test_what_is_neither_folder_nor_hub_name_is_refused(name: str) -> None:
    assert "a folder that exists" in refused(checkpoint=name, revision=COMMIT)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refused(checkpoint=folder_with(tmp_path, model__safetensors="x"))


def test_a_folder_with_a_broken_config_is_refused(tmp_path: Path) -> None:
    assert "is not JSON" in refused(checkpoint=folder_with(tmp_path, config__json="{", model__safetensors="x"))


def test_a_folder_with_pickles_only_is_refused(tmp_path: Path) -> None:
    files = {"config__json": "{}", "pytorch_model__bin": "x"}
    assert "no .safetensors file" in refused(checkpoint=folder_with(tmp_path, **files))


def test_the_bundled_model_needs_nothing_else() -> None:
    spec = ModelSpec(checkpoint="bundled")
    assert spec.folder == BUNDLED_FOLDER
    assert not spec.trust_remote_code


def test_the_fingerprint_follows_the_files_and_not_the_place(tmp_path: Path) -> None:
    folder = shutil.copytree(BUNDLED_FOLDER, tmp_path / "copy")
    copied = ModelSpec(checkpoint=str(folder))
    original = ModelSpec(checkpoint="bundled").fingerprint()
    assert copied.fingerprint() == original
    (folder / "notes.md").write_text("no weights")
    assert copied.fingerprint() == original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_seq_length": 145}))
    assert copied.fingerprint() != original


@pytest.mark.parametrize("at", [0, 1, 100_001, 2**22 - 2**14 - 1, 2**22 - 1])
def test_a_change_of_large_weights_changes_the_fingerprint_if_it_is_as_long_as_the_gap_between_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(spec_module, "_WHOLE_BYTES", 2**16)
    monkeypatch.setattr(spec_module, "_BLOCK_BYTES", 2**10)
    folder_with(tmp_path, config__json="{}")
    weights, content = tmp_path / "model.safetensors", bytearray(2**22)
    weights.write_bytes(content)
    before = ModelSpec(checkpoint=str(tmp_path)).fingerprint()
    content[at : at + 2**22 // 256] = b"\1" * len(content[at : at + 2**22 // 256])
    weights.write_bytes(content)
    assert ModelSpec(checkpoint=str(tmp_path)).fingerprint() != before
