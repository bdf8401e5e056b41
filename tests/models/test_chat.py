"""Chats are rendered in one place, the same on every day; and where an answer ends."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.utils import chat_template_utils

from kvbench.datasets.base import Example, Turn
from kvbench.errors import ModelSupportError
from kvbench.models.chat import default_template, next_turn_tokens
from kvbench.models.inputs import answer_tokens, prompt_batch, prompt_ids, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.tasks.decode import greedy
from kvbench.tasks.generation import Generation, MultiTurn
from tests.models.checkpoints import FAMILIES, WITH_BOS, save_checkpoint
from tests.tasks.benches import FULL, bench_of

ASKED = Example(
    id="x",
    cluster="x",
    question="What is it?",
    reference="A red dot.",
    follow_ups=(Turn(question="Where?", answer="Row one."), Turn(question="Why </s>?", answer="-")),
)
DATED = (
    "{{ strftime_now('%d %b %Y %H:%M') }}{% if enable_thinking is defined and not enable_thinking %}quiet{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
)
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '<turn_end>\n' }}{% endfor %}"


def loaded_with(folder: Path, template: Any = WITH_BOS, **generation: Any) -> LoadedModel:
    save_checkpoint("llama", folder)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
    else:
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_model(ModelSpec(checkpoint=str(folder)), "cpu")


def test_every_turn_is_rendered_by_one_clock_and_without_reasoning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = loaded_with(tmp_path, DATED)
    found = []
    for day in (datetime(2026, 1, 2), datetime(2026, 1, 2) + timedelta(hours=30)):
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda day=day: day))
        found.append([prompt_ids(ours, ASKED), next_turn_tokens(ours, ASKED, 2), next_turn_tokens(ours, ASKED, 3)])
    assert found[0] == found[1]
    assert prompt_text(ours, ASKED) == "26 Jul 2024 00:00quiet<|user|>What is it?"


def test_the_stopped_clock_knows_every_directive_and_leaves_the_template_as_it_is(tmp_path: Path) -> None:
    forms = [f"%{letter}" for letter in "aAwdbBmyYHIMSfpjUWcxXGuV"] + [
        "%-d",
        "%-m",
        "%e",
        "%F",
        "%T",
        "%%d",
        "%d.%m.%Y",
    ]
    asked = "|".join(f"{{{{ strftime_now('{form[:2]}' ~ '{form[2:]}') }}}}" for form in forms)
    ours = loaded_with(tmp_path, f"\n  {{% if true %}}x{{% endif %}}{asked}")
    plain = loaded_with(tmp_path, "\n  {% if true %}x{% endif %}")
    expected = "|".join(datetime(2024, 7, 26).strftime(form) for form in forms)
    assert prompt_text(ours, ASKED) == prompt_text(plain, ASKED) + expected


def test_a_second_turn_is_told_not_to_reason_either(tmp_path: Path) -> None:
    """As Qwen3's template asks: it opens an answer with an empty thought, in every turn."""
    quiet = "{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}"
    ours = loaded_with(tmp_path, "{% for m in messages %}{{ m.content }}|{% endfor %}" + quiet)
    assert ours.tokenizer.decode(next_turn_tokens(ours, ASKED, 2)) == "|Where?|<think></think>"


def test_what_looks_like_a_control_token_in_a_second_question_is_plain_text(tmp_path: Path) -> None:
    ours = loaded_with(tmp_path)
    tokens = next_turn_tokens(ours, ASKED, 3)
    assert ours.tokenizer.eos_token_id not in tokens
    assert "Why </s>?" in ours.tokenizer.decode(tokens)


@pytest.mark.parametrize("form", ["dict", "list"])
def test_of_several_templates_the_default_is_used_in_every_turn(tmp_path: Path, form: str) -> None:
    templates = {"tool_use": "tools", "default": DATED}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    ours = loaded_with(tmp_path, listed)
    assert prompt_text(ours, ASKED) == "26 Jul 2024 00:00quiet<|user|>What is it?"
    assert ours.tokenizer.decode(next_turn_tokens(ours, ASKED, 2)) == "<|user|>Where?"
    assert default_template(templates if form == "dict" else listed) == DATED


def test_several_templates_without_a_default_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelSupportError, match=r"2 chat templates \(rag, tool_use\), none of them named 'default'"):
        loaded_with(tmp_path, [{"name": name, "template": "x"} for name in ("rag", "tool_use")])


def test_what_a_template_refuses_is_one_line(tmp_path: Path) -> None:
    ours = loaded_with(tmp_path, "{{ raise_exception('no users\nhere') }}")
    with pytest.raises(ModelSupportError, match=r"^the chat template refuses the chat: no users here; choose another"):
        prompt_text(ours, ASKED)


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ tools | length }}", "{{ messages[7].content }}"])
def test_what_goes_wrong_within_a_template_is_told_the_same_way(tmp_path: Path, template: str) -> None:
    with pytest.raises(ModelSupportError, match=r"^the chat template refuses the chat: "):
        prompt_text(loaded_with(tmp_path, template), ASKED)


def forced(ours: LoadedModel, tokens: list[int]) -> Any:
    """A model that says `tokens`, whatever it is asked."""
    logits = torch.nn.functional.one_hot(torch.tensor([*tokens, 0]), 400).float()
    steps = iter(logits)

    def step(_: Any) -> None:
        decoding.logits = next(steps)[None]

    decoding = SimpleNamespace(logits=next(steps)[None], step=step, cache=SimpleNamespace(check=lambda: None))
    return decoding


@pytest.mark.parametrize(
    ("generation", "config", "text_config"),
    [([2, 293], None, None), (293, None, None), (None, [293, 2], None), (None, None, 293), ([293], None, 2)],
)
def test_an_answer_ends_at_every_end_token_that_the_checkpoint_names(
    tmp_path: Path, generation: Any, config: Any, text_config: Any
) -> None:
    save_checkpoint("llava" if text_config else "llama", tmp_path)
    known = json.loads((tmp_path / "config.json").read_text())
    part = known["text_config"] if text_config else known
    part["eos_token_id"] = text_config or config
    (tmp_path / "config.json").write_text(json.dumps(known))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    ours = load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    assert ours.end_token_ids == {2, 293}
    for end in (2, 293):
        said = greedy(forced(ours, [7, 8, end, 9]), end_token_ids=ours.end_token_ids, max_new_tokens=9)
        assert said == [[7, 8]]


@pytest.mark.parametrize("ends", ["</s>", ["</s>"], [[2, 5]], [2.5], True])
def test_end_tokens_that_are_no_numbers_are_refused_in_one_line(tmp_path: Path, ends: Any) -> None:
    with pytest.raises(ModelSupportError, match=r"names eos_token_id .* in its files; it must be a number") as told:
        loaded_with(tmp_path, eos_token_id=ends)
    assert "\n" not in str(told.value)


def test_an_end_token_of_a_config_class_is_none_of_the_checkpoint(tmp_path: Path) -> None:
    """LlamaConfig says 2 where a file says nothing, which in another vocabulary is some word."""
    save_checkpoint("llama", tmp_path)
    known = json.loads((tmp_path / "config.json").read_text())
    del known["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(known))
    (tmp_path / "generation_config.json").unlink()
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<pad>"}))
    ours = load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    assert ours.model.config.eos_token_id == 2
    assert ours.end_token_ids == {ours.tokenizer.convert_tokens_to_ids("<pad>")}


def with_turn_end(ours: LoadedModel) -> LoadedModel:
    ours.tokenizer.add_tokens(["<turn_end>"], special_tokens=True)
    ours.model.resize_token_embeddings(len(ours.tokenizer))
    return replace(ours)


def test_what_the_template_writes_after_an_answer_is_scored_and_ends_it(tmp_path: Path) -> None:
    ours = with_turn_end(loaded_with(tmp_path, TURNS))
    end = ours.tokenizer.convert_tokens_to_ids("<turn_end>")
    assert answer_tokens(ours, ASKED)[-1] == ours.eos_token_id == end
    assert ours.tokenizer.eos_token_id not in answer_tokens(ours, ASKED)
    assert ours.end_token_ids == {end, ours.tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "template",
    [
        WITH_BOS,
        "{% for m in messages %}{{ m.content }} done{% endfor %}",
        "{{ messages[0].content }}",
        "{{ bos_token }}",
    ],
)
def test_without_an_end_in_the_template_the_tokenizers_is_scored(tmp_path: Path, template: str) -> None:
    ours = loaded_with(tmp_path, template)
    assert ours.eos_token_id == ours.tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_ends_answers_at_what_its_files_name(tmp_path: Path, family: str) -> None:
    save_checkpoint(family, tmp_path)
    path = tmp_path / "generation_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, "eos_token_id": [2, 31]}))
    ours = load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    assert {2, 31, ours.tokenizer.eos_token_id, ours.eos_token_id} == set(ours.end_token_ids)


def test_answers_and_turns_of_a_run_end_at_the_second_end_token(tmp_path: Path) -> None:
    """The model's own first word is declared an end token: every answer is then empty, in every task that answers."""
    (tmp_path / "model").mkdir()
    ours = loaded_with(tmp_path / "model")
    with torch.inference_mode():
        first = int(FULL.decoding(ours, prompt_batch(ours, [ASKED]), 4).logits.argmax())
    bench = replace(bench_of(replace(ours, declared_ends=(first,)), tmp_path, FULL), examples=[ASKED])
    assert Generation(max_new_tokens=3).run(bench).samples["x"]["num_new_tokens"] == 0
    assert MultiTurn(max_new_tokens=3).run(bench).samples["x"]["turn1_text"] == ""
