"""Turn examples into what a model takes: left-padded prompts, token kinds, answer tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvbench.cache import Kind
from kvbench.datasets.base import Example
from kvbench.errors import DataError, ModelSupportError
from kvbench.models.grid_positions import GridPositions, grid_positions
from kvbench.models.loader import LoadedModel
from kvbench.models.synthetic_inputs import synthetic_tensors
from kvbench.models.windows import window_prompts, window_tokens

_PICTURE_INPUTS = ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw", "mm_token_type_ids")
# What templates that ask for it are told: answers come without reasoning first, as the references do, and a
# prompt is the same on every day (the date is the one that Llama 3's template falls back to).
_TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts of B examples, padded on the left to T tokens.

    tensors: what the model's forward takes, input_ids and attention_mask (B, T), and where there are
    pictures their pixels and what the family tells about them. kind (B, T) int8. row_seeds: a number
    per example, from its id. grid: where a family counts pictures by rows and columns, None elsewhere.
    question_ids (B, N): tokens of a question that follows as a second chunk, None where the question is
    part of the T tokens.
    """

    tensors: dict[str, Tensor]
    kind: Tensor
    row_seeds: tuple[int, ...]
    grid: GridPositions | None = None
    question_ids: Tensor | None = None

    @property
    def prompt_tokens(self) -> list[int]:
        """Real tokens per row, those of a second chunk left out."""
        lengths: list[int] = self.tensors["attention_mask"].sum(dim=-1).tolist()
        return lengths

    @property
    def position_ids(self) -> Tensor:
        """(B, T) int64: a token's index in its own row, 0 at pads; (4, B, T) with the three axes of a grid after it."""
        index = (self.tensors["attention_mask"].long().cumsum(dim=-1) - 1).clamp(min=0)
        return index if self.grid is None else torch.cat((index[None], self.grid.prompt))

    @property
    def last_position_ids(self) -> Tensor:
        """(B, 1), or (4, B, 1): one less than what the first generated token gets; each further token adds one."""
        index = self.position_ids[..., -1:]
        if self.grid is None:
            return index
        text = index[0]
        return torch.cat((text[None], (text + self.grid.offset).expand(3, -1, -1)))


def prompt_batch(loaded: LoadedModel, examples: Sequence[Example], *, num_question_tokens: int = 0) -> PromptBatch:
    """Return the prompts of `examples`, pads on the left; the last `num_question_tokens` as a second chunk.

    Raises: DataError, ModelSupportError.
    """
    drawn = [example.token_prompt for example in examples if example.token_prompt is not None]
    tensors = synthetic_tensors(loaded, drawn) if drawn else _written_tensors(loaded, examples)
    seeds = tuple(_row_seed(example) for example in examples)
    batch = PromptBatch(
        tensors=tensors,
        kind=_kinds(loaded, tensors["input_ids"]),
        row_seeds=seeds,
        grid=grid_positions(loaded.model, tensors),
    )
    return without_question(batch, num_question_tokens)


def _written_tensors(loaded: LoadedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    if any(example.window is not None for example in examples):
        return _on_device(loaded, examples, window_prompts(loaded, examples))
    texts = [prompt_text(loaded, example) for example in examples]
    images = [example.load_image() for example in examples if example.load_image is not None]
    arguments: dict[str, Any] = {"text": texts, "return_tensors": "pt", "padding": True}
    if images:
        arguments["images"] = images
    encoded = loaded.processor(**arguments, add_special_tokens=adds_special_tokens(loaded, texts[0]))
    return _on_device(loaded, examples, encoded)


def _on_device(loaded: LoadedModel, examples: Sequence[Example], encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    empty = torch.nonzero(encoded["attention_mask"].sum(dim=-1) == 0)
    if len(empty):
        raise DataError(f"the prompt of {examples[int(empty[0])].id} has no token; leave the item out")
    names = ("input_ids", "attention_mask", *_PICTURE_INPUTS)
    tensors = {name: encoded[name].to(loaded.device) for name in names if name in encoded}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(loaded.model.dtype)
    return tensors


def without_question(batch: PromptBatch, num_tokens: int) -> PromptBatch:
    """Return the batch with the last `num_tokens` of every row as a second chunk; as it is for 0."""
    if num_tokens == 0:
        return batch
    shape = batch.kind.shape
    first = {name: t[:, :-num_tokens] if t.shape == shape else t for name, t in batch.tensors.items()}
    return replace(
        batch,
        tensors=first,
        kind=batch.kind[:, :-num_tokens],
        grid=batch.grid if batch.grid is None else batch.grid.without_last(num_tokens),
        question_ids=batch.tensors["input_ids"][:, -num_tokens:],
    )


def _row_seed(example: Example) -> int:
    return int.from_bytes(hashlib.sha256(example.id.encode()).digest()[:4], "big")


def prompt_text(loaded: LoadedModel, example: Example, *, before_question: str = "") -> str:
    """Return the prompt as the model's own chat template writes it; plain text without a template.

    before_question is put between context and question, to find the place. Raises: ModelSupportError.
    """
    with_image = example.load_image is not None
    if with_image and not loaded.takes_images:
        raise ModelSupportError(f"{example.id} has a picture, but the model takes text only; choose another dataset")
    message = example.context + before_question + example.question
    if not getattr(loaded.processor, "chat_template", None):
        if with_image:
            raise ModelSupportError("the checkpoint has no chat template, so a picture has no place in the prompt")
        return message
    content: Any = message
    if loaded.takes_images:
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": message}]
    chat = [{"role": "user", "content": content}]
    return written(loaded, chat)


def written(loaded: LoadedModel, chat: Sequence[Mapping[str, Any]]) -> str:
    """Return `chat`, of any turns, as the model's chat template writes it, up to where the next answer begins."""
    settings = {name: value for name, value in _TEMPLATE_SETTINGS.items() if name in loaded.processor.chat_template}
    text: str = loaded.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **settings)
    return text


def answer_tokens(loaded: LoadedModel, example: Example) -> list[int]:
    """Return the reference as the model would write it after the prompt, end token included.

    Of a window it is the tokens after the given ones, without an end token.

    Prompt and answer are tokenized together and the prompt's tokens cut off, so that joints between
    words are right for every tokenizer. Raises: DataError if nothing is left, ModelSupportError if
    the prompt's tokens change when an answer follows.
    """
    if example.window is not None:
        return window_tokens(loaded, example)[1]
    prompt = prompt_text(loaded, example)
    joint = "" if prompt[-1:].isspace() or not prompt else " "
    adds = adds_special_tokens(loaded, prompt)
    before: list[int] = loaded.tokenizer(prompt, add_special_tokens=adds)["input_ids"]
    both: list[int] = loaded.tokenizer(prompt + joint + example.reference, add_special_tokens=adds)["input_ids"]
    if both[: len(before)] != before:
        raise ModelSupportError(f"the tokenizer merges prompt and answer of {example.id}; teacher forcing is undefined")
    answer = both[len(before) :]
    if not answer:
        raise DataError(f"the answer of {example.id} has no token; leave the item out")
    return answer if answer[-1] == loaded.eos_token_id else [*answer, loaded.eos_token_id]


def reference_text(loaded: LoadedModel, example: Example) -> str:
    """Return what answers are compared with; empty where no right answer is known."""
    return example.reference if example.window is None else answer_text(loaded, window_tokens(loaded, example)[1])


def answer_text(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    """Return generated tokens as text, without special tokens."""
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()


def adds_special_tokens(loaded: LoadedModel, text: str) -> bool:
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
