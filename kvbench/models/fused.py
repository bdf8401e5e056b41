"""Fused kernels for the decode step of an unmodified model: projections, gated MLP, RMSNorm and RoPE.

Modules keep their weights and their own forward: an instance becomes one of a subclass that takes a
decode step on a GPU, and hands everything else on. The same for the full cache and
for every policy. In layers that are known to be norm, attention, sum, norm, MLP, sum, a sum and the norm after
it are one launch. Set `model.fused=false` to do without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvbench.cache.attention import CACHE_NAMES
from kvbench.cache.positions import FIXED_ROPE_TYPES
from kvbench.kernels.dispatch import Norm, is_decode_row, leave_unturned, use_triton

_SILU = ("SiLU", "SiLUActivation")
_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_OF_TEXT = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
_ANGLES = ("LlamaRotaryEmbedding", "MistralRotaryEmbedding", "Qwen2RotaryEmbedding", "Qwen3RotaryEmbedding")
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
    rotary = getattr(decoder, "rotary_emb", None)
    if type(rotary).__name__ in _ANGLES and getattr(rotary, "rope_type", None) in FIXED_ROPE_TYPES:
        _extend(rotary, _Angles)
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
            extended = _extend(layer, _Layer)
            extended.kvbench_after = [after]  # a list, which is no submodule
            extended.kvbench_is_known = _is_known(layer)
            extended.kvbench_within = _within(layer)


def _is_known(layer: Any) -> bool:
    """Whether all that it multiplies is multiplied here, and nothing comes between a norm and the product after it."""
    first, last = (getattr(layer.self_attn, name, None) for name in ("q_proj", "o_proj"))
    products = isinstance(first, _FirstProduct) and isinstance(last, _Product) and isinstance(layer.mlp, _GatedMlp)
    is_theirs = type(layer.self_attn).__module__.startswith("transformers.models.")
    return products and is_theirs and type(layer.self_attn).__name__ in _OF_TEXT


def _within(layer: Any) -> list[nn.Module]:
    """Return the modules of a layer, and what is in its attention and its MLP; dicts, because every step asks."""
    parts = (layer, layer.self_attn, layer.mlp)
    return [module for part in parts for module in part._modules.values() if module is not None]


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


class _End(NamedTuple):
    """What a product does at its end: it is added to `before` (B, 1, N), or may be left in parts to be added up."""

    before: Tensor | None = None
    in_parts: bool = False


_AS_IT_IS, _IN_PARTS = _End(), _End(in_parts=True)


@contextmanager
def _ending(product: Any, end: _End) -> Iterator[None]:
    """Inside, a `_Product` or a `_GatedMlp` makes `end` of its output; nothing is told where that is what it is."""
    if end is _AS_IT_IS:
        yield
        return
    product.kvbench_end = end
    try:
        yield
    finally:
        product.kvbench_end = _AS_IT_IS


_NORM = "kvbench_norm"


def _unnormed(states: Tensor, norm: _Norm) -> Tensor:
    """Return `states`, which tell the products that take the very same object of the norm before them."""
    waiting = states.view_as(states)
    setattr(waiting, _NORM, Norm(norm.weight, norm.variance_epsilon))
    return waiting


def _normed(x: Tensor) -> Tensor:
    """Return `x` after the norm that waits, if one does."""
    norm: Norm | None = getattr(x, _NORM, None)
    if norm is None:
        return x
    from kvbench.kernels.decode_step import norm_rows

    return norm_rows(x, norm.weight, norm.epsilon)


class _Rows(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1:] != (1,) or not use_triton(self.weight):
            return super().forward(tokens)
        return self.weight[tokens]  # the library's own way to a few rows takes five times as long


class _Angles(nn.Module):
    inv_freq: Tensor
    attention_scaling: float

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = self.inv_freq
        plain = frequencies.dtype == torch.float32 and frequencies.device == position_ids.device == x.device
        if not (plain and position_ids.ndim == 2 and position_ids.shape[1] == 1 and use_triton(x)):
            stock: tuple[Tensor, Tensor] = super().forward(x, position_ids)
            return stock
        from kvbench.kernels.decode_step import angle_rows

        return angle_rows(x, position_ids, frequencies, self.attention_scaling)


class _Product(nn.Linear):
    kvbench_end = _AS_IT_IS

    def forward(self, x: Tensor) -> Tensor:
        end, self.kvbench_end = self.kvbench_end, _AS_IT_IS
        if not _takes(x, self.weight):
            output = super().forward(x)
            return output if end.before is None else end.before + output
        from kvbench.kernels.products import project_rows

        return project_rows(x, [self.weight], [self.bias], before=end.before, in_parts=end.in_parts)[0]


class _FirstProduct(nn.Linear):
    kvbench_others: list[nn.Linear]
    kvbench_left: dict[int, tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        linears = [self, *self.kvbench_others]
        if not _takes(x, *(linear.weight for linear in linears)):
            return super().forward(_normed(x))
        from kvbench.kernels.products import project_rows

        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        outputs = project_rows(x, weights, biases, norm=getattr(x, _NORM, None))
        self.kvbench_left.update({number: (x, outputs[number]) for number in range(1, len(outputs))})
        return outputs[0]


class _LaterProduct(nn.Linear):
    kvbench_number: int
    kvbench_left: dict[int, tuple[Tensor, Tensor]]

    def forward(self, x: Tensor) -> Tensor:
        made_from, output = self.kvbench_left.pop(self.kvbench_number, (None, x))
        return output if made_from is x else super().forward(_normed(x))


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
    kvbench_end = _AS_IT_IS

    def forward(self, x: Tensor) -> Tensor:
        end, self.kvbench_end = self.kvbench_end, _AS_IT_IS
        gate, up, down = (getattr(self, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        if not _takes(x, gate, up, down):
            stock: Tensor = super().forward(_normed(x))
            return stock if end.before is None else end.before + stock
        from kvbench.kernels.products import gated_rows, project_rows

        gated = gated_rows(x, gate, up, getattr(x, _NORM, None))
        return project_rows(gated, [down], [None], before=end.before, in_parts=end.in_parts)[0]


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
    """Norm, attention, sum, norm, MLP, sum.

    Of one row the norms are made by the products after them, and the sums by the products before. Of several rows a sum
    and the norm after it are one launch, which adds up the parts that a product may leave.
    """

    input_layernorm: _Norm
    post_attention_layernorm: _Norm
    self_attn: nn.Module
    mlp: nn.Module
    kvbench_after: list[_Norm]
    kvbench_is_known: bool
    kvbench_within: list[nn.Module]

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        first, norm, after = self.input_layernorm, self.post_attention_layernorm, self.kvbench_after[0]
        if args or _has_hooks(norm) or not _takes(hidden_states, first.weight, norm.weight):
            return super().forward(hidden_states, *args, **options)
        is_known = self._is_as_it_was()
        if is_known and hidden_states.shape[0] == 1:
            return self._one_row(hidden_states, options)
        if not _takes(hidden_states, after.weight):
            return super().forward(hidden_states, *args, **options)
        from kvbench.kernels.decode_step import add_and_norm_rows

        end = _IN_PARTS if is_known else _AS_IT_IS
        attended = self._attended(first(hidden_states), end, options)
        between, normed = add_and_norm_rows(hidden_states, attended, norm.weight, norm.variance_epsilon)
        total, ready = add_and_norm_rows(between, self._through_mlp(normed, end), after.weight, after.variance_epsilon)
        after.kvbench_made = (total, ready)
        return total

    def _one_row(self, hidden_states: Tensor, options: dict[str, Any]) -> Tensor:
        asked = len(self.self_attn._forward_pre_hooks) > 0  # a policy reads what attention is given
        given = self.input_layernorm(hidden_states) if asked else _unnormed(hidden_states, self.input_layernorm)
        between = self._attended(given, _End(before=hidden_states), options)
        return self._through_mlp(_unnormed(between, self.post_attention_layernorm), _End(before=between))

    def _attended(self, given: Tensor, end: _End, options: dict[str, Any]) -> Tensor:
        with _ending(getattr(self.self_attn, "o_proj", None), end):
            attended: Tensor = self.self_attn(hidden_states=given, **options)[0]
        return attended

    def _through_mlp(self, given: Tensor, end: _End) -> Tensor:
        with _ending(self.mlp, end):
            output: Tensor = self.mlp(given)
        return output

    def _is_as_it_was(self) -> bool:
        """Whether nothing in it was replaced, and nobody sees more than what attention is given.

        What lies between two products is not what it is in the stock model.
        """
        attention, now = self.self_attn, _within(self)
        if not self.kvbench_is_known or attention._forward_hooks or now != self.kvbench_within:
            return False
        return not any(_has_hooks(module) for module in now if module is not attention)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
