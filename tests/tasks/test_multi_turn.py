"""Several turns in one cache: equal to prefilling everything again, where nothing is dropped."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.cache import Budget
from kvbench.datasets.base import Example, Turn
from kvbench.errors import ConfigError, MeasureError, ModelSupportError, NonFiniteError
from kvbench.measures import MEASURES
from kvbench.models.chat import next_turn_tokens
from kvbench.models.inputs import PromptBatch, prompt_batch, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.tasks import decode as graph
from kvbench.tasks.decode import Decoding, greedy
from kvbench.tasks.generation import MultiTurn
from kvbench.tasks.task import Bench
from tests.models.checkpoints import save_checkpoint
from tests.tasks.benches import FULL, SCENES, NotANumber, bench_of, cut
from tests.tasks.frozen import freeze_host

TASK = MultiTurn(max_new_tokens=14, max_turns=3)
EXAMPLE = SCENES.examples()[0]


def bench_for(loaded: LoadedModel, folder: Path, setting: Any, num_examples: int = 2) -> Bench:
    return replace(bench_of(loaded, folder, setting), examples=SCENES.examples()[:num_examples])


def longer(batch: PromptBatch, tokens: list[int]) -> PromptBatch:
    """Return the batch with `tokens` after its one prompt."""
    ids = torch.cat((batch.tensors["input_ids"], torch.tensor([tokens])), dim=1)
    kind = torch.cat((batch.kind, torch.zeros(1, len(tokens), dtype=batch.kind.dtype)), dim=1)
    return replace(
        batch, kind=kind, tensors={**batch.tensors, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )


@pytest.mark.cover
@pytest.mark.parametrize("max_new_tokens", [3, 14])  # every answer cut off; short answers that end by themselves
@pytest.mark.parametrize("query_visible", [True, False])
def test_the_full_cache_says_what_prefilling_everything_again_says(
    bundled: LoadedModel, tmp_path: Path, max_new_tokens: int, query_visible: bool
) -> None:
    task = MultiTurn(max_new_tokens=max_new_tokens, max_turns=4)
    bench = replace(bench_for(bundled, tmp_path, FULL), query_visible=query_visible)
    said = task.talk(bench, EXAMPLE, FULL)
    assert len(said) == 4
    batch = prompt_batch(bundled, [EXAMPLE])
    for number, turn in enumerate(said, start=1):
        if number > 1:
            batch = longer(batch, [*said[number - 2].tokens, *next_turn_tokens(bundled, EXAMPLE, number)])
        decoding = FULL.decoding(bundled, batch, max_new_tokens)
        answer = greedy(decoding, end_token_ids=bundled.end_token_ids, max_new_tokens=max_new_tokens)
        assert answer == [turn.tokens]
        assert turn.held_fraction == 1.0
        was_cut_off = len(turn.tokens) == max_new_tokens  # then the last token is fed with the next turn
        assert turn.seen_tokens == batch.prompt_tokens[0] + len(turn.tokens) - was_cut_off


@torch.inference_mode()
def test_a_chunk_into_the_full_cache_gives_the_logits_of_one_prompt(bundled: LoadedModel) -> None:
    batch, chunk = prompt_batch(bundled, [EXAMPLE]), [5, 9, 2, 77, 8]
    decoding = Decoding(bundled, batch, FULL.cache(bundled, batch, 8))
    extended = decoding.extend(torch.tensor([chunk])).clone()
    whole = Decoding(bundled, longer(batch, chunk), FULL.cache(bundled, longer(batch, chunk), 8))
    assert torch.allclose(extended, whole.logits, atol=1e-4)
    assert torch.allclose(decoding.step(torch.tensor([4])), whole.step(torch.tensor([4])), atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU captures the step for real")
def test_a_conversation_runs_on_the_engine_that_its_key_says(
    bundled: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze_host(monkeypatch)
    captures: list[Any] = []
    capture = graph.captured
    monkeypatch.setattr(graph, "captured", lambda *given: captures.append(given) or capture(*given))
    task, bench = MultiTurn(max_new_tokens=3, max_turns=3), bench_for(bundled, tmp_path, FULL)
    assert task.talk(bench, EXAMPLE, replace(FULL, engine="graph")) == task.talk(bench, EXAMPLE, FULL)
    assert len(captures) == 3, "one for each turn, whose question lays out new buffers"


@torch.inference_mode()
def test_a_question_of_one_token_is_cut_as_part_of_the_prompt(bundled: LoadedModel) -> None:
    """Before, it was taken for a generated token, which a policy that cuts prompts only never drops."""
    batch, setting = prompt_batch(bundled, [EXAMPLE]), cut(Budget(tokens=40), SnapKV())
    decoding = Decoding(bundled, replace(batch, question_ids=torch.tensor([[7]])), setting.cache(bundled, batch, 8))
    assert decoding.cache.occupancy().entries_peak == 40
    decoding.step(torch.tensor([9]))
    assert decoding.cache.occupancy().entries_peak == 41


def test_later_turns_are_written_with_the_settings_of_the_first(tmp_path: Path) -> None:
    """As Qwen3's template asks for them: without thinking, every answer begins after an empty thought."""
    loaded = load_model(ModelSpec(checkpoint=str(save_checkpoint("qwen3", tmp_path))), "cpu")
    loaded.processor.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and enable_thinking is false %}"
        "<think> </think> {% endif %}{{ date_string }}{% endif %}"
    )
    turns = (Turn(question="And?", answer="Yes."), Turn(question="Why?", answer="So."))
    example = Example(id="x", cluster="x", question="What is it?", reference="A dot.", follow_ups=turns)
    first = prompt_text(loaded, example)
    opening = first[first.index("assistant: ") :]
    assert opening == "assistant: <think> </think> 26 Jul 2024"
    for number, turn in enumerate(turns, start=2):
        text = f" user: {turn.question} {opening}"
        assert (
            next_turn_tokens(loaded, example, number) == loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_every_turn_is_scored_and_the_full_cache_equals_itself(bundled: LoadedModel, tmp_path: Path) -> None:
    result = TASK.run(bench_for(bundled, tmp_path, FULL))
    for turn in (1, 2, 3):
        for name in ("rouge1_vs_full", "rougeL_vs_full", "length_ratio", "realised_budget_fraction"):
            assert result.measurements[f"turn{turn}_{name}"]["value"] == 1.0
        assert 0.0 <= result.measurements[f"turn{turn}_exact_fraction"]["value"] <= 1.0
        assert result.measurements[f"turn{turn}_rougeL_vs_reference"]["value"] > 0.1
    assert "turn1_objects_recalled_fraction" in result.measurements
    assert "turn4_rougeL_vs_full" not in result.measurements
    assert set(result.measurements) <= set(MEASURES), "the report knows every number"
    row = result.samples[EXAMPLE.id]
    assert row["turn2_question"] == EXAMPLE.follow_ups[0].question
    assert row["turn2_reference"] == EXAMPLE.follow_ups[0].answer


def test_the_trained_model_understands_its_second_question(bundled: LoadedModel, tmp_path: Path) -> None:
    """It does not find every place it is asked for; but its answers have the form that each question asks for."""
    bench = bench_for(bundled, tmp_path, FULL, num_examples=1)
    first, *later = MultiTurn(max_new_tokens=200, max_turns=4).talk(bench, EXAMPLE, FULL)
    assert bundled.tokenizer.decode(first.tokens).strip() == EXAMPLE.reference
    forms = {"Where": r"In \w\d\.", "What": r"\w\d .+\.", "How": r"\w+\.", "Describe": r"\w\d \w+ \w+.*\."}
    for turn, asked in zip(later, EXAMPLE.follow_ups, strict=True):
        text = bundled.tokenizer.decode(turn.tokens).strip()
        assert re.fullmatch(forms[asked.question.split()[0]], text)
        assert len(turn.tokens) < 40


def test_the_cache_stays_compressed_over_all_turns(bundled: LoadedModel, tmp_path: Path) -> None:
    result = TASK.run(bench_for(bundled, tmp_path, cut(Budget(fraction=0.2), StreamingLLM()), num_examples=1))
    for turn in (1, 2, 3):
        assert 0.18 < result.measurements[f"turn{turn}_realised_budget_fraction"]["value"] <= 0.2
    assert result.measurements["turn1_rougeL_vs_full"]["value"] < 1.0


@pytest.mark.long
def test_full_conversations_are_held_once_and_must_repeat(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = bench_for(bundled, tmp_path, cut())
    TASK.run(bench)
    (path,) = (tmp_path / "full_answers").glob("*.json")
    written = path.stat().st_mtime_ns
    TASK.run(bench)
    assert path.stat().st_mtime_ns == written

    class Wrong(MultiTurn):
        def talk(self, *arguments: Any) -> Any:
            said = super().talk(*arguments)
            return [replace(said[0], tokens=[*said[0].tokens, 5]), *said[1:]]

    with pytest.raises(MeasureError, match="does not repeat turn 1"):
        Wrong(max_new_tokens=14, max_turns=3).run(bench)


def test_a_cache_of_nan_has_no_number(bundled: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="turn 1 of"):
        TASK.run(bench_for(bundled, tmp_path, cut(policy=NotANumber())))


def test_turns_without_a_reference_have_no_score_against_one(bundled: LoadedModel, tmp_path: Path) -> None:
    bare = replace(EXAMPLE, reference="", facts=None, follow_ups=(Turn(question="And?", answer=""),))
    result = TASK.run(replace(bench_for(bundled, tmp_path, FULL), examples=[bare]))
    assert set(result.measurements) == {
        f"turn{turn}_{name}"
        for turn in (1, 2)
        for name in ("rouge1_vs_full", "rouge2_vs_full", "rougeL_vs_full", "length_ratio", "realised_budget_fraction")
    }


def test_a_model_without_a_chat_template_has_no_second_turn(tmp_path: Path) -> None:
    loaded = load_model(ModelSpec(checkpoint=str(save_checkpoint("qwen3", tmp_path))), "cpu")
    turns = (Turn(question="And?", answer="Yes."),)
    example = Example(id="x", cluster="x", question="What is it?", reference="A dot.", follow_ups=turns)
    with pytest.raises(ModelSupportError, match="no chat template"):
        next_turn_tokens(loaded, example, 2)


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"max_turns": 1}, {"max_turns": 9}])
def test_a_wrong_setting_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MultiTurn(**wrong)
