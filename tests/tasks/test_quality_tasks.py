from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from kvbench.cache import Budget
from kvbench.cache import layer as decode_step
from kvbench.datasets.scenes import Scenes, describe, describe_prompt, draw_scene, scene_at
from kvbench.errors import ConfigError, MeasureError, NonFiniteChoiceError, NonFiniteError
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import BUNDLED_FOLDER
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.results.files import canonical_json
from kvbench.tasks.generation import Generation, MultiTurn, says_the_same
from kvbench.tasks.memory import Capacity, Memory
from kvbench.tasks.perplexity import Fidelity, Perplexity, PerplexityReleased
from kvbench.tasks.speed import Speed
from kvbench.tasks.task import Task, TaskResult
from tests.tasks.benches import FULL, SCENES, NanAtDecode, NotANumber, bench_of, cut

SHORT = Generation(max_new_tokens=8)
SHORT_FIDELITY = Fidelity(max_new_tokens=8, check_tokens=3)


@torch.no_grad()
def stock_nll(index: int) -> tuple[float, int]:
    """Return the summed loss and the number of scored tokens by one forward of the stock model."""
    model = AutoModelForImageTextToText.from_pretrained(BUNDLED_FOLDER, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(BUNDLED_FOLDER)
    scene = scene_at("test", index)
    prompt = f"<s>USER: <image>\n{describe_prompt(scene)} ASSISTANT:"
    inputs = processor(
        text=prompt + " " + describe(scene) + "</s>",
        images=draw_scene(scene),
        return_tensors="pt",
        add_special_tokens=False,
    )
    ids = inputs["input_ids"][0]
    begin = len(processor(text=prompt, images=draw_scene(scene), add_special_tokens=False)["input_ids"][0])
    losses = torch.nn.functional.cross_entropy(model(**inputs).logits[0, :-1], ids[1:], reduction="none")
    return float(losses[begin - 1 :].sum()), len(ids) - begin


def test_perplexity_is_that_of_one_forward_of_the_stock_model(bundled: LoadedModel, tmp_path: Path) -> None:
    result = Perplexity().run(bench_of(bundled, tmp_path, FULL))
    expected = [stock_nll(index) for index in range(3)]
    for example, (loss, count) in zip(SCENES.examples(), expected, strict=True):
        row = result.samples[example.id]
        assert row["num_scored_tokens"] == count
        assert row["nll_sum"] == pytest.approx(loss, rel=1e-4, abs=1e-4)
    pooled = math.exp(sum(loss for loss, _ in expected) / sum(count for _, count in expected))
    assert result.measurements["ppl"]["value"] == pytest.approx(pooled, rel=1e-4)


@pytest.mark.long
def test_perplexity_does_not_depend_on_the_batch(bundled: LoadedModel, tmp_path: Path) -> None:
    alone, together = (Perplexity().run(bench_of(bundled, tmp_path, cut(), batch_size=n)) for n in (1, 3))
    for name, row in alone.samples.items():
        assert together.samples[name]["nll_sum"] == pytest.approx(row["nll_sum"], rel=1e-3)


def test_the_full_cache_equals_itself(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = bench_of(bundled, tmp_path, FULL)
    generated, compared = SHORT.run(bench), SHORT_FIDELITY.run(bench)
    values = {name: entry["value"] for name, entry in generated.measurements.items()}
    assert [values[f"rouge{kind}_vs_full"] for kind in "12L"] == [1.0, 1.0, 1.0]
    assert values["length_ratio"] == 1.0
    assert values["first_divergence_tokens"] is None
    assert values["realised_budget_fraction"] == 1.0
    assert compared.measurements["kl_to_full"]["value"] == 0.0
    assert compared.measurements["top1_agreement_fraction"]["value"] == 1.0


def test_a_cut_cache_differs_and_holds_what_its_budget_says(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = bench_of(bundled, tmp_path, cut(Budget(fraction=0.2), StreamingLLM()))
    generated, compared = SHORT.run(bench), SHORT_FIDELITY.run(bench)
    assert compared.measurements["kl_to_full"]["value"] > 1e-3
    assert compared.measurements["top1_agreement_fraction"]["value"] <= 1.0
    assert 0.19 < generated.measurements["realised_budget_fraction"]["value"] <= 0.2
    for seen, mean, most in generated.curves["entries"]:
        assert mean <= most <= 0.2 * seen
    assert generated.measurements["entries_peak"]["value"] == max(row[2] for row in generated.curves["entries"])
    assert {"text", "full_text", "reference", "objects_f1"} <= set(next(iter(generated.samples.values())))


def test_descriptions_recall_objects_and_questions_are_right_or_wrong(bundled: LoadedModel, tmp_path: Path) -> None:
    scenes = Scenes(num_samples=1, split="validation", ask="both", num_follow_ups=2)
    bench = replace(bench_of(bundled, tmp_path, FULL, batch_size=3), dataset=scenes, examples=scenes.examples())
    result = Generation(max_new_tokens=48).run(bench)
    described, *asked = (result.samples[example.id] for example in bench.examples)
    assert described["objects_recalled_fraction"] == 1.0
    assert "answers_right_fraction" not in described
    for row in asked:
        assert row["answers_right_fraction"] == float(row["text"] == row["reference"])
        assert "objects_recalled_fraction" not in row
    right = sum(row["answers_right_fraction"] for row in asked) / 2
    assert result.measurements["objects_recalled_fraction"]["value"] == 1.0
    assert result.measurements["answers_right_fraction"]["value"] == right


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [("In A1.", "in  a1", True), ("Two.", "Two", True), ("Two.", "Three.", False), ("", "Two.", False)],
)
def test_an_answer_is_right_but_for_case_space_and_a_full_stop(text: str, other: str, same: bool) -> None:
    assert says_the_same(text, other) == same


def stored_file(folder: Path) -> Path:
    (path,) = (folder / "full_answers").glob("*.json")
    return path


def test_full_answers_are_computed_once(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = bench_of(bundled, tmp_path, cut())
    first = SHORT.run(bench)
    written = stored_file(tmp_path).stat().st_mtime_ns
    assert SHORT.run(bench).samples == first.samples
    SHORT_FIDELITY.run(bench)
    assert stored_file(tmp_path).stat().st_mtime_ns == written

    def never() -> dict[str, list[int]]:
        raise AssertionError("the stored answers must be used")

    assert set(bench.answers.get(SHORT.max_new_tokens, never)) == set(first.samples)
    with pytest.raises(AssertionError):
        bench.answers.get(15, never)


@pytest.mark.long
def test_full_answers_are_stored_with_the_last_batch_those_of_batches_before_a_kill_among_them(
    bundled: LoadedModel, tmp_path: Path
) -> None:
    through, resumed = (bench_of(bundled, tmp_path / name, cut()) for name in ("through", "resumed"))
    SHORT.measure(through, through.prompts.part(0))
    assert not list((tmp_path / "through").glob("*/*.json"))
    SHORT.measure(through, through.prompts.part(1))
    SHORT.measure(resumed, resumed.prompts.part(1))
    whole, again = (json.loads(stored_file(tmp_path / name).read_text()) for name in ("through", "resumed"))
    assert whole["answers"] == again["answers"]
    assert set(whole["answers"]) == {example.id for example in SCENES.examples()}


def changed(answers: dict[str, list[int]]) -> None:
    answers["scenes-v2/test/0"][3] += 1


def shortened(answers: dict[str, list[int]]) -> None:
    del answers["scenes-v2/test/2"]


@pytest.mark.long
@pytest.mark.cover("one")
@pytest.mark.parametrize("tamper", [changed, shortened])
def test_tampered_full_answers_are_refused(
    bundled: LoadedModel, tmp_path: Path, tamper: Callable[[dict[str, list[int]]], None]
) -> None:
    def run() -> TaskResult:
        return SHORT.run(bench_of(bundled, tmp_path, cut()))

    run()
    content = json.loads(stored_file(tmp_path).read_text())
    tamper(content["answers"])
    stored_file(tmp_path).write_text(json.dumps(content))
    assert run().measurements["length_ratio"]["value"] > 0, "a file that fails its checksum is made again"
    content["sha256"] = hashlib.sha256(canonical_json(content["answers"]).encode()).hexdigest()
    stored_file(tmp_path).write_text(json.dumps(content))
    with pytest.raises(MeasureError, match="delete results/full_answers"):
        run()


@pytest.mark.parametrize("content", ["", "{torn", "[]", '{"settings": {}, "answers": {}}', "null"])
def test_a_corrupt_store_is_computed_again(tmp_path: Path, bundled: LoadedModel, content: str) -> None:
    answers = bench_of(bundled, tmp_path, FULL).answers
    first = answers.get(5, lambda: {"a": [1, 2]})
    stored_file(tmp_path).write_text(content)
    assert answers.get(5, lambda: {"a": [1, 2]}) == first
    assert answers.get(5, dict) == first, "and the file is whole again"


@pytest.mark.cover("one")
@pytest.mark.parametrize("task", [Perplexity(), SHORT, SHORT_FIDELITY])
def test_a_cache_of_nan_has_no_number(bundled: LoadedModel, tmp_path: Path, task: Task) -> None:
    with pytest.raises(NonFiniteError):
        task.run(bench_of(bundled, tmp_path, cut(policy=NotANumber())))


EVERY_TASK: list[Task] = [
    Perplexity(),
    PerplexityReleased(),
    Generation(max_new_tokens=3),
    Fidelity(max_new_tokens=3, check_tokens=1),
    MultiTurn(max_new_tokens=3, max_turns=2),
    Speed(new_tokens=3, num_blocks=1),
    Memory(new_tokens=3),
    Capacity(new_tokens=3, num_launches=1, max_batch_size=1),
]


@pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: type(task).__name__)
def test_every_task_asks_at_its_end_whether_victims_were_chosen_by_nan(
    bundled: LoadedModel, tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a step only notes it: logits are finite and nothing else would tell."""
    monkeypatch.setattr(decode_step, "check_faults", lambda *arguments: None)
    bench = replace(bench_of(bundled, tmp_path, cut(policy=NanAtDecode())), examples=SCENES.examples()[:1])
    with pytest.raises(NonFiniteChoiceError, match="NanAtDecode chose a victim by NaN at decode"):
        task.run(bench)


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        (Generation, {"max_new_tokens": 0}),
        (Fidelity, {"max_new_tokens": 0}),
        (Fidelity, {"check_tokens": 0}),
    ],
)
def test_a_wrong_length_is_refused(task: type, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}"):
        task(**wrong)
