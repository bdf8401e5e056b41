"""The released perplexity loop: what it leaves out, what it rounds, and that it can be switched off."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.errors import DataError
from kvbench.models.inputs import answer_tokens
from kvbench.models.loader import LoadedModel
from kvbench.tasks import perplexity as perplexity_released
from kvbench.tasks.generation import Generation
from kvbench.tasks.perplexity import Perplexity, PerplexityReleased
from tests.tasks.benches import FULL, SCENES, bench_of, cut

AS_DESCRIBED = PerplexityReleased(first_id_cut=False, ends_left_out=False, model_precision=False)


@pytest.mark.cover("one")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_with_every_option_off_it_is_the_described_perplexity(
    bundled: LoadedModel, tmp_path: Path, batch_size: int
) -> None:
    bench = bench_of(bundled, tmp_path, cut(), batch_size=batch_size)
    released, described = AS_DESCRIBED.run(bench), Perplexity().run(bench)
    assert released.measurements["ppl_released"]["value"] == pytest.approx(
        described.measurements["ppl"]["value"], rel=1e-6
    )
    for name, row in described.samples.items():
        assert released.samples[name]["released_num_scored_tokens"] == row["num_scored_tokens"]
        assert released.samples[name]["released_nll_sum"] == pytest.approx(row["nll_sum"], rel=1e-5, abs=1e-6)


def test_the_last_and_the_end_token_are_not_scored(bundled: LoadedModel, tmp_path: Path) -> None:
    result = dataclasses.replace(AS_DESCRIBED, ends_left_out=True).run(bench_of(bundled, tmp_path, FULL))
    for example in SCENES.examples():
        scored = result.samples[example.id]["released_num_scored_tokens"]
        assert scored == len(answer_tokens(bundled, example)) - 2


def test_the_first_id_is_cut_whether_or_not_it_is_a_begin_token(bundled: LoadedModel) -> None:
    (example, *_) = SCENES.examples()
    alone = bundled.tokenizer(example.reference)["input_ids"]
    assert PerplexityReleased()._scored_tokens(bundled, example) == alone[1:-1]
    whole = answer_tokens(bundled, example)
    assert dataclasses.replace(AS_DESCRIBED, ends_left_out=True)._scored_tokens(bundled, example) == whole[:-2]


@pytest.mark.long
def test_the_models_precision_moves_the_result_in_coarse_steps(bundled: LoadedModel, tmp_path: Path) -> None:
    """The bundled model stored in bfloat16: every likelihood and the result lie on its grid."""
    half = dataclasses.replace(bundled, model=_in_bfloat16(bundled.model))
    value = PerplexityReleased().run(bench_of(half, tmp_path, cut())).measurements["ppl_released"]["value"]
    exact = PerplexityReleased(model_precision=False).run(bench_of(half, tmp_path, cut())).measurements["ppl_released"]
    assert value == float(torch.tensor(value).bfloat16())
    assert exact["value"] != float(torch.tensor(exact["value"]).bfloat16())
    assert value == pytest.approx(exact["value"], rel=0.02)


def _in_bfloat16(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).bfloat16()


def test_answers_that_leave_nothing_to_score_are_left_out_and_none_at_all_is_an_error(
    bundled: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_) = SCENES.examples()
    real = answer_tokens

    def short(loaded: LoadedModel, example: Any) -> list[int]:
        return [*real(loaded, example)[:1], 2] if example.id == first.id else real(loaded, example)

    monkeypatch.setattr(perplexity_released, "answer_tokens", short)
    task = dataclasses.replace(AS_DESCRIBED, ends_left_out=True)
    result = task.run(bench_of(bundled, tmp_path, FULL))
    assert result.samples[first.id]["released_num_scored_tokens"] == 0
    assert math.isfinite(float(result.measurements["ppl_released"]["value"]))
    assert result.measurements["ppl_released"]["n"] == 2
    monkeypatch.setattr(perplexity_released, "answer_tokens", lambda loaded, example: [5, 2])
    with pytest.raises(DataError, match="no answer"):
        task.run(bench_of(bundled, tmp_path, FULL))


@pytest.mark.long
def test_released_rouge_is_measured_on_texts_with_their_end_token(bundled: LoadedModel, tmp_path: Path) -> None:
    full = Generation(max_new_tokens=12, released_rouge=True).run(bench_of(bundled, tmp_path, FULL))
    assert full.measurements["rougeL_released_vs_full"]["value"] == pytest.approx(1.0, abs=1e-7)
    plain = Generation(max_new_tokens=12).run(bench_of(bundled, tmp_path, cut()))
    assert "rougeL_released_vs_full" not in plain.measurements
