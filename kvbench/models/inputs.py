"""From an example to what a model takes: the text of its prompt, its tokens, left-padded tensors, each token's kind.

The chat template writes picture and message; text becomes tokens with a picture as one token, which is then widened
to as many as the picture has; rows are padded on the left. Windows of running text and texts to be completed are plain
text: no chat template, the tokenizer's own begin token. A model without tokenizer and processor gets random token ids
and random pictures.

A policy that must not see the question when it compresses gets it as a second chunk: picture and context come first
and are compressed alone, the question and whatever the chat template writes after it follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.cache import Kind
from kvbench.datasets.base import Example, TokenPrompt
from kvbench.errors import DataError, ModelSupportError
from kvbench.models.chat import message, render_chat
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import FIXED_PICTURE_FAMILIES, image_tokens

if TYPE_CHECKING:
    from kvbench.cache.second_pass import Instruction

_PICTURE_INPUTS = ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw")
# What processors raise for one picture or text; StopIteration: more image tokens than pictures, transformers 5.17.
_REJECTIONS = (ValueError, TypeError, LookupError, ArithmeticError, StopIteration)
_QUESTION_MARK = "\ue000question\ue000"  # private use: no data set writes it
_BEFORE_IMAGE_TOKENS = 1  # as a begin token stands before a random picture
_REPEAT = ("previous context exactly.", "part of the previous context exactly, starting with")


def prompt_text(loaded: LoadedModel, example: Example, *, before_question: str = "") -> str:
    """Return the prompt as the model's own chat template writes it; plain text without one, or of a text to complete.

    What looks like a control token in the data is shielded (`TextTokens`). before_question is put between context and
    question, to find the place. Raises: ModelSupportError.
    """
    with_image = example.load_image is not None
    if with_image and not loaded.takes_images:
        raise ModelSupportError(f"{example.id} has a picture, but the model takes text only; choose another dataset")
    whole, shield = example.context + example.question, loaded.text.shield
    asked = shield(whole)
    if before_question:
        at = loaded.text.boundary(whole, len(example.context))
        asked = shield(whole[:at]) + before_question + shield(whole[at:])
    if loaded.chat_template is not None and not example.completes:
        return render_chat(loaded, [message(loaded, "user", asked, with_image=with_image)])
    if with_image:
        raise ModelSupportError("the checkpoint has no chat template, so a picture has no place in the prompt")
    return asked


def repeat_instruction(loaded: LoadedModel) -> Instruction | None:
    """Return the tokens that ask for the prompt again, as KVzip asks; None without a tokenizer."""
    from kvbench.cache.second_pass import Instruction  # needs transformers

    if loaded.tokenizer is None:
        return None
    texts = (*(f"\n\nRepeat the {part}" for part in _REPEAT), "\n")
    first, later, end = (loaded.text.ids(text, add_special_tokens=False) for text in texts)
    return Instruction(first=first, later=later, end=end)


def adds_special_tokens(loaded: LoadedModel, text: str) -> bool:
    """Templates that write the begin token themselves must not get a second one."""
    bos = loaded.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def prompt_ids(loaded: LoadedModel, example: Example) -> list[int]:
    """Return the prompt's tokens, a picture being one image token. Raises: ModelSupportError."""
    text = prompt_text(loaded, example)
    ids = loaded.text.ids(text, add_special_tokens=adds_special_tokens(loaded, text))
    places, pictures = sum(token == loaded.image_token_id for token in ids), int(example.load_image is not None)
    if loaded.takes_images and places != pictures:
        raise ModelSupportError(
            f"the prompt of {example.id} has {places} places for {pictures} pictures; the chat template must write one "
            "for each picture, choose a format with model.prompt"
        )
    return ids


def window_tokens(loaded: LoadedModel, example: Example) -> tuple[list[int], list[int]]:
    """Return the tokens given and the tokens scored. Raises: DataError if the passage has too few."""
    window = example.window
    assert window is not None
    tokens = loaded.text.ids(loaded.text.shield(example.question), add_special_tokens=True)
    end = window.prompt_tokens + window.scored_tokens
    if len(tokens) < end:
        raise DataError(
            f"{example.id} has {len(tokens)} tokens, and a window takes {end}; raise dataset.chars_per_token "
            f"above {len(example.question) / max(1, len(tokens)):.2f}"
        )
    return tokens[: window.prompt_tokens], tokens[window.prompt_tokens : end]


def _narrow_row(loaded: LoadedModel, example: Example) -> list[int]:
    return prompt_ids(loaded, example) if example.window is None else window_tokens(loaded, example)[0]


def _pictures(loaded: LoadedModel, images: Sequence[Any]) -> tuple[list[int], dict[str, Tensor]]:
    """Return how many image tokens each picture is, and what the model is given of the pictures.

    The processor sees pictures and their marks alone, no text: it would take a picture's mark in a question for one
    more picture.
    """
    mark = loaded.tokenizer.convert_ids_to_tokens(loaded.image_token_id)
    encoded = loaded.processor(
        text=[mark] * len(images), images=list(images), return_tensors="pt", padding=True, add_special_tokens=False
    )
    widths: list[int] = (encoded["input_ids"] == loaded.image_token_id).sum(dim=-1).tolist()
    return widths, {name: encoded[name] for name in _PICTURE_INPUTS if name in encoded}


def _written_tensors(loaded: LoadedModel, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return tokens and mask (B, T), all tokens of a picture among them, and what the model is told of pictures."""
    narrow = [_narrow_row(loaded, example) for example in examples]
    images = [example.load_image() for example in examples if example.load_image is not None]
    widths, pictures = _pictures(loaded, images) if images else ([], {})
    left, rows = iter(widths), []
    for example, row in zip(examples, narrow, strict=True):
        wide: list[int] = []
        for token in row:
            wide += [token] * (next(left) if token == loaded.image_token_id else 1)
        if not wide:
            raise DataError(f"the prompt of {example.id} has no token; leave the item out")
        rows.append(wide)
    longest = max(map(len, rows))
    pad = loaded.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    tensors = {"input_ids": ids, "attention_mask": mask, **pictures}
    if loaded.image_token_id is not None and getattr(loaded.processor, "marks_images", False):
        tensors["mm_token_type_ids"] = torch.eq(ids, loaded.image_token_id).int()
    tensors = {name: tensor.to(loaded.device) for name, tensor in tensors.items()}
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(loaded.model.dtype)
    return tensors


@contextmanager
def _named_when_rejected(example: Example) -> Iterator[None]:
    try:
        yield
    except _REJECTIONS as error:
        raise DataError(
            f"the model's processor does not take {example.id} ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); leave the item out"
        ) from error


def _drawn_tensors(loaded: LoadedModel, prompts: Sequence[TokenPrompt]) -> dict[str, Tensor]:
    """Return input_ids and attention_mask (B, T), and pixel_values (B, 3, S, S) where there are pictures.

    Ids are uniform over the vocabulary without the image token, pictures standard normal; both are
    drawn on the CPU, so every device gets the same. Raises: DataError for a prompt too short for its
    picture, or prompts of different lengths or kinds in one batch.
    """
    config, (first, *_) = loaded.model.config, prompts
    if len({(prompt.num_tokens, prompt.num_images) for prompt in prompts}) > 1:
        raise DataError("synthetic prompts of one batch must have one length and one number of pictures")
    with_image = bool(loaded.takes_images if first.num_images is None else first.num_images)
    num_image_tokens = image_tokens(config.to_dict()) if with_image else 0
    if with_image and first.num_tokens < num_image_tokens + 2:
        raise DataError(
            f"a prompt of {first.num_tokens} tokens has no room for a picture of {num_image_tokens} and text"
        )
    size, image_id = config.get_text_config().vocab_size, loaded.image_token_id
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    rows = []
    for generator in generators:
        if image_id is None or not 0 <= image_id < size:
            rows.append(torch.randint(size, (first.num_tokens,), generator=generator))
            continue
        row = torch.randint(size - 1, (first.num_tokens,), generator=generator)
        row += row >= image_id
        row[_BEFORE_IMAGE_TOKENS : _BEFORE_IMAGE_TOKENS + num_image_tokens] = image_id
        rows.append(row)
    ids = torch.stack(rows).to(loaded.device)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_image:
        vision = config.vision_config
        shape = (vision.num_channels, vision.image_size, vision.image_size)
        pixels = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        tensors["pixel_values"] = pixels.to(loaded.device, loaded.model.dtype)
    return tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class GridPositions:
    """Positions of prompts on three axes, as a family's own `get_rope_index` counts a picture: time, row and column.

    prompt (3, B, T) int64. offset (B, 1) int64: from a text token's index to its position on every
    axis once the prompt's pictures are behind it; a picture takes fewer positions than tokens.
    """

    prompt: Tensor
    offset: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """Prompts of B examples, padded on the left to T tokens.

    tensors: what the model's forward takes, input_ids and attention_mask (B, T), and where there are
    pictures their pixels and what the family tells about them. kind (B, T) int8. row_seeds: a number
    per example, from its id. grid: where a family counts pictures by rows and columns, None elsewhere.
    question_ids (B, N): tokens of a question that follows as a second chunk, None where the question is
    part of the T tokens. find_question_tokens: returns how many tokens at the end of each row are its question and
    what follows it, 0 for one that follows as a second chunk; None where there is no text.
    """

    tensors: dict[str, Tensor]
    kind: Tensor
    row_seeds: tuple[int, ...]
    grid: GridPositions | None = None
    question_ids: Tensor | None = None
    find_question_tokens: Callable[[], tuple[int, ...]] | None = None

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

    Raises: DataError naming the one item that the processor does not take, ModelSupportError.
    """
    drawn = [example.token_prompt for example in examples if example.token_prompt is not None]
    try:
        tensors = _drawn_tensors(loaded, drawn) if drawn else _written_tensors(loaded, examples)
    except _REJECTIONS:
        if not drawn:
            for example in examples:
                with _named_when_rejected(example):
                    _written_tensors(loaded, [example])
        raise
    ids, grid = tensors["input_ids"], None
    count_positions = getattr(getattr(loaded.model, "model", None), "get_rope_index", None)
    if count_positions is not None:
        names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
        prompt, offset = count_positions(**{name: tensors[name] for name in names if name in tensors})
        grid = GridPositions(prompt=prompt, offset=offset)
    special = torch.tensor(loaded.tokenizer.all_special_ids if loaded.tokenizer else [], device=ids.device)
    kind = torch.where(torch.isin(ids, special), int(Kind.SPECIAL), int(Kind.TEXT))
    if loaded.image_token_id is not None:
        kind = torch.where(ids == loaded.image_token_id, int(Kind.IMAGE), kind)
    digests = [hashlib.sha256(example.id.encode()).digest() for example in examples]
    batch = PromptBatch(
        tensors=tensors,
        kind=kind.to(torch.int8),
        row_seeds=tuple(int.from_bytes(digest[:4], "big") for digest in digests),
        grid=grid,
        find_question_tokens=None if drawn else cache(partial(_question_tokens, loaded, tuple(examples))),
    )
    return batch if num_question_tokens == 0 else _without_question(batch, num_question_tokens)


def _question_tokens(loaded: LoadedModel, examples: Sequence[Example]) -> tuple[int, ...]:
    return tuple(num_question_tokens(loaded, example, hidden=False) for example in examples)


def _without_question(batch: PromptBatch, num_tokens: int) -> PromptBatch:
    """Return the batch with the last `num_tokens` of every row, which are text, as a second chunk."""
    shape, grid = batch.kind.shape, batch.grid
    return replace(
        batch,
        tensors={name: t[:, :-num_tokens] if t.shape == shape else t for name, t in batch.tensors.items()},
        kind=batch.kind[:, :-num_tokens],
        grid=grid and replace(grid, prompt=grid.prompt[..., :-num_tokens]),
        question_ids=batch.tensors["input_ids"][:, -num_tokens:],
        find_question_tokens=lambda: (0,) * shape[0],
    )


def num_question_tokens(loaded: LoadedModel, example: Example, *, hidden: bool = True) -> int:
    """Return how many tokens at the prompt's end are the question and what follows it.

    A token that holds letters of both counts as the question's, so nothing of the question is in the
    first part. hidden: that part is compressed alone, so it must be there. Raises: DataError if there is no question,
    or nothing before a hidden one, ModelSupportError if the chat template does not write message and picture in order.
    """
    advice = "set query_visible=true" if hidden else "choose a policy that does not read the question"
    if hidden and not example.can_hide_question:
        raise DataError(f"{example.id} has neither a picture nor a context before its question; {advice}")
    if not example.has_question:
        raise DataError(f"{example.id} is text to go on with and has no question; {advice}")
    whole = prompt_text(loaded, example)
    before, mark, after = prompt_text(loaded, example, before_question=_QUESTION_MARK).partition(_QUESTION_MARK)
    if not mark or before + after != whole:
        raise ModelSupportError(f"the chat template changes the message, so the question's begin is unknown; {advice}")
    adds = adds_special_tokens(loaded, whole)
    first = loaded.text.ids(before, add_special_tokens=adds)
    tokens = loaded.text.ids(whole, add_special_tokens=adds)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, tokens, strict=False)))
    if (hidden and shared == 0) or (loaded.image_token_id is not None and loaded.image_token_id in tokens[shared:]):
        raise ModelSupportError(
            f"the chat template writes the picture after the question, or nothing before it; {advice}"
        )
    return len(tokens) - shared


def by_question_length(loaded: LoadedModel, examples: Sequence[Example]) -> dict[int, list[Example]]:
    """Return the examples by the number of their question's tokens, in order of appearance.

    A second chunk has no pads, so only those of one number can be decoded together.
    """
    groups: dict[int, list[Example]] = {}
    for example in examples:
        groups.setdefault(num_question_tokens(loaded, example), []).append(example)
        loaded.beat()
    return groups


def answer_tokens(loaded: LoadedModel, example: Example) -> list[int]:
    """Return the reference as the model would write it after the prompt, and one end token.

    Of a window it is the tokens after the given ones, without an end token; a text that is completed may go on, too.

    Prompt and answer are tokenized together and the prompt's tokens cut off, so that joints between
    words are right for every tokenizer. Raises: DataError if nothing is left, ModelSupportError if
    the prompt's tokens change when an answer follows.
    """
    if example.window is not None:
        return window_tokens(loaded, example)[1]
    prompt = prompt_text(loaded, example)
    joint = "" if prompt[-1:].isspace() or not prompt else " "
    adds, answer = adds_special_tokens(loaded, prompt), loaded.text.shield(joint + example.reference)
    before = loaded.text.ids(prompt, add_special_tokens=adds)
    both = loaded.text.ids(prompt + answer, add_special_tokens=adds)
    if both[: len(before)] != before:
        raise ModelSupportError(f"the tokenizer merges prompt and answer of {example.id}; teacher forcing is undefined")
    if len(both) == len(before):
        raise DataError(f"the answer of {example.id} has no token; leave the item out")
    return both[len(before) :] if example.completes else [*both[len(before) :], loaded.eos_token_id]


def reference_text(loaded: LoadedModel, example: Example) -> str:
    """Return what answers are compared with; empty where no right answer is known."""
    return example.reference if example.window is None else answer_text(loaded, window_tokens(loaded, example)[1])


def answer_text(loaded: LoadedModel, tokens: Sequence[int]) -> str:
    """Return generated tokens as text, without special tokens."""
    text: str = loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()


@dataclass(frozen=True, kw_only=True)
class GivenPrompts:
    """What a model is given of a data set: tokens of each prompt by example id, and a SHA-256 over all of them.

    num_tokens counts all tokens of pictures; the digest tells one picture from another by the data set's fingerprint
    alone.
    """

    num_tokens: Mapping[str, int]
    digest: str


def given_prompts(loaded: LoadedModel, examples: Sequence[Example]) -> GivenPrompts:
    """Return lengths and digest of all prompts. Raises: DataError, ModelSupportError."""
    digest, lengths = hashlib.sha256(), {}
    widths: dict[Any, int] = {}
    for example in examples:
        drawn = example.token_prompt
        row = [drawn.num_tokens, drawn.seed] if drawn is not None else _narrow_row(loaded, example)
        digest.update(f"{example.id!r} {row}\n".encode(errors="replace"))
        lengths[example.id] = len(row) if drawn is None else drawn.num_tokens
        if drawn is None and example.load_image is not None:
            with _named_when_rejected(example):
                lengths[example.id] += _picture_width(loaded, example.load_image, widths) - 1
    first = next((example for example in examples if example.token_prompt is None), None)
    if first is not None and _narrow_row(loaded, first) != _narrow_row(loaded, first):
        raise ModelSupportError(
            "the chat template writes another prompt each time it is asked, so nothing could be measured twice; choose "
            "a format with model.prompt"
        )
    return GivenPrompts(num_tokens=lengths, digest=digest.hexdigest())


def _picture_width(loaded: LoadedModel, load_image: Callable[[], Any], known: dict[Any, int]) -> int:
    """Return the tokens of a picture: of one size all have as many, in some families whatever the size."""
    picture = None if loaded.model.config.model_type in FIXED_PICTURE_FAMILIES and known else load_image()
    size = next(iter(known)) if picture is None else picture.size
    if size not in known:
        (known[size],), _ = _pictures(loaded, [picture])
    return known[size]
