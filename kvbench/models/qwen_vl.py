"""The original Qwen-VL and Qwen-VL-Chat (arXiv 2308.12966), as model classes that transformers 5 does not have.

Tensor and configuration names are those of the published checkpoints, so that their files load as they are. The
decoder is Qwen-7B: fused query-key-value with bias, a gated MLP in two halves, RMS norms. Pictures replace the image
tokens between <img> and </img>: an OpenCLIP ViT-bigG without class token, and one cross attention that resamples it
to 256 vectors (Sec. 2.1).

Beyond the training length L positions are stretched. Dynamic NTK: a prompt of n > L tokens is rotated with the base
b x a^(D/(D-2)), a = 2^(ceil(log2(n / L)) + 1) - 1. The prompt decides; its answer goes on with the same frequencies,
since keys that are cached already were rotated with them. Log-n: the query at position p is scaled by
log_L(p + 1) from p = L on. Both follow the tokens a row has seen and a token's true index in its row,
whatever a cache still holds and however far a batch was padded.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from kvbench.cache.attention import CACHE_NAME
from kvbench.errors import ModelSupportError

_TRAINED_PATCHES = 256
_NORM_EPSILON = 1e-6
_RESAMPLER_HEAD_WIDTH = 128
_STRETCH = "qwen_rotary_stretch"  # rides on the cache, whose keys were rotated with it
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "seq_length": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "use_cache": True,
}
_VISUAL: dict[str, Any] = {
    "heads": 16,
    "image_size": 448,
    "image_start_id": 151857,
    "layers": 48,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "patch_size": 14,
    "width": 1664,
}


class QwenVLConfig(PretrainedConfig):
    """Decoder and vision tower of Qwen-VL; `visual` holds the tower's sizes and the id of the <img> tag.

    seq_length: tokens of a training sequence; beyond it the rotary base and the queries are scaled.
    intermediate_size counts both halves of the gated MLP. Raises: ModelSupportError for variants of
    the family that the port does not cover.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(self, visual: dict[str, Any] | None = None, tie_word_embeddings: bool = False, **fields: Any) -> None:
        for name, default in _DEFAULTS.items():
            setattr(self, name, fields.pop(name, default))
        self.visual = dict(_VISUAL if visual is None else visual)
        others = {name: value for name, value in fields.items() if name not in ("num_key_value_heads", "head_dim")}
        self.num_key_value_heads, self.head_dim = self.num_attention_heads, self.kv_channels
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
        width = self.kv_channels * self.num_attention_heads
        if self.rotary_pct != 1.0 or width != self.hidden_size:
            raise ModelSupportError(
                f"rotary_pct={self.rotary_pct}, kv_channels x heads={width}, hidden_size={self.hidden_size}; the port "
                "of Qwen-VL covers rotary_pct=1 and heads that fill the hidden size"
            )

    @property
    def image_token_id(self) -> int:
        """The token that stands for one of a picture's vectors; it follows <img> and </img> in the vocabulary."""
        return int(self.visual["image_start_id"]) + 2

    @property
    def image_tokens(self) -> int:
        """Vectors that a picture becomes."""
        return int(self.visual.get("n_queries", 256))


class DynamicRotary(nn.Module):
    """Angles of the rotary embedding, one base per row."""

    rope_type = "dynamic NTK by prompt"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width = int(config.kv_channels)
        self.base = float(config.rotary_emb_base)
        self.trained_tokens = int(config.seq_length)
        self.dynamic = bool(config.use_dynamic_ntk)

    def stretch(self, prompt_tokens: Tensor) -> Tensor:
        """Return a (B,), float64, for prompts of `prompt_tokens` (B,) tokens; 1 up to the training length."""
        if not self.dynamic:
            return torch.ones_like(prompt_tokens, dtype=torch.float64)
        doublings = torch.log2(prompt_tokens.double() / self.trained_tokens).ceil()
        return (torch.exp2(doublings + 1) - 1).clamp(min=1)

    def fixed_rotation(self) -> tuple[Tensor, int]:
        """Return the frequencies (D / 2,) of rows within the training length, and that length in tokens."""
        powers = torch.arange(0, self.width, 2).float() / self.width
        return 1.0 / (self.base**powers), self.trained_tokens

    def forward(self, positions: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (B, 1, Q, D / 2), float32, of `positions` (B, Q)."""
        base = (self.base * stretch ** (self.width / (self.width - 2))).float()
        powers = torch.arange(0, self.width, 2, device=positions.device).float() / self.width
        frequencies = 1.0 / (base[:, None] ** powers)
        angles = positions[:, None, :, None].float() * frequencies[:, None, None]
        return angles.cos(), angles.sin()


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `states` (B, H, Q, D) turned in half-split pairs, computed in float32."""
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)


def query_scale(positions: Tensor, trained_tokens: int) -> Tensor:
    """Return the log-n factor (B, 1, Q, 1), float32, of queries at `positions` (B, Q)."""
    factor = (positions + 1).float().clamp(min=1).log() / math.log(trained_tokens)
    return torch.where(positions < trained_tokens, 1.0, factor)[:, None, :, None]


class RootMeanSquareNorm(nn.Module):
    """x / rms(x) in float32, times a learned weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = states.float()
        scaled = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return scaled.to(states.dtype) * self.weight


class QwenAttention(nn.Module):
    """Causal attention, through whatever function transformers' AttentionInterface has under the model's name."""

    is_causal = True

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = 1
        self.scaling = config.kv_channels**-0.5
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        states: Tensor,
        *,
        positions: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        """Attend from `states` (B, Q, hidden) at `positions` (B, Q)."""
        fused = self.c_attn(states).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.config.kv_channels)).transpose(1, 2) for part in fused)
        query, key = turned(query, *rotary), turned(key, *rotary)
        if self.config.use_logn_attn and not self.training:
            query = query * query_scale(positions, self.config.seq_length).to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        output: Tensor = self.c_proj(mixed.flatten(2))
        return output


class GatedMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))); each half is half of the configured intermediate size."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        half, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, half, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, half, bias=bias)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=bias)

    def forward(self, states: Tensor) -> Tensor:
        """Map (B, Q, hidden) to the same shape."""
        output: Tensor = self.c_proj(self.w1(states) * functional.silu(self.w2(states)))
        return output


class QwenBlock(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = RootMeanSquareNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenAttention(config, layer_idx)
        self.ln_2 = RootMeanSquareNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = GatedMLP(config)

    def forward(self, states: Tensor, **attention: Any) -> Tensor:
        """Map (B, Q, hidden) to the same shape; `attention` goes to the attention as it is."""
        states = states + self.attn(self.ln_1(states), **attention)
        return states + torch.as_tensor(self.mlp(self.ln_2(states)))


class TowerAttention(nn.Module):
    """Full self-attention over patches; `in_proj` gives query, key and value of a head side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Attend: (N, P, width) to the same shape."""
        per_head = self.in_proj(patches).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, key, value = per_head.chunk(3, dim=-1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        joined: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return joined


class TowerBlock(nn.Module):
    """One pre-norm layer of the tower."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(width * mlp_ratio)
        self.ln_1 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.ln_2 = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.attn = TowerAttention(width, heads)
        layers = (("c_fc", nn.Linear(width, inner)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(inner, width)))
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, patches: Tensor) -> Tensor:
        """Map (N, P, width) to the same shape."""
        patches = patches + self.attn(self.ln_1(patches))
        return patches + torch.as_tensor(self.mlp(self.ln_2(patches)))


class Resampler(nn.Module):
    """Cross attention of `num_queries` learned queries over the patches."""

    def __init__(self, width: int, patch_width: int, num_queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(num_queries, width))
        self.pos_embed = nn.Parameter(torch.zeros(num_queries, width), requires_grad=False)
        same = patch_width == width
        self.kv_proj = nn.Identity() if same else nn.Linear(patch_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // _RESAMPLER_HEAD_WIDTH, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=_NORM_EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=_NORM_EPSILON)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (N, P, patch_width) to (N, num_queries, width)."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + on_grid(self.pos_embed, patches.shape[1])
        queries = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        mixed: Tensor = self.attn(queries, keys, values, need_weights=False)[0]
        return mixed


class VisionTower(nn.Module):
    """Pictures to vectors of the decoder's width; made from `config.visual`."""

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width, out = visual["width"], visual["output_dim"]
        patch, num_queries = visual["patch_size"], visual.get("n_queries", 256)
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(_TRAINED_PATCHES, width))
        self.ln_pre = nn.LayerNorm(width, eps=_NORM_EPSILON)
        blocks = (TowerBlock(width, visual["heads"], visual["mlp_ratio"]) for _ in range(visual["layers"]))
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.attn_pool = Resampler(out, width, num_queries)
        self.ln_post = nn.LayerNorm(out, eps=_NORM_EPSILON)
        self.proj = nn.Parameter(torch.zeros(out, out))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixels (N, 3, S, S) to (N, num_queries, output_dim)."""
        patches = self.conv1(pixel_values.to(self.proj.dtype)).flatten(2).transpose(1, 2)
        patches = self.ln_pre(patches + on_grid(self.positional_embedding, patches.shape[1]))
        vectors: Tensor = self.ln_post(self.attn_pool(self.transformer["resblocks"](patches))) @ self.proj
        return vectors


def on_grid(positions: Tensor, num_patches: int) -> Tensor:
    """Return `positions` (S x S, width), laid out row by row, interpolated to `num_patches` = T x T rows."""
    source, target = math.isqrt(len(positions)), math.isqrt(num_patches)
    if source == target:
        return positions
    square = positions.float().reshape(1, source, source, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=(target, target), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).transpose(0, 1).to(positions.dtype)


def sine_positions(num_positions: int, width: int) -> Tensor:
    """Return fixed 2D positions (G x G, width): column in the first half, row in the second, sines before cosines."""
    edge = math.isqrt(num_positions)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(edge, dtype=torch.float64)[:, None] * frequencies
    coded = torch.cat((angles.sin(), angles.cos()), dim=-1)
    columns, rows = coded[None].expand(edge, -1, -1), coded[:, None].expand(-1, edge, -1)
    return torch.cat((columns, rows), dim=-1).flatten(0, 1).float()


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

    _input_embed_layer = "wte"

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary_emb = DynamicRotary(config)
        self.h = nn.ModuleList(QwenBlock(config, index) for index in range(config.num_hidden_layers))
        self.ln_f = RootMeanSquareNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = VisionTower(config.visual)
        self.post_init()

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
        new, positions = states.shape[1], position_ids
        if positions is None and attention_mask is not None and attention_mask.ndim == 2:
            positions = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -new:]
        elif positions is None:
            seen = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(seen, seen + new, device=states.device)[None]
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


AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)
