"""Fused kernels for the decode step of an unmodified model: projections, gated MLP, RMSNorm and RoPE.

Modules keep their weights and their own forward; an instance's forward is put in front that takes a
decode step on a GPU in half precision, and hands everything else on. The same for the full cache and
for every policy. RMSNorm and RoPE come from liger-kernel where it is installed, the products of a few
rows with a matrix from `kvbench.kernels`. Set `model.fused=false` to do without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from kvbench.kernels.dispatch import is_decode_row, use_triton

_SILU = ("SiLU", "SiLUActivation")


def fuse(model: Any) -> None:
    """Put the fused decode step before the forwards of `model`'s text part; prefill is left as it is."""
    decoder = model.get_decoder()
    for module in decoder.modules():
        if all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj")):
            _share_input([module.q_proj, module.k_proj, module.v_proj])
            _product_alone(module.o_proj)
        elif _is_gated_mlp(module):
            _gated(module)
        elif type(module).__name__.endswith("RMSNorm") and liger_installed():
            _normalised(module)
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        _product_alone(head)
    if liger_installed():
        _rotate_by_liger(sys.modules[type(decoder).__module__])


@cache
def liger_installed() -> bool:
    """Return whether liger-kernel can be imported."""
    return find_spec("liger_kernel") is not None


def _share_input(linears: Sequence[nn.Linear]) -> None:
    """Let the first of `linears` compute all of them in one launch; the others hand out what it left."""
    if len({linear.bias is None for linear in linears}) > 1:
        return
    left: dict[int, tuple[Tensor, Tensor]] = {}

    def first(x: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
        from kvbench.kernels.linear import project_rows

        outputs = project_rows(x, [linear.weight for linear in linears], [linear.bias for linear in linears])
        left.update({number: (x, output) for number, output in enumerate(outputs)})
        return left.pop(0)[1]

    def later(number: int) -> Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]:
        def hand_out(x: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
            made_from, output = left.pop(number, (None, x))
            return output if made_from is x else stock(x)

        return hand_out

    for number, linear in enumerate(linears):
        _put_before(linear, later(number) if number else first)


def _product_alone(linear: nn.Linear) -> None:
    def product(x: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
        from kvbench.kernels.linear import project_rows

        return project_rows(x, [linear.weight], [linear.bias])[0]

    _put_before(linear, product)


def _is_gated_mlp(module: nn.Module) -> bool:
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    without_bias = all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears)
    return without_bias and type(getattr(module, "act_fn", None)).__name__ in _SILU


def _gated(mlp: Any) -> None:
    def both(x: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
        from kvbench.kernels.linear import gated_rows, project_rows

        return project_rows(gated_rows(x, mlp.gate_proj.weight, mlp.up_proj.weight), [mlp.down_proj.weight], [None])[0]

    _put_before(mlp, both)


def _normalised(norm: Any) -> None:
    def normalised(x: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
        if not x.is_cuda:  # liger's kernels do not run in the interpreter
            return stock(x)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        output: Tensor = LigerRMSNormFunction.apply(x, norm.weight, norm.variance_epsilon, 0.0, "llama", False)
        return output

    _put_before(norm, normalised)


def _put_before(module: Any, fused: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> None:
    stock = module.forward

    def forward(x: Tensor) -> Tensor:
        return fused(x, stock) if is_decode_row(x) else stock(x)

    module.forward = forward


def _rotate_by_liger(modeling: Any) -> None:
    """Put liger's RoPE before the modeling file's own function, which models call by name, not by instance."""
    stock = getattr(modeling, "apply_rotary_pos_emb", None)
    if stock is None or hasattr(stock, "kvbench_stock"):
        return

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        whole = cos.shape[-1] == q.shape[-1]
        half = q.is_cuda and q.element_size() == 2
        if q.shape[2] != 1 or rest or options or not whole or not half or not use_triton(q):
            return stock(q, k, cos, sin, *rest, **options)
        from liger_kernel.ops.rope import LigerRopeFunction

        return LigerRopeFunction.apply(q, k, cos, sin)

    apply_rotary_pos_emb.kvbench_stock = stock  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = apply_rotary_pos_emb
