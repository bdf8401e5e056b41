from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from kvbench.cache import UNLIMITED, Budget, Policy, PolicyCache, ScorePolicy, View, cache_argument
from kvbench.datasets.base import Example, Turn
from kvbench.errors import ModelSupportError
from kvbench.models import loader
from kvbench.models.chat import next_turn_tokens
from kvbench.models.inputs import PromptBatch, answer_tokens, prompt_batch, prompt_ids, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.tasks.decode import CacheSetting
from tests.models.answering import answers_to
from tests.models.checkpoints import FAMILIES, IN_CACHE_FAMILIES, save_checkpoint

NEW_TOKENS = 12


class KeepAll(Policy):
    bounded = False


class MiddleFirst(ScorePolicy):
    def score(self, view: View) -> torch.Tensor:
        return -(view.position - view.seen[:, None, None] // 2).abs().float()


SETTINGS = {
    "full": CacheSetting(policy=KeepAll(), budget=UNLIMITED, positions="original"),
    "cut": CacheSetting(policy=MiddleFirst(num_sinks=1), budget=Budget(fraction=0.4), positions="original"),
    "in_cache": CacheSetting(policy=MiddleFirst(num_recent=2), budget=Budget(tokens=9), positions="in_cache"),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    @cache
    def load(family: str) -> LoadedModel:
        folder = save_checkpoint(family, tmp_path_factory.mktemp(family))
        return load_model(ModelSpec(checkpoint=str(folder)), "cpu")

    return load


def examples(with_picture: bool) -> list[Example]:
    questions = ("What is it?", "A small red dot in row one, column two: where is it and what is it?", "Four?")
    picture = Image.linear_gradient("L").convert("RGB") if with_picture else None
    load = None if picture is None else lambda: picture
    return [
        Example(id=str(k), cluster=str(k), question=question, reference="A red dot.", load_image=load)
        for k, question in enumerate(questions)
    ]


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_the_port_of_qwen_vl_is_imported_for_that_family_only(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = save_checkpoint(family, tmp_path), []
    imported = loader.importlib.import_module
    monkeypatch.setattr(
        loader.importlib, "import_module", lambda name, *package: [imported(name, *package), asked.append(name)][0]
    )
    load_model(ModelSpec(checkpoint=str(folder)), "cpu")
    assert "transformers" in asked
    assert ("kvbench.models.qwen_vl" in asked) == (family == "qwen")
    assert ("kvbench.models.processors" in asked) == (family == "qwen")


@pytest.mark.few(4)
@pytest.mark.cover
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_our_loop_and_generate_give_the_same_tokens(
    loaded: Callable[[str], LoadedModel], family: str, setting: str
) -> None:
    ours, chosen = loaded(family), SETTINGS[setting]
    if chosen.positions == "in_cache" and family not in IN_CACHE_FAMILIES:
        pytest.skip("refused, which test_families tests")
    batch = prompt_batch(ours, examples(ours.takes_images))
    answers = answers_to(ours, batch, chosen, max_new_tokens=NEW_TOKENS)
    cache = PolicyCache(ours.model, chosen.policy, chosen.budget, positions=chosen.positions, prompt_kind=batch.kind)
    output = ours.model.generate(
        **batch.tensors, **cache_argument(ours.model, cache), max_new_tokens=NEW_TOKENS, do_sample=False
    )[:, batch.kind.shape[1] :]
    expected = [until_end(row, ours.eos_token_id) for row in output.tolist()]
    assert answers == expected
    assert max(map(len, answers)) == NEW_TOKENS
    assert len({tuple(answer) for answer in answers}) > 1


def until_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end)] if end in row else row


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_padded_left_and_begin_once(loaded: Callable[[str], LoadedModel], family: str) -> None:
    ours = loaded(family)
    batch = prompt_batch(ours, examples(ours.takes_images))
    mask, ids = batch.tensors["attention_mask"], batch.tensors["input_ids"]
    assert bool((mask.diff(dim=-1) >= 0).all())
    assert len(set(batch.prompt_tokens)) > 1
    assert batch.prompt_tokens == mask.sum(dim=-1).tolist()
    for row, length in enumerate(batch.prompt_tokens):
        assert text_positions(batch)[row, -length:].tolist() == list(range(length))
    begin = -1 if ours.tokenizer.bos_token_id is None else ours.tokenizer.bos_token_id
    assert (ids == begin).sum(dim=-1).max() <= 1


def text_positions(batch: PromptBatch) -> torch.Tensor:
    return batch.position_ids if batch.grid is None else batch.position_ids[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_follows_its_prompt_without_changing_it(loaded: Callable[[str], LoadedModel], family: str) -> None:
    ours = loaded(family)
    for example in examples(ours.takes_images):
        tokens, prompt = answer_tokens(ours, example), prompt_text(ours, example)
        assert tokens[-1] == ours.eos_token_id
        assert tokens.count(ours.eos_token_id) == 1
        text = ours.tokenizer.decode(tokens[:-1])
        assert text == ("" if prompt.endswith("\n") else " ") + example.reference
        joint = ours.tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        assert joint[-len(tokens) + 1 :] == tokens[:-1]


def test_a_picture_for_a_text_model_is_refused(loaded: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(ModelSupportError, match="takes text only"):
        prompt_batch(loaded("llama"), examples(with_picture=True))


def test_a_vision_model_takes_text_alone(loaded: Callable[[str], LoadedModel]) -> None:
    batch = prompt_batch(loaded("llava"), examples(with_picture=False))
    assert "pixel_values" not in batch.tensors
    assert len(answers_to(loaded("llava"), batch, SETTINGS["full"], max_new_tokens=2)) == 3


def test_pictures_and_text_mix_in_one_batch(loaded: Callable[[str], LoadedModel]) -> None:
    ours, text, seen = loaded("llava"), examples(with_picture=False), examples(with_picture=True)
    mixed = prompt_batch(ours, [text[0], seen[1], text[2]])
    assert (mixed.kind == 1).sum(dim=-1).tolist() == [0, 4, 0]
    together = answers_to(ours, mixed, SETTINGS["cut"], max_new_tokens=6)
    alone = [
        answers_to(ours, prompt_batch(ours, [e]), SETTINGS["cut"], max_new_tokens=6)[0] for e in (text[0], seen[1])
    ]
    assert together[:2] == alone


def test_a_family_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelSupportError, match="family 'gpt2'; supported: llava, llava_next, "):
        load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    save_checkpoint("qwen2", tmp_path)
    config: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    config.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSupportError, match="full attention only"):
        load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")


def test_code_of_a_checkpoint_does_not_run_unless_trusted(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelSupportError, match="trust_remote_code"):
        load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    assert not marker.exists()


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("eos_token", "pad_token"):
        config.pop(name, None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelSupportError, match="no end token"):
        load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")


def test_a_tokenizer_of_more_words_than_the_model_knows_is_refused_where_it_writes_one(tmp_path: Path) -> None:
    """An embedding would be read beyond its end, which on a GPU ends the process."""
    save_checkpoint("llama", tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    words.add_tokens(["purple"])
    words.save_pretrained(tmp_path)
    ours = load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    told = f"writes token {len(words) - 1} \\('purple'\\)"

    def asked(question: str, reference: str) -> Example:
        turns = (Turn(question=question, answer=""),)
        return Example(id="a", cluster="a", question=question, reference=reference, follow_ups=turns)

    assert prompt_ids(ours, asked("red?", "red")), "what it does not write does no harm"
    for act in (
        lambda: prompt_batch(ours, [asked("purple?", "")]),
        lambda: answer_tokens(ours, asked("", "purple")),
        lambda: next_turn_tokens(ours, asked("purple?", ""), 2),
    ):
        with pytest.raises(ModelSupportError, match=told):
            act()


def test_a_quantised_checkpoint_whose_library_is_not_installed_is_told_in_one_line(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelSupportError) as told:
        load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    assert "\n" not in str(told.value)
