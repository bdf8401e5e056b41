"""Text and still pictures to model inputs, without torchvision.

transformers' own processors of families that also take video ask for torchvision even for a single
picture. This one joins the checkpoint's tokenizer, image processor and chat template itself: the
picture's place in the text is widened to as many image tokens as the picture has vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvbench.errors import ModelSupportError

CountTokens = Callable[[Mapping[str, Any]], list[int]]


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
