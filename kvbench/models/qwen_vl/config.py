"""The configuration of an original Qwen-VL checkpoint, read as it was published."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from kvbench.errors import ModelSupportError

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

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        intermediate_size: int = 22016,
        kv_channels: int = 128,
        layer_norm_epsilon: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 8192,
        seq_length: int = 2048,
        rotary_emb_base: float = 10000,
        rotary_pct: float = 1.0,
        use_dynamic_ntk: bool = True,
        use_logn_attn: bool = True,
        no_bias: bool = True,
        use_cache: bool = True,
        visual: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.kv_channels = kv_channels
        self.head_dim = kv_channels
        self.layer_norm_epsilon = layer_norm_epsilon
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.seq_length = seq_length
        self.rotary_emb_base = rotary_emb_base
        self.rotary_pct = rotary_pct
        self.use_dynamic_ntk = use_dynamic_ntk
        self.use_logn_attn = use_logn_attn
        self.no_bias = no_bias
        self.use_cache = use_cache
        self.visual = dict(_VISUAL if visual is None else visual)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("num_key_value_heads", "head_dim")}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self._check_covered()

    @property
    def image_token_id(self) -> int:
        """The token that stands for one of a picture's vectors; it follows <img> and </img> in the vocabulary."""
        return int(self.visual["image_start_id"]) + 2

    @property
    def image_tokens(self) -> int:
        """Vectors that a picture becomes."""
        return int(self.visual.get("n_queries", 256))

    def _check_covered(self) -> None:
        width = self.kv_channels * self.num_attention_heads
        if self.rotary_pct != 1.0 or width != self.hidden_size:
            raise ModelSupportError(
                f"rotary_pct={self.rotary_pct}, kv_channels x heads={width}, hidden_size={self.hidden_size}; the port "
                "of Qwen-VL covers rotary_pct=1 and heads that fill the hidden size"
            )
