"""Turn examples into what a model takes: left-padded prompts, token kinds, answer tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import Kind
from kvbench.datasets.base import Example
from kvbench.errors import DataError, ModelSupportError
from kvbench.models.loader import LoadedModel
from kvbench.models.synthetic_inputs import synthetic_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts of B examples, padded on the left to T tokens.

    tensors: what the model's forward takes, input_ids and attention_mask (B, T), and pixel_values
    where there are pictures. kind (B, T) int8. row_seeds: a number per example, from its id.
    """

    tensors: dict[str, Tensor]
    kind: Tensor
    row_seeds: tuple[int, ...]

    @property
    def prompt_tokens(self) -> list[int]:
        """Real tokens per row."""
        lengths: list[int] = self.tensors["attention_mask"].sum(dim=-1).tolist()
        return lengths

    @property
    def position_ids(self) -> Tensor:
        """(B, T) int64: a token's index in its own row, 0 at pads."""
        return (self.tensors["attention_mask"].long().cumsum(dim=-1) - 1).clamp(min=0)


def prompt_batch(loaded: LoadedModel, examples: Sequence[Example]) -> PromptBatch:
    """Return the prompts of `examples`, pads on the left. Raises: DataError, ModelSupportError."""
    drawn = [example.token_prompt for example in examples if example.token_prompt is not None]
    tensors = synthetic_tensors(loaded, drawn) if drawn else _written_tensors(loaded, examples)
    seeds = tuple(_row_seed(example) for example in examples)
    return PromptBatch(tensors=tensors, kind=_kinds(loaded, tensors["input_ids"]), row_seeds=seeds)


def _written_tensors(loaded: LoadedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    texts = [prompt_text(loaded, example) for example in examples]
    images = [example.load_image() for example in examples if example.load_image is not None]
    arguments: dict[str, Any] = {"text": texts, "return_tensors": "pt", "padding": True}
    if images:
        arguments["images"] = images
    encoded = loaded.processor(**arguments, add_special_tokens=_adds_special_tokens(loaded, texts[0]))
    names = ("input_ids", "attention_mask", "pixel_values")
    tensors = {name: encoded[name].to(loaded.device) for name in names if name in encoded}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(loaded.model.dtype)
    return tensors


def _row_seed(example: Example) -> int:
    return int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:4], "big")


def prompt_text(loaded: LoadedModel, example: Example) -> str:
    """Return the prompt as the model's own chat template writes it; plain text without a template."""
    with_image = example.load_image is not None
    if with_image and not loaded.takes_images:
        raise ModelSupportError(f"{example.id} has a picture, but the model takes text only; choose another dataset")
    if not getattr(loaded.processor, "chat_template", None):
        if with_image:
            raise ModelSupportError("the checkpoint has no chat template, so a picture has no place in the prompt")
        return example.question
    content: Any = example.question
    if loaded.takes_images:
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": example.question}]
    chat = [{"role": "user", "content": content}]
    text: str = loaded.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text


def answer_tokens(loaded: LoadedModel, example: Example) -> list[int]:
    """Return the reference as the model would write it after the prompt, end token included.

    Prompt and answer are tokenized together and the prompt's tokens cut off, so that joints between
    words are right for every tokenizer. Raises: DataError if nothing is left, ModelSupportError if
    the prompt's tokens change when an answer follows.
    """
    prompt = prompt_text(loaded, example)
    joint = "" if prompt[-1:].isspace() or not prompt else " "
    adds = _adds_special_tokens(loaded, prompt)
    before: list[int] = loaded.tokenizer(prompt, add_special_tokens=adds)["input_ids"]
    both: list[int] = loaded.tokenizer(prompt + joint + example.reference, add_special_tokens=adds)["input_ids"]
    if both[: len(before)] != before:
        raise ModelSupportError(f"the tokenizer merges prompt and answer of {example.id}; teacher forcing is undefined")
    answer = both[len(before) :]
    if not answer:
        raise DataError(f"the answer of {example.id} has no token; leave the item out")
    return answer if answer[-1] == loaded.eos_token_id else [*answer, loaded.eos_token_id]


def answer_text(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    """Return generated tokens as text, without special tokens."""
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()


def _adds_special_tokens(loaded: LoadedModel, text: str) -> bool:
    """Templates that write the begin token themselves must not get a second one."""
    bos = loaded.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def _kinds(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Return (B, T) int8; without a tokenizer no token is special."""
    special = torch.tensor(loaded.tokenizer.all_special_ids if loaded.tokenizer else [], device=ids.device)
    kind = torch.where(torch.isin(ids, special), int(Kind.SPECIAL), int(Kind.TEXT))
    if loaded.image_token_id is not None:
        kind = torch.where(ids == loaded.image_token_id, int(Kind.IMAGE), kind)
    return kind.to(torch.int8)
