"""Artefacts as files: whole, of the right shapes, of numbers, and never a pickle; everything else is one line."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Calibrated, Layout, Needs, Policy, PolicyCache, ScorePolicy, View, cache_argument
from kvbench.cache.artefact import artefact_bytes, read_artefact
from kvbench.cache.recording import CalibrationCache
from kvbench.contract.driving import drive
from kvbench.errors import ConfigError, ModelSupportError, PolicyError
from kvbench.policies.q_filters import QFilters
from tests.covering import share_of
from tests.tiny_models import random_tokens, tiny_model

ABOUT = {"policy": "kvbench:QFilters", "model": "a", "num_prompts": 3}


def layers(heads: int = 2, width: int = 8, count: int = 2) -> list[Mapping[str, Tensor]]:
    return [{"filter": torch.full((heads, width), 1.0 + number)} for number in range(count)]


def written(folder: Path, content: bytes) -> str:
    path = folder / "mine.safetensors"
    path.write_bytes(content)
    return str(path)


def refused(path: str, match: str, kind: type[Exception] = ConfigError) -> None:
    with pytest.raises(kind, match=match) as caught:
        PolicyCache(tiny_model("llama_gqa"), QFilters(artefact=path), Budget(tokens=4))
    assert "\n" not in str(caught.value)


def test_what_was_written_is_read_by_every_layer_its_own_part(tmp_path: Path) -> None:
    path = written(tmp_path, artefact_bytes(layers(), ABOUT))
    cache = PolicyCache(tiny_model("llama_gqa"), QFilters(artefact=path), Budget(tokens=4))
    trace = drive(tiny_model("llama_gqa"), cache, random_tokens(1, 1, 12), 10)
    assert all(len(head) <= 4 for layer in trace.held[-1] for row in layer for head in row)
    parts = [layer.setup.artefact.of_layer(n, torch.device("cpu")) for n, layer in enumerate(cache.policy_layers)]  # type: ignore[union-attr]
    assert [float(part["filter"][0, 0]) for part in parts] == [1.0, 2.0]


def test_the_same_content_is_the_same_bytes_and_another_one_has_another_hash(tmp_path: Path) -> None:
    reordered = dict(reversed(ABOUT.items()))
    assert artefact_bytes(layers(), ABOUT) == artefact_bytes(layers(), reordered)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(artefact_bytes(layers(), ABOUT))
    other.write_bytes(artefact_bytes(layers(), {**ABOUT, "num_prompts": 4}))
    assert read_artefact(one).sha256 != read_artefact(other).sha256
    assert read_artefact(one).about["num_prompts"] == 3


@settings(max_examples=share_of(60), deadline=None)
@given(share=st.floats(0.0, 0.999))
def test_a_truncated_file_is_refused_in_one_line_wherever_it_ends(tmp_path_factory: Any, share: float) -> None:
    whole = artefact_bytes(layers(), ABOUT)
    refused(written(tmp_path_factory.mktemp("cut"), whole[: int(share * len(whole))]), "not a whole file")


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    refused(written(tmp_path, pickle.dumps({"filter": [1.0]})), "not a whole file of kvbench calibrate")


def test_a_safetensors_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save

    refused(written(tmp_path, save({"layers.0.filter": torch.ones(2, 8)})), "not a whole file of kvbench calibrate")


@pytest.mark.parametrize("wrong", [layers(heads=4), layers(width=16), layers(count=1), layers(count=3)])
def test_a_file_of_another_shape_is_refused(tmp_path: Path, wrong: list[Mapping[str, Tensor]]) -> None:
    refused(written(tmp_path, artefact_bytes(wrong, ABOUT)), r"layers\.\d\.filter of shape .* reads")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    content = artefact_bytes([{"filter": torch.full((2, 8), torch.nan)}] * 2, ABOUT)
    refused(written(tmp_path, content), "not finite")


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    refused(written(tmp_path, artefact_bytes(layers(), {"version": 2})), "version 2; this kvbench reads 1")


def test_a_missing_file_and_none_at_all_are_refused(tmp_path: Path) -> None:
    refused(str(tmp_path / "none.safetensors"), "cannot be read .* kvbench calibrate")
    with pytest.raises(ConfigError, match=r"policy\.artefact is not given"):
        PolicyCache(tiny_model("llama_gqa"), QFilters(), Budget(tokens=4))


class Undeclared(ScorePolicy):
    def score(self, view: View) -> Tensor:
        return view.artefact["filter"]


class NotCalibrated(Policy):
    needs = Needs.ARTEFACT


def test_a_policy_must_declare_what_it_reads_and_how_it_learns() -> None:
    cache = PolicyCache(tiny_model("llama_gqa"), Undeclared(), Budget(tokens=4))
    with pytest.raises(PolicyError, match="ARTEFACT"):
        drive(tiny_model("llama_gqa"), cache, random_tokens(1, 1, 10), 10)
    with pytest.raises(ConfigError, match="does not derive from Calibrated"):
        PolicyCache(tiny_model("llama_gqa"), NotCalibrated(), Budget(tokens=4))


class Unrotated(Calibrated):
    def gather(self, sample: Any) -> Mapping[str, Tensor]:
        return {"keys": sample.unrotated(sample.keys), "position": sample.position}


def test_keys_are_learnt_from_before_rotation_or_it_is_said_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model, token = tiny_model("llama_gqa"), torch.full((1, 12), 7)

    def gathered() -> Mapping[str, Tensor]:
        cache = CalibrationCache(model, Unrotated())
        with torch.no_grad():
            model(token, **cache_argument(model, cache), use_cache=True)
        return cache.gathered[0]

    keys = gathered()["keys"]
    torch.testing.assert_close(keys, keys[:, :, :1].expand_as(keys), rtol=1e-4, atol=1e-5)  # one token, one key
    monkeypatch.setattr(model.config, "model_type", "other")
    with pytest.raises(ModelSupportError, match="before rotation"):
        gathered()


def test_a_layout_is_read_from_a_model() -> None:
    assert Layout.of(tiny_model("llama_gqa_8_2")) == Layout(num_layers=2, num_heads=2, group=4, width=8, hidden=32)
