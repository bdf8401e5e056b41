"""Qwen's byte-level BPE, built from the `qwen.tiktoken` file that lies beside the weights.

The file gives one token and its rank per line. Ranks are the order of merges: two neighbours join if
their concatenation is a token, lowest rank first, which is what the `tokenizers` library does with
the list of all such pairs in the order of ranks.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvbench.errors import ModelSupportError

VOCABULARY_FILE = "qwen.tiktoken"
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PICTURE_START, PICTURE_END, PICTURE_TOKEN = "<img>", "</img>", "<imgpad>"
_NUM_EXTRAS = 205
_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", PICTURE_START, PICTURE_END, PICTURE_TOKEN)
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{k}|>" for k in range(_NUM_EXTRAS)), *_TAGS)
# Contractions; words with one leading sign; single digits; runs of signs; line ends; spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokenizer(vocabulary: Path, *, end: str = TURN_END) -> PreTrainedTokenizerFast:
    """Return the tokenizer of `vocabulary`; special tokens follow its ranks, as the checkpoints have them.

    end: the token that ends an answer. Raises: ModelSupportError for a file in another format.
    """
    ranks = _read(vocabulary)
    letters = _letters_of_bytes()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {written[token]: rank for token, rank in ranks.items()}
    merges = [(written[left], written[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    whole_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, whole_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=END_OF_TEXT,
        extra_special_tokens={"image_token": PICTURE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _read(vocabulary: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in vocabulary.read_bytes().splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError as error:
        raise ModelSupportError(
            f"{vocabulary} is not a tiktoken vocabulary (line {len(ranks) + 1}: {error}); each line holds a token in "
            "base64 and its rank"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([b]) in ranks for b in range(256)):
        raise ModelSupportError(f"{vocabulary} lacks single bytes or ranks from 0 on; is the file complete?")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    for token in sorted(ranks, key=ranks.__getitem__):
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [(left, right) for left, right in splits if left in ranks and right in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _letters_of_bytes() -> dict[int, str]:
    """Return the letter that `tokenizers` writes for each byte: itself where it is visible, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + k) for k, byte in enumerate(hidden)}
