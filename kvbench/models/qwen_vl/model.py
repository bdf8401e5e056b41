"""Qwen-VL as transformers model classes: pictures replace the image tokens between <img> and </img>."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from kvbench.cache.attention import CACHE_NAME
from kvbench.errors import ModelSupportError
from kvbench.models.qwen_vl.config import QwenVLConfig
from kvbench.models.qwen_vl.decoder import QwenBlock, RootMeanSquareNorm
from kvbench.models.qwen_vl.rotary import DynamicRotary
from kvbench.models.qwen_vl.vision import Resampler, VisionTower, sine_positions

_STRETCH = "qwen_rotary_stretch"  # rides on the cache, whose keys were rotated with it


class QwenVLPreTrainedModel(PreTrainedModel):
    """What both classes share."""

    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    input_modalities = ("image", "text")
    _no_split_modules = ["QwenBlock", "TowerBlock"]  # noqa: RUF012 (transformers reads a list)
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RootMeanSquareNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, Resampler):
            initialization.normal_(module.query, mean=0.0, std=self.config.initializer_range)
            initialization.copy_(module.pos_embed, sine_positions(*module.pos_embed.shape))
        elif isinstance(module, VisionTower):
            for tensor in (module.positional_embedding, module.proj):
                initialization.normal_(tensor, mean=0.0, std=tensor.shape[-1] ** -0.5)


class QwenVLModel(QwenVLPreTrainedModel):
    """Vision tower and decoder, without the head."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = DynamicRotary(config)
        self.h = nn.ModuleList(QwenBlock(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = RootMeanSquareNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTower(config.visual)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.wte = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder on (B, Q) tokens; pixel_values (N, 3, S, S) fill their image tokens in order.

        The cache comes as `cache`, or under its name before transformers 5.24. position_ids (B, Q) are true
        indices within a row; without them they follow from attention_mask (B, seen) and the cache. Raises:
        ModelSupportError if pictures and image tokens do not match.
        """
        states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None:
            states = self._with_pictures(states, input_ids, pixel_values)
        cache = cache if past_key_values is None else past_key_values
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        positions = position_ids
        if positions is None:
            positions = _positions(states, attention_mask, cache)
        positions = positions.expand(states.shape[0], -1)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=attention_mask,
            position_ids=positions,
            **{CACHE_NAME: cache},
        )
        rotary = self.rotary_emb(positions, self._stretch(positions, cache))
        for block in self.h:
            states = block(states, positions=positions, rotary=rotary, mask=mask, cache=cache)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(states), **{CACHE_NAME: cache})

    def _with_pictures(self, states: Tensor, input_ids: Tensor | None, pixel_values: Tensor) -> Tensor:
        vectors = self.visual(pixel_values).to(states.dtype)
        places = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
        if input_ids is not None:
            places = input_ids == self.config.image_token_id
        if int(places.sum()) != vectors.shape[:2].numel():
            raise ModelSupportError(
                f"{len(vectors)} pictures give {vectors.shape[:2].numel()} vectors, but the prompt has "
                f"{int(places.sum())} image tokens; each picture needs {self.config.image_tokens} of them"
            )
        return states.masked_scatter(places[..., None], vectors)

    def _stretch(self, positions: Tensor, cache: Any) -> Tensor:
        """(B,): the rotary stretch of the prompt that this cache began with."""
        if cache is not None and cache.get_seq_length() > 0 and hasattr(cache, _STRETCH):
            kept: Tensor = getattr(cache, _STRETCH)
            return kept
        stretch = self.rotary_emb.stretch(positions.amax(dim=-1) + 1)
        if cache is not None:
            setattr(cache, _STRETCH, stretch)
        return stretch


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its language head."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> QwenVLModel:
        """Return the model without its head."""
        return self.transformer

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return a step's inputs; pictures go in with the prompt only."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        cache = inputs.get(CACHE_NAME)
        if cache is not None and cache.get_seq_length() > 0:
            inputs.pop("pixel_values", None)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits of the last `logits_to_keep` tokens, all for 0; the rest as in `QwenVLModel.forward`."""
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            use_cache=use_cache,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE_NAME: getattr(output, CACHE_NAME)})


def _positions(states: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
    new = states.shape[1]
    seen = 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -new:]
    return torch.arange(seen, seen + new, device=states.device)[None]
