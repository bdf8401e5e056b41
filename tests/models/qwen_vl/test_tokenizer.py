from __future__ import annotations

import base64
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kvbench.errors import ModelSupportError
from kvbench.models.processors import _WORDS, SPECIAL_TOKENS, VOCABULARY_FILE, qwen_tokenizer

TEXT = (
    "What is it? It's the dog's 12 red dots, and the dots are red.\n\n  What isn't? 那里有一只狗, 狗。 Cafe\u0301 café"
)
TEXTS = st.text(alphabet=st.sampled_from(TEXT + "aehist \n"), max_size=40) | st.text(max_size=20) | st.text("qzxj")
TWO_WAYS = (b"zx", b"qz", b"xj", b"qzx", b"zxj", b"qzxj", b"jq", b"xjq")  # tokens that several pairs join to


@cache
def ranks() -> dict[bytes, int]:
    """A byte-pair vocabulary learnt from TEXT, most frequent neighbours first, and TWO_WAYS."""
    known = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(_WORDS, TEXT * 3)]
    for rank in range(256, 300):
        counts = Counter(left + right for word in words for left, right in pairwise(word))
        best = max((token for token in counts if token not in known), key=lambda token: (counts[token], token))
        known[best] = rank
        words = [merged_once(word, best) for word in words]
    return known | {token: len(known) + place for place, token in enumerate(TWO_WAYS)}


def merged_once(word: list[bytes], token: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for part in word:
        if merged and merged[-1] + part == token:
            merged[-1] = token
        else:
            merged.append(part)
    return merged


def naive_ids(text: str) -> list[int]:
    """Byte-pair encoding as it is defined: of all neighbours whose join is a token, the lowest rank, leftmost first."""
    ids = []
    for word in regex.findall(_WORDS, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            joins = [(ranks().get(left + right, len(ranks())), at) for at, (left, right) in enumerate(pairwise(parts))]
            rank, at = min(joins, default=(len(ranks()), 0))
            if rank == len(ranks()):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks()[part] for part in parts]
    return ids


def written(path: Path, vocabulary: dict[bytes, int]) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in vocabulary.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return qwen_tokenizer(written(tmp_path_factory.mktemp("words") / VOCABULARY_FILE, ranks()))


@given(text=TEXTS)
@example(text="it's  isn't\n\n \n12 dogs")
def test_text_is_encoded_as_the_ranks_say_and_comes_back(tokenizer: Any, text: str) -> None:
    assume(not any(token in text for token in SPECIAL_TOKENS))  # Hypothesis tries texts that it finds in the source
    normal = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == naive_ids(normal)
    assert tokenizer.decode(ids) == normal


def test_special_tokens_follow_the_ranks_in_the_published_order(tokenizer: Any) -> None:
    """With the published 151643 ranks this gives 151643 to <|endoftext|> and 151857 to <img>."""
    offsets = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "<|extra_204|>": 207}
    offsets |= {"<ref>": 208, "<img>": 214, "</img>": 215, "<imgpad>": 216}
    assert {token: tokenizer.convert_tokens_to_ids(token) - len(ranks()) for token in offsets} == offsets
    assert len(tokenizer) == len(ranks()) + len(SPECIAL_TOKENS)
    assert 151643 + offsets["<img>"] == 151857


def test_special_tokens_are_never_cut_and_end_an_answer(tokenizer: Any) -> None:
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    ids = tokenizer("<|im_start|>it<|im_end|>", add_special_tokens=False)["input_ids"]
    assert ids == [start, *naive_ids("it"), end]
    assert tokenizer.eos_token_id == end
    assert tokenizer.decode(ids, skip_special_tokens=True) == "it"


@pytest.mark.parametrize(
    ("content", "match"),
    [("IQ== 0\nno rank here\n", "line 2"), ("IQ== 0\nIg== 1\n", "lacks single bytes"), ("%%%% 0\n", "not a tiktoken")],
)
def test_a_file_in_another_format_is_refused(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / VOCABULARY_FILE
    path.write_text(content)
    with pytest.raises(ModelSupportError, match=match):
        qwen_tokenizer(path)
