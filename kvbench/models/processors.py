"""The processor of each family of checkpoints, all of them able to take still pictures without torchvision.

transformers' own processors of families that also take video ask for torchvision even for a single
picture. `StillProcessor` joins the checkpoint's tokenizer, image processor and chat template itself: the
picture's place in the text is widened to as many image tokens as the picture has vectors.

The original Qwen-VL has no tokenizer that transformers reads: its byte-level BPE is built from the `qwen.tiktoken`
file that lies beside the weights, one token and its rank per line. Ranks are the order of merges: two neighbours
join if their concatenation is a token, lowest rank first, which is what the `tokenizers` library does with
the list of all such pairs in the order of ranks.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers.utils import cached_file

from kvbench.errors import ModelSupportError
from kvbench.models.chat import default_template
from kvbench.models.spec import GRID_FAMILIES, PORTED_FAMILIES, QWEN_CHATML, QWEN_RAW

CountTokens = Callable[[Mapping[str, Any]], list[int]]
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
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


@dataclass(kw_only=True)
class StillProcessor:
    """Tokenizer, image processor and template of one checkpoint.

    image_token_id: the token that stands for one vector of a picture. count_tokens: image tokens per
    picture, from what the image processor returned. marks_images: whether the model asks for
    mm_token_type_ids, 1 at image tokens and 0 elsewhere.
    """

    tokenizer: Any
    image_processor: Any
    image_token_id: int
    chat_template: str | None
    count_tokens: CountTokens
    marks_images: bool = False

    def apply_chat_template(self, chat: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return `chat` as the template writes it; each picture is one image token so far."""
        text: str = self.tokenizer.apply_chat_template(chat, chat_template=self.chat_template, **options)
        return text

    def __call__(
        self,
        *,
        text: Sequence[str],
        images: Sequence[Any] = (),
        return_tensors: str = "pt",
        padding: bool = True,
        add_special_tokens: bool = True,
    ) -> dict[str, Tensor]:
        """Return input_ids and attention_mask (B, T), and what the image processor gives for `images`.

        Pictures belong to the image tokens of `text` in order. Raises: ModelSupportError if the texts have too
        few, ValueError if one has too many.
        """
        pixels = dict(self.image_processor(images=list(images), return_tensors=return_tensors)) if images else {}
        widths = iter(self.count_tokens(pixels) if images else ())
        token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        wide = [_widened(row, token, widths) for row in text]
        if next(widths, None) is not None:
            raise ModelSupportError(f"{len(images)} pictures, but fewer {token!r} in the prompts; check the template")
        encoded = self.tokenizer(
            wide, return_tensors=return_tensors, padding=padding, add_special_tokens=add_special_tokens
        )
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")} | pixels
        if self.marks_images:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token_id).int()
        return inputs


def _widened(text: str, token: str, widths: Iterator[int]) -> str:
    wide, *others = text.split(token)
    for part in others:
        width = next(widths, None)
        if width is None:
            raise ValueError(f"a prompt has more {token!r} than pictures")
        wide += token * width + part
    return wide


def vision_processor(source: str, model: Any, options: Mapping[str, Any]) -> Any:
    """Return the processor for the checkpoint `source`, a folder or a hub name, of the loaded `model`.

    options: revision and trust_remote_code. Raises: ModelSupportError if the checkpoint lacks a file.
    """
    family = model.config.model_type
    if family in PORTED_FAMILIES:
        return _qwen_vl(source, model.config, options)
    if family in GRID_FAMILIES:
        images, count = transformers.Qwen2VLImageProcessorPil, _grid_tokens(model.config)
    elif family == "llava_onevision":
        images, count = transformers.LlavaOnevisionImageProcessorPil, _packed_tokens(model)
    else:
        return transformers.AutoProcessor.from_pretrained(source, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    stored, _ = transformers.ProcessorMixin.get_processor_dict(source, **options)
    return StillProcessor(
        tokenizer=tokenizer,
        image_processor=images.from_pretrained(source, **options),
        image_token_id=model.config.image_token_id,
        chat_template=default_template(stored.get("chat_template") or tokenizer.chat_template),
        count_tokens=count,
        marks_images=family in GRID_FAMILIES,
    )


def _grid_tokens(config: Any) -> CountTokens:
    """Patches of the grid (frames, rows, columns), merged in squares."""
    merged = config.vision_config.spatial_merge_size**2
    return lambda pixels: (pixels["image_grid_thw"].prod(dim=-1) // merged).tolist()


def _packed_tokens(model: Any) -> CountTokens:
    """Ask the model's own packing of tiles, on tensors without storage."""
    config, best_resolution = model.config, transformers.image_processing_utils.select_best_resolution
    edge = config.vision_config.image_size
    tile_vectors = (edge // config.vision_config.patch_size) ** 2

    def count(pixels: Mapping[str, Any]) -> list[int]:
        sizes, vectors = pixels["image_sizes"], []
        for size in sizes:
            height, width = best_resolution(size.tolist(), config.image_grid_pinpoints)
            num_tiles = 1 + (height // edge) * (width // edge)
            vectors.append(torch.empty(num_tiles, tile_vectors, 1, device="meta"))
        newline = torch.empty(1, device="meta")
        packed, _ = model.model.pack_image_features(
            vectors, sizes, image_newline=newline, vision_aspect_ratio=config.vision_aspect_ratio
        )
        return [len(picture) for picture in packed]

    return count


def _qwen_vl(source: str, config: Any, options: Mapping[str, Any]) -> StillProcessor:
    """Original Qwen-VL; its generation_config.json tells the chat model from the base model."""
    generation = json.loads(_file(source, "generation_config.json", options).read_text(encoding="utf-8"))
    chat = generation.get("chat_format") == "chatml"
    edge = {"height": config.visual["image_size"], "width": config.visual["image_size"]}
    return StillProcessor(
        tokenizer=qwen_tokenizer(_file(source, VOCABULARY_FILE, options), end=TURN_END if chat else END_OF_TEXT),
        image_processor=transformers.CLIPImageProcessorPil(
            size=edge, do_center_crop=False, image_mean=_CLIP_MEAN, image_std=_CLIP_STD
        ),
        image_token_id=config.image_token_id,
        chat_template=QWEN_CHATML if chat else QWEN_RAW,
        count_tokens=lambda pixels: [config.image_tokens] * len(pixels["pixel_values"]),
    )


def _file(source: str, name: str, options: Mapping[str, Any]) -> Path:
    found = cached_file(source, name, revision=options.get("revision"), _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise ModelSupportError(f"{source} has no {name}; copy it from the published checkpoint into the folder")
    return Path(found)


def qwen_tokenizer(vocabulary: Path, *, end: str = TURN_END) -> Any:
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
    return transformers.PreTrainedTokenizerFast(
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
