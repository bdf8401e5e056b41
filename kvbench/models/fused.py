"""Fused kernels for the decode step of an unmodified model: projections, gated MLP, RMSNorm and RoPE.

Modules keep their weights and their own forward: an instance becomes one of a subclass that takes a
decode step on a GPU, and hands everything else on. The same for the full cache and
for every policy. In layers that are known to be norm, attention, sum, norm, MLP, sum, a sum and the norm after
it are one launch. Set `model.fused=false` to do without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.attention import CACHE_NAMES
from kvbench.kernels.dispatch import is_decode_row, leave_unturned, use_triton

_SILU = ("SiLU", "SiLUActivation")
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_OF_TEXT = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_ATTENTIONS = (*_OF_TEXT, "Qwen2_5_VLAttention", "Qwen3VLTextAttention")  # a cache is given what they rotated as it is
_fused_attention: ContextVar[object] = ContextVar("fused_attention", default=None)  # the cache of the one that runs
_NO_CACHE = object()


def fuse(model: Any) -> None:
    """Put the fused decode step before the forwards of `model`'s text part; prefill is left as it is."""
    decoder = model.get_decoder()
    for module in decoder.modules():
        if _has_plain(module, ("q_proj", "k_proj", "v_proj")):
            _share_input([module.q_proj, module.k_proj, module.v_proj])
            _product_alone(getattr(module, "o_proj", None))
            _extend(module, _Attention)
        elif _is_gated_mlp(module):
            _extend(module, _GatedMlp)
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            _extend(module, _Norm)
    _join_sums_and_norms(decoder)
    _product_alone(model.get_output_embeddings())
    embeddings = model.get_input_embeddings()
    if type(embeddings) is nn.Embedding and embeddings.max_norm is None:
        _extend(embeddings, _Rows)
    _rotate_by_kernel(sys.modules[type(decoder).__module__])


def _is_plain(linear: object) -> bool:
    """Whether it multiplies by its weight and no more: a subclass may do anything."""
    return type(linear) is nn.Linear


def _has_plain(module: nn.Module, names: Sequence[str]) -> bool:
    return all(_is_plain(getattr(module, name, None)) for name in names)


def _is_gated_mlp(module: nn.Module) -> bool:
    names = ("gate_proj", "up_proj", "down_proj")
    without_bias = _has_plain(module, names) and all(getattr(module, name).bias is None for name in names)
    return without_bias and type(getattr(module, "act_fn", None)).__name__ in _SILU


def _join_sums_and_norms(decoder: Any) -> None:
    layers = [layer for layer in getattr(decoder, "layers", ()) if type(layer).__name__ in _LAYERS]
    norms = [layer.input_layernorm for layer in layers] + [getattr(decoder, "norm", None)]
    for layer, after in zip(layers, norms[1:], strict=True):
        if isinstance(after, _Norm) and isinstance(layer.post_attention_layernorm, _Norm):
            _extend(layer, _Layer).kvbench_after = [after]  # a list, which is no submodule


def _share_input(linears: list[nn.Linear]) -> None:
    """Let the first of `linears` compute all of them in one launch; the others hand out what it left."""
    if len({linear.bias is None for linear in linears}) > 1:
        return
    left: dict[int, tuple[Tensor, Tensor]] = {}
    for number, linear in enumerate(linears):
        extended = _extend(linear, _LaterProduct if number else _FirstProduct)
        extended.kvbench_number, extended.kvbench_left = number, left
    linears[0].kvbench_others = linears[1:]  # type: ignore[assignment]  # a list, which is no submodule


def _product_alone(linear: Any) -> None:
    if _is_plain(linear):
        _extend(linear, _Product)


def _extend(module: Any, by: Any) -> Any:
    """Put `by` before the class of this instance. Nothing refers to the instance, so it is freed and copied as ever."""
    if not isinstance(module, by):
        stock: Any = type(module)
        module.__class__ = _extended(by, stock)
    return module


@cache
def _extended(by: Any, stock: Any) -> Any:
    return type(stock.__name__, (by, stock), {"__module__": stock.__module__, "__doc__": stock.__doc__})


def _takes(x: Tensor, *weights: Tensor) -> bool:
    # The norm after the last layer of a device lies on the next one.
    return is_decode_row(x) and all(weight.dtype == x.dtype and weight.device == x.device for weight in weights)


class _Rows(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1:] != (1,) or not use_triton(self.weight):
            return super().forward(tokens)
        return self.weight[tokens]  # the library's own way to a few rows takes five times as long


class _Product(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if not _takes(x, self.weight):
            return super().forward(x)
        from kvbench.kernels.decode_step import project_rows

        return project_rows(x, [self.weight], [self.bias])[0]


class _FirstProduct(nn.Linear):
    kvbench_others: list[nn.Linear]
    kvbench_left: dict[int, tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        linears = [self, *self.kvbench_others]
        if not _takes(x, *(linear.weight for linear in linears)):
            return super().forward(x)
        from kvbench.kernels.decode_step import project_rows

        outputs = project_rows(x, [linear.weight for linear in linears], [linear.bias for linear in linears])
        self.kvbench_left.update({number: (x, outputs[number]) for number in range(1, len(outputs))})
        return outputs[0]


class _LaterProduct(nn.Linear):
    kvbench_number: int
    kvbench_left: dict[int, tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        made_from, output = self.kvbench_left.pop(self.kvbench_number, (None, x))
        return output if made_from is x else super().forward(x)


class _Attention(nn.Module):
    def forward(self, *args: Any, **options: Any) -> Any:
        # Another attention may go on with what it rotated, norms or factors of it, before it tells its cache.
        names = CACHE_NAMES if type(self).__name__ in _ATTENTIONS else ()
        caches = (options[name] for name in names if options.get(name) is not None)
        before = _fused_attention.set(next(caches, _NO_CACHE))
        try:
            return super().forward(*args, **options)
        finally:
            _fused_attention.reset(before)


class _GatedMlp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        if not _takes(x, gate, up, down):
            stock: Tensor = super().forward(x)
            return stock
        from kvbench.kernels.decode_step import gated_rows, project_rows

        return project_rows(gated_rows(x, gate, up), [down], [None])[0]


class _Norm(nn.Module):
    weight: Tensor
    variance_epsilon: float
    kvbench_made: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        made, self.kvbench_made = self.kvbench_made, None
        if made is not None and made[0] is x:
            return made[1]
        if not _takes(x, self.weight):
            stock: Tensor = super().forward(x)
            return stock
        from kvbench.kernels.decode_step import norm_rows

        return norm_rows(x, self.weight, self.variance_epsilon)


class _Layer(nn.Module):
    input_layernorm: _Norm
    post_attention_layernorm: _Norm
    self_attn: nn.Module
    mlp: nn.Module
    kvbench_after: list[_Norm]

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        norm, after = self.post_attention_layernorm, self.kvbench_after[0]
        if args or not _takes(hidden_states, norm.weight, after.weight):
            return super().forward(hidden_states, *args, **options)
        from kvbench.kernels.decode_step import add_and_norm_rows

        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
        between, normed = add_and_norm_rows(hidden_states, attended, norm.weight, norm.variance_epsilon)
        total, ready = add_and_norm_rows(between, self.mlp(normed), after.weight, after.variance_epsilon)
        after.kvbench_made = (total, ready)
        return total


def _rotate_by_kernel(modeling: Any) -> None:
    """Put our rotation before the modeling file's own function, which models call by name, not by instance.

    Other models of the process share the function, so it does as it did unless a fused attention runs.
    """
    stock = getattr(modeling, "apply_rotary_pos_emb", None)
    if stock is None or hasattr(stock, "kvbench_stock") or not _turns_halves(stock):
        return

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        whole = len(cos.shape) == 3 and cos.shape[-1] == q.shape[-1] and q.dtype == k.dtype and not rest and not options
        cache = _fused_attention.get()
        if cache is None or not (whole and q.shape[2] == 1 and use_triton(q)):
            return stock(q, k, cos, sin, *rest, **options)
        from kvbench.kernels.decode_step import rotate_later, rotate_rows

        if not getattr(cache, "takes_unturned", False):
            return rotate_rows(q, k, cos, sin)
        keys, unturned = rotate_later(q, k, cos, sin)
        return unturned.turned_queries, leave_unturned(keys, unturned)

    apply_rotary_pos_emb.kvbench_stock = stock  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = apply_rotary_pos_emb


def _turns_halves(stock: Any) -> bool:
    """Whether the function does what the kernel does, tried on some numbers: there are models that turn neighbours."""
    states = torch.arange(16.0, dtype=torch.float32, device="cpu").view(1, 2, 1, 8)
    cosines = torch.linspace(0.1, 0.9, 8, dtype=torch.float32, device="cpu").view(1, 1, 8)
    sines, (low, high) = cosines.flip(-1), states.chunk(2, dim=-1)
    try:
        turned = stock(states, states[:, :1], cosines, sines)
    except Exception:  # it takes something else
        return False
    if not isinstance(turned, tuple) or len(turned) != 2:
        return False
    expected = states * cosines + torch.cat((-high, low), dim=-1) * sines
    both = zip(turned, (expected, expected[:, :1]), strict=True)
    return all(one.shape == other.shape and torch.allclose(one.float(), other) for one, other in both)
