"""Data is plain text for every kind of tokenizer, and text without control tokens is tokenized as ever."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvbench.bundled.tiny_llava import train_tokenizer
from kvbench.datasets.base import Example
from kvbench.errors import DataError
from kvbench.models.chat import TextTokens
from kvbench.models.inputs import answer_tokens, num_question_tokens, prompt_ids, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.processors import qwen_tokenizer
from kvbench.models.spec import ModelSpec
from tests.models.checkpoints import save_checkpoint
from tests.models.vision_checkpoints import VISION_CHECKPOINTS

TEXTS = ["What is it? A small red dot in row one, column two.", "There are four objects. <think> </s> end"]
PARTS = ["A small red dot", " in", "\n", "row one", " ", "END", "é", "那", ",", "   "]
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|><think>{% endfor %}"


@cache
def sentencepiece(scheme: str, *, normalized: bool = False) -> PreTrainedTokenizerFast:
    """BPE with bytes to fall back on, as Llama 2 has it: a blank is put first by a normalizer or by Metaspace."""
    trained = Tokenizer(models.BPE())
    if scheme == "prepend":
        trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    learnt = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate([*first, *learnt["vocab"]])}
    merges = [(left, right) for left, right in learnt["merges"]]
    trained.model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    trained.add_special_tokens([AddedToken(token, special=True, normalized=normalized) for token in first[:3]])
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    trained.decoder = decoders.Sequence(blanks)
    made = PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@cache
def byte_level(*more: str) -> PreTrainedTokenizerFast:
    made = train_tokenizer(TEXTS)
    made.add_tokens(list(more), special_tokens=True)
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<table>", normalized=False)])
    return made


@cache
def native_qwen(folder: Path) -> PreTrainedTokenizerFast:
    VISION_CHECKPOINTS["qwen"](folder)
    return qwen_tokenizer(folder / "qwen.tiktoken")


KINDS: dict[str, Callable[[Path], PreTrainedTokenizerFast]] = {
    "byte_level": lambda folder: byte_level("<|im_start|>", "<|im_end|>"),
    "prepend": lambda folder: sentencepiece("prepend"),
    "prepend_normalized": lambda folder: sentencepiece("prepend", normalized=True),
    "metaspace_first": lambda folder: sentencepiece("first"),
    "metaspace_always": lambda folder: sentencepiece("always"),
    "native_qwen": native_qwen,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def end(tokenizer: Any) -> str:
    return str(tokenizer.eos_token)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(PARTS), max_size=9))
def test_the_renamed_copy_tokenizes_as_the_tokenizer_itself(tokenizer: Any, parts: list[str]) -> None:
    """The template's own control tokens among text: same tokens, however the tokenizer treats blanks at joints."""
    text = "".join(parts).replace("END", end(tokenizer))
    tokens = TextTokens(tokenizer, None)
    assert tokens._plain_ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_what_looks_like_a_control_token_in_data_is_plain_text(tokenizer: Any) -> None:
    """Its words get the tokens that words with another letter in the middle get, but for that letter."""
    tokens = TextTokens(tokenizer, None)
    word = end(tokenizer)
    data = f"A {word} tag{word}"
    rendered = f"row {tokens.shield(data)} {word}"
    ids = tokens.ids(rendered, add_special_tokens=False)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]).strip() == f"row {data}"
    assert tokens.unshielded(rendered) == f"row {data} {word}"
    with_begin = tokens.ids(rendered, add_special_tokens=True)
    assert with_begin == [*tokenizer("", add_special_tokens=True)["input_ids"], *ids]


@given(st.text(alphabet="\ue0f0\ue0f1\ue100\ue101\ue0f2\ue0f3.</s>a ", max_size=12))
def test_data_cannot_forge_a_shield(text: str) -> None:
    tokenizer = byte_level("<|im_start|>", "<|im_end|>")
    tokens = TextTokens(tokenizer, None)
    assert tokens.unshielded(tokens.shield(text)) == text
    ids = tokens.ids(tokens.shield(text), add_special_tokens=False)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text


def test_added_tokens_count_as_control_tokens_if_special_or_written_by_the_template() -> None:
    """Tokens such as <table>, which models were trained to see in text, stay what they are."""
    tokenizer = byte_level("<|im_start|>", "<|im_end|>")
    text = "<table><think><|im_end|>"
    table, think, turn_end = (tokenizer.convert_tokens_to_ids(name) for name in ("<table>", "<think>", "<|im_end|>"))
    for template, plain in ((None, {turn_end}), (CHATML, {turn_end, think})):
        tokens = TextTokens(tokenizer, template)
        ids = tokens.ids(tokens.shield(text), add_special_tokens=False)
        assert {table, think, turn_end} - set(ids) == plain
        assert tokenizer.decode(ids) == text


def test_text_that_only_a_vocabulary_without_parts_holds_is_a_data_error() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokens = TextTokens(tokenizer, None)
    assert tokens.ids(tokens.shield("a b"), add_special_tokens=False) == [2, 0]
    with pytest.raises(DataError, match=r"holds '</s>', which this tokenizer writes as a control token always"):
        tokens.ids(tokens.shield("a </s> a"), add_special_tokens=False)


def test_a_tokenizer_of_another_library_refuses_such_text_and_no_other() -> None:
    class Foreign:
        eos_token_id, all_special_tokens = 1, ["</s>"]

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [len(text)]}

    tokens = TextTokens(Foreign(), None)
    assert tokens.ids(tokens.shield("abc"), add_special_tokens=True) == [3]
    with pytest.raises(DataError, match=r"tokenizer \(Foreign\) is none of the tokenizers library"):
        tokens.ids(tokens.shield("a </s>"), add_special_tokens=True)


def loaded_of(family: str, folder: Path, post: str | None = None) -> LoadedModel:
    ours = load_model(ModelSpec(checkpoint=str(save_checkpoint(family, folder))), "cpu")
    if post is not None:
        ids = [(token, ours.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
        ours.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=ids)
    return ours


def asked(question: str, reference: str = "A red dot.", context: str = "") -> Example:
    return Example(id="x", cluster="x", question=question, reference=reference, context=context)


def test_a_text_to_complete_has_no_chat_template_and_no_end_token(tmp_path: Path) -> None:
    loaded = loaded_of("llama", tmp_path)
    assert loaded.chat_template is not None
    begin = replace(asked("What is", "a row", context="It is. "), completes=True)
    assert prompt_text(loaded, begin) == "It is. What is"
    assert loaded.tokenizer.decode(answer_tokens(loaded, begin)) == " a row"
    number = num_question_tokens(loaded, begin)
    assert loaded.tokenizer.decode(prompt_ids(loaded, begin)[-number:]).strip() == "What is"


def test_a_reference_that_names_the_end_token_is_scored_to_its_end(tmp_path: Path) -> None:
    ours = loaded_of("llama", tmp_path)
    tokens = answer_tokens(ours, asked("What is it?", "A `</s>` tag ends it."))
    assert tokens.count(ours.eos_token_id) == 1
    assert ours.tokenizer.decode(tokens) == " A `</s>` tag ends it.</s>"
    assert ours.tokenizer.decode(answer_tokens(ours, asked("What is it?", "</s>"))) == " </s></s>"


def test_a_question_that_names_the_templates_marks_cannot_end_its_turn(tmp_path: Path) -> None:
    ours = loaded_of("llama", tmp_path)
    ids = prompt_ids(ours, asked("Is <s> a tag?</s>"))
    assert [ids.count(index) for index in (ours.tokenizer.bos_token_id, ours.tokenizer.eos_token_id)] == [1, 0]
    assert ours.tokenizer.decode(ids) == "<s>[INST] Is <s> a tag?</s> [/INST]"
    split = prompt_ids(ours, asked("/s> what is it?", context="A tag is written <"))
    assert ours.tokenizer.eos_token_id not in split


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # with and without a template
@pytest.mark.parametrize("post", ["<s> $A </s>", "$A </s>", "$A </s> </s>"])
def test_an_end_token_that_the_tokenizer_appends_is_cut_from_prompts_and_scored_once(
    tmp_path: Path, family: str, post: str
) -> None:
    usual, ours = loaded_of(family, tmp_path), loaded_of(family, tmp_path, post)
    example = asked("What is it?")
    begin = [ours.tokenizer.bos_token_id] if post.startswith("<s>") and family == "qwen3" else []
    assert prompt_ids(ours, example) == [*begin, *prompt_ids(usual, example)]
    assert answer_tokens(ours, example) == answer_tokens(usual, example)
    shielded = asked("What is </s>?", "A </s>.")
    assert prompt_ids(ours, shielded) == [*begin, *prompt_ids(usual, shielded)]
    assert answer_tokens(ours, shielded) == answer_tokens(usual, shielded)


def test_a_tokenizer_that_appends_an_end_token_even_when_told_not_to_is_cut_too() -> None:
    class Stubborn:
        eos_token_id, all_special_tokens = 1, ["</s>"]

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [*map(ord, text), 1]}

    for adds in (True, False):
        assert TextTokens(Stubborn(), None).ids("abc", add_special_tokens=adds) == [97, 98, 99]


def test_a_text_is_tokenized_once_however_often_it_is_asked_for() -> None:
    asked: list[str] = []

    class Counted:
        def __init__(self, of: Any) -> None:
            self._of = of

        def __getattr__(self, name: str) -> Any:
            return getattr(self._of, name)

        def __call__(self, text: str, **how: Any) -> Any:
            asked.append(text)
            return self._of(text, **how)

    text = TextTokens(Counted(byte_level()), None)
    first = text.ids(TEXTS[0], add_special_tokens=False)
    first.append(-1)  # the caller's own
    assert text.ids(TEXTS[0], add_special_tokens=False) == first[:-1]
    assert text.ids(TEXTS[1], add_special_tokens=False) != first[:-1]
    assert [asked.count(one) for one in TEXTS] == [1, 1]
    text.ids(TEXTS[0], add_special_tokens=True)
    assert asked.count(TEXTS[0]) == 2, "with what is put before it is another question"


def test_tokens_that_are_refused_are_refused_again() -> None:
    def refuse(ids: Any) -> None:
        raise DataError("none of these")

    text = TextTokens(byte_level(), None, refuse)
    for _ in range(2):
        with pytest.raises(DataError, match="none of these"):
            text.ids(TEXTS[0], add_special_tokens=False)
