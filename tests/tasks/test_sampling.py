"""Drawn answers, answers of a fixed length, and what of them is in a cell's key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.cache import Budget
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.datasets.base import Example
from kvbench.datasets.questions import Problems
from kvbench.errors import ConfigError
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.h2o import H2O
from kvbench.tasks.decode import CacheSetting, Engine, greedy
from kvbench.tasks.generation import Answering, Generation, HeldEntries, Sampler
from kvbench.tasks.task import Bench, TaskResult
from tests.datasets.files import write_lines
from tests.models.checkpoints import save_checkpoint
from tests.tasks.benches import FULL, SCENES, bench_of, cut
from tests.tasks.test_graph import ON, loaded, padded_batch

DRAWN = Generation(max_new_tokens=8, temperature=2.0, num_samples=3, seed=5)
LONG = 40


def sampler(*names: str, temperature: float = 1.0, **settings: Any) -> Sampler:
    found = Answering(max_new_tokens=1, temperature=temperature, **settings).sampler(names)
    assert found is not None
    return found


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, -math.inf, 2.0]]).repeat(100, 1)
    drawing = sampler(*map(str, range(100)), temperature=2.0)
    drawn = torch.cat([drawing(logits) for _ in range(200)])
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = (logits[0] / 2.0).softmax(dim=-1)
    spread = (expected * (1 - expected) / len(drawn)).sqrt()
    assert bool(((shares - expected).abs() <= 5 * spread).all())
    assert shares[3] == 0


def test_a_small_temperature_takes_the_likeliest() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sampler(*"abcdef", temperature=1e-6)(logits), logits.argmax(dim=-1))


def test_what_a_sequence_is_given_is_its_own() -> None:
    logits = torch.zeros(1, 1000)
    alone = [sampler("b", seed=2, draw=1)(logits).item()]
    drawing = sampler("a", "b", "c", seed=2, draw=1)
    assert drawing(logits.repeat(3, 1))[1].item() == alone[0]
    others = [("a", 2, 1), ("b", 3, 1), ("b", 2, 0)]
    assert all(sampler(name, seed=seed, draw=draw)(logits).item() != alone[0] for name, seed, draw in others)


def answers_of(engine: Engine, rows: int, how: Answering) -> list[list[int]]:
    """Answers of the first of two padded prompts, or of both, under a policy that frees an entry at every step."""
    batch, names = padded_batch(), ["one", "two"]
    if rows == 1:
        tensors = {name: tensor[-1:] for name, tensor in batch.tensors.items()}
        batch = replace(batch, tensors=tensors, kind=batch.kind[-1:], row_seeds=batch.row_seeds[-1:])
        names = names[-1:]
    setting = CacheSetting(policy=H2O(), budget=Budget(fraction=0.4), positions="original", engine=engine)
    model = loaded("llama_gqa", torch.float32)
    return greedy(
        setting.decoding(model, batch, how.max_new_tokens),
        end_token_ids=(),
        max_new_tokens=how.max_new_tokens,
        choose=how.sampler(names),
    )


def test_a_drawn_answer_is_the_same_alone_and_in_a_batch() -> None:
    how = Answering(max_new_tokens=LONG, temperature=1.0)
    together, alone = answers_of("eager", 2, how), answers_of("eager", 1, how)
    assert together[1] == alone[0]
    assert together[0] != together[1]
    assert answers_of("eager", 1, how.numbered(1)) != alone


@pytest.mark.skipif(ON == "cpu", reason="a CUDA graph needs a CUDA device")
def test_a_drawn_answer_is_the_same_in_both_engines() -> None:
    how = Answering(max_new_tokens=LONG, temperature=1.0)
    assert answers_of("graph", 2, how) == answers_of("eager", 2, how)


def test_greedy_answers_are_those_of_no_sampler() -> None:
    assert Answering(max_new_tokens=3).sampler(["a"]) is None
    assert Answering(max_new_tokens=3).settings == {}
    assert Generation(temperature=0.0) == Generation()


@pytest.fixture(scope="module")
def drawn(bundled: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, TaskResult]:
    bench = bench_of(bundled, tmp_path_factory.mktemp("drawn"), cut(Budget(fraction=0.2)))
    return bench, DRAWN.run(bench)


def test_a_row_has_the_mean_of_its_draws_and_each_of_them(drawn: tuple[Bench, TaskResult]) -> None:
    _, result = drawn
    for row in result.samples.values():
        assert len(row["draws"]) == 3
        assert row["text"] == row["draws"][0]["text"]
        recalled = [draw["objects_recalled_fraction"] for draw in row["draws"]]
        assert row["objects_recalled_fraction"] == pytest.approx(sum(recalled) / 3)
        assert row["num_new_tokens"] == row["draws"][0]["num_new_tokens"]
        assert row["length_ratio"] == pytest.approx(sum(draw["length_ratio"] for draw in row["draws"]) / 3)
    assert any(len({draw["text"] for draw in row["draws"]}) > 1 for row in result.samples.values())
    means = [row["objects_recalled_fraction"] for row in result.samples.values()]
    measured = result.measurements["objects_recalled_fraction"]
    assert measured["value"] == pytest.approx(sum(means) / len(means))
    assert measured["n"] == len(means)  # examples, never draws
    assert not {"draws", "text"} & result.measurements.keys()
    assert json.loads(json.dumps(result.samples)) == result.samples


def test_the_full_cache_draws_what_it_is_compared_with(drawn: tuple[Bench, TaskResult]) -> None:
    bench, _ = drawn
    result = DRAWN.run(replace(bench, setting=FULL))
    assert result.measurements["rougeL_vs_full"]["value"] == 1.0
    assert result.measurements["length_ratio"]["value"] == 1.0
    assert result.measurements["first_divergence_tokens"]["value"] is None


@pytest.mark.long
def test_each_draw_of_the_full_cache_is_stored_apart_from_greedy_answers(drawn: tuple[Bench, TaskResult]) -> None:
    bench, _ = drawn
    files = set(bench.answers.folder.glob("*.json"))
    assert len(files) == 3
    Generation(max_new_tokens=8).run(bench)
    Generation(max_new_tokens=8, natural_stop=False).run(bench)
    assert len(set(bench.answers.folder.glob("*.json")) - files) == 2


@pytest.mark.long
def test_draws_do_not_depend_on_the_batch(
    bundled: LoadedModel, drawn: tuple[Bench, TaskResult], tmp_path: Path
) -> None:
    bench, together = drawn
    alone = DRAWN.run(bench_of(bundled, tmp_path, bench.setting, batch_size=1))
    for name, row in alone.samples.items():
        assert [draw["text"] for draw in row["draws"]] == [draw["text"] for draw in together.samples[name]["draws"]]


def test_avg_at_k_is_the_share_of_draws_that_are_right(bundled: LoadedModel, tmp_path: Path) -> None:
    seen: list[str] = []

    def is_right(text: str) -> bool:
        seen.append(text)
        return len(seen) % 3 != 0  # two of three

    def judged(example: Example) -> Example:
        return replace(example, facts=None, one_answer=True, is_right=is_right)

    bench = bench_of(bundled, tmp_path, FULL)
    bench = replace(bench, examples=[judged(example) for example in SCENES.examples()[:1]])
    result = DRAWN.run(bench)
    assert result.measurements["answers_right_fraction"]["value"] == pytest.approx(2 / 3)
    (row,) = result.samples.values()
    assert [draw["answers_right_fraction"] for draw in row["draws"]] == [1.0, 1.0, 0.0]


@pytest.mark.long
def test_an_answer_of_fixed_length_goes_on_behind_its_end(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = replace(bench_of(bundled, tmp_path, cut()), examples=SCENES.examples()[:1])
    stopped, fixed = (Generation(max_new_tokens=60, natural_stop=stop).run(bench) for stop in (True, False))
    (short,), (long,) = stopped.samples.values(), fixed.samples.values()
    assert short["num_new_tokens"] < long["num_new_tokens"] == 60
    assert long["text"].startswith(short["text"])
    assert fixed.measurements["length_ratio"]["value"] == 1.0


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: Generation(temperature=-1.0), "temperature is -1.0; it must be above 0"),
        (lambda: Generation(temperature=math.nan), "temperature is nan"),
        (lambda: Generation(num_samples=4), "no temperature, so that all draws would be the one greedy answer"),
        (lambda: Generation(temperature=0.0, seed=1), "no temperature"),
        (lambda: Generation(temperature=1.0, num_samples=0), "num_samples is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(make: Callable[[], Any], fragment: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def task_key(*words: str) -> dict[str, Any]:
    (composed,) = compose_grid(["model=tiny-llava", "task=generation", *words], multirun=False, config_dir=None)
    found: dict[str, Any] = build_cell(composed).settings["task"]["generation"]
    return found


def test_what_is_not_set_is_in_no_key() -> None:
    plain = task_key()
    assert plain == {
        "class": "kvbench:Generation", "max_new_tokens": 160, "protocol": "greedy_v2", "released_rouge": False
    }  # fmt: skip
    assert task_key("task.generation.temperature=0") == task_key("task.generation.temperature=0.0") == plain
    drawn = task_key("task.generation.temperature=0.6", "task.generation.num_samples=4", "task.generation.seed=2")
    assert drawn == {**plain, "temperature": 0.6, "num_samples": 4, "seed": 2}
    assert task_key("task.generation.natural_stop=false") == {**plain, "natural_stop": False}


@pytest.mark.long
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_an_answer_of_8192_tokens_is_held_to_its_budget_to_the_end(temperature: float | None) -> None:
    how = Answering(max_new_tokens=8192, natural_stop=False, temperature=temperature)
    setting = CacheSetting(policy=H2O(), budget=Budget(tokens=16), positions="in_cache")
    held = HeldEntries()
    answers = greedy(
        setting.decoding(loaded("llama_gqa", torch.float32), padded_batch(), how.max_new_tokens),
        end_token_ids=(),
        max_new_tokens=how.max_new_tokens,
        choose=how.sampler(["one", "two"]),
        on_step=held.note,
    )
    assert [len(answer) for answer in answers] == [8192, 8192]
    entries = held.as_payload()
    assert max(peak for _, _, _, peak in entries) <= 16
    assert entries[-1][0] >= 8192


def test_a_file_of_problems_is_answered_and_scored_by_its_final_answers(tmp_path: Path) -> None:
    rows = [{"question": f"What is {number} + 1?", "answer": f"#### {number + 1}"} for number in range(3)]
    problems = Problems(path=write_lines(tmp_path / "gsm8k.jsonl", rows), instruction="End with a number.")
    model = load_model(ModelSpec(checkpoint=str(save_checkpoint("llama", tmp_path / "llama"))), "cpu")
    bench = replace(bench_of(model, tmp_path, cut()), dataset=problems, examples=problems.examples())
    result = DRAWN.run(bench)
    for example, row in zip(problems.examples(), result.samples.values(), strict=True):
        assert example.is_right is not None
        right = [float(example.is_right(draw["text"])) for draw in row["draws"]]
        assert [draw["answers_right_fraction"] for draw in row["draws"]] == right
        assert row["reference"] == example.reference
    assert result.measurements["answers_right_fraction"]["n"] == 3


@pytest.mark.parametrize("name", ["gsm8k", "aime", "math500"])
def test_the_problems_of_conf_are_cells(name: str, tmp_path: Path) -> None:
    if name == "math500":
        pytest.importorskip("math_verify", reason="the extra math is not installed")
    row = {"question": "What is 2 + 1?", "problem": "What is 2 + 1?", "answer": "3", "solution": "It is 3."}
    words = [f"dataset={name}", f"dataset.path={write_lines(tmp_path / 'rows.jsonl', [row])}", "model=tiny-llava"]
    (composed,) = compose_grid([*words, "task=generation"], multirun=False, config_dir=None)
    (example,) = build_cell(composed).dataset.examples()
    assert example.question.startswith("What is 2 + 1?\n\nSolve the problem")
    assert example.is_right is not None
    assert example.is_right(r"So it is \boxed{3}.")
    assert not example.is_right("#### 4")
