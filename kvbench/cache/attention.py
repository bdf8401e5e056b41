"""The attention function that transformers calls, and switching a model to it.

Registered through the public `AttentionInterface` and set on the **text** config only: on a whole
vision-language model it would make the vision tower causal, silently. Under the same name a mask
function hands the plain (B, seen) padding mask through; causality and validity are decided per
layer, here. What is not implemented is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, create_causal_mask

from kvbench.cache.layer import LAYER_TAG
from kvbench.cache.statistics import Chunk, chunk_attention
from kvbench.errors import ModelSupportError

ATTENTION_NAME = "kvbench"
CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before
CACHE_NAME = next(name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters)
"""What the installed transformers calls a cache, in arguments and in outputs."""
_REFUSED = ("softcap", "sliding_window", "s_aux", "position_bias", "head_mask")


def kvbench_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend under the layer that `key` is tagged with; without a cache, plain causal attention.

    query (B, Hq, Q, D), key, value as `PolicyLayer.update` returned them, attention_mask (B, seen)
    or None. Returns (B, Q, Hq, D) and None. Raises: ModelSupportError.
    """
    _refuse_unsupported(module, attention_mask, dropout, kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    tag = getattr(key, LAYER_TAG, None)
    if tag is not None:
        output = tag().attend(query, key, value, scale, attention_mask)
    else:
        output = _without_cache(query, key, value, scale, attention_mask)
    return output.transpose(1, 2), None


def padding_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Hand the (B, seen) padding mask through, None when there is none.

    Raises: ModelSupportError for a mask that is not plain causal, which transformers tells here only.
    """
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ModelSupportError(
            "the mask is not plain causal (packed sequences, image tokens that see each other, a sliding window); "
            "kvbench attention does not implement it. Give every sequence its own row"
        )
    return attention_mask


def attach(model: Any) -> None:
    """Switch the text part of `model` to kvbench's attention, so that a `PolicyCache` can be passed.

    The vision tower keeps its own. Raises: ModelSupportError if the text part has no switch.
    """
    text_config = model.config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ModelSupportError(
            f"{type(model).__name__} mixes layer types {sorted(layer_types)}; kvbench supports full attention only"
        )
    nested = text_config is not model.config
    model.set_attn_implementation({"text_config": ATTENTION_NAME} if nested else ATTENTION_NAME)


def cache_name(model: Any) -> str:
    """Return the name under which the forward of `model` takes a cache; transformers' own name where it takes both.

    Raises: ModelSupportError for a forward that takes none.
    """
    parameters = inspect.signature(type(model).forward).parameters
    for name in (CACHE_NAME, *CACHE_NAMES):
        if name in parameters:
            return name
    raise ModelSupportError(
        f"{type(model).__name__}.forward takes no cache under {' or '.join(CACHE_NAMES)}; kvbench cannot hand it one"
    )


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return `cache` as the keyword argument that `model` and its `generate` take it by.

    Raises: ModelSupportError as `cache_name` does.
    """
    return {cache_name(model): cache}


def is_attached(config: Any) -> bool:
    """Return whether `attach` was called on the model of this config."""
    return bool(config.get_text_config()._attn_implementation == ATTENTION_NAME)


def _refuse_unsupported(module: nn.Module, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> None:
    used = [name for name in _REFUSED if kwargs.get(name) is not None]
    if dropout:
        used.append(f"dropout={dropout} (call model.eval())")
    if not getattr(module, "is_causal", True):
        used.append("attention that is not causal")
    if mask is not None and mask.ndim != 2:
        used.append(f"a {mask.ndim}-dimensional attention mask (give the (B, seen) padding mask)")
    if used:
        raise ModelSupportError(f"{type(module).__name__} uses {', '.join(used)}; kvbench does not implement it")


def _without_cache(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    batch, _, new, _ = query.shape
    if key.shape[2] != new:
        raise ModelSupportError(
            f"attention got {key.shape[2]} keys for {new} queries from a cache that is not kvbench's; "
            "pass **cache_argument(model, PolicyCache(model, policy, budget)), or use_cache=False"
        )
    real = mask.bool() if mask is not None else torch.ones((batch, new), dtype=torch.bool, device=query.device)
    position = torch.where(real, real.long().cumsum(-1) - 1, -1)
    key_position = position[:, None].expand(batch, key.shape[1], new)
    plain = mask is None or bool(real.all())
    output, _ = chunk_attention(
        Chunk(
            query=query,
            keys=key,
            values=value,
            query_position=position,
            key_position=key_position,
            scaling=scale,
            plain=plain,
        ),
        wants_lse=False,
    )
    return output


AttentionInterface.register(ATTENTION_NAME, kvbench_attention)
AttentionMaskInterface.register(ATTENTION_NAME, padding_mask)
