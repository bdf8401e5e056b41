"""A fused decode step beside the model's own, through the interpreter where there is no GPU."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvbench.cache import Budget, PolicyCache, attach, cache_argument
from kvbench.cache.layer import PolicyLayer
from kvbench.contract.driving import TEXT_SETTINGS, drive, seeded
from kvbench.kernels import decode_step, products
from kvbench.kernels.dispatch import kernels_forced
from kvbench.models import fused
from kvbench.models.fused import fuse
from kvbench.models.spec import FAMILIES, PORTED_FAMILIES, TEXT_FAMILIES
from kvbench.policies.h2o import H2O
from tests.models.checkpoints import text_model
from tests.models.vision_checkpoints import VISION_CHECKPOINTS
from tests.tiny_models import random_tokens, tiny_model

pytest.importorskip("triton", reason="triton is not installed")

ON = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT, STEPS = 5, 1
LONG = pytest.mark.long


def half(name: str) -> Any:
    return copy.deepcopy(tiny_model(name)).to(ON, torch.float16)


def of_one_layer(name: str) -> Any:
    """Return the model in float32 with its first layer alone: the interpreter takes seconds for each."""
    model = half(name).float()
    model.get_decoder().layers = model.get_decoder().layers[:1]
    model.config.num_hidden_layers = 1
    return model


def logits(model: Any, by_kernels: bool, steps: int = STEPS, *, rows: int = 2) -> Tensor:
    cache = PolicyCache(model, H2O(), Budget(fraction=0.5), reserve_tokens=steps)
    with kernels_forced(by_kernels):
        trace = drive(model, cache, random_tokens(1, rows, PROMPT + steps).to(ON), PROMPT)
    return torch.stack(trace.logits).float()


@pytest.mark.parametrize(
    "name", ["llama_gqa", *(pytest.param(name, marks=LONG) for name in ("qwen2", "qwen3", "llava"))]
)
def test_one_row_needs_no_launch_for_norms_and_sums_between_products(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half(name).float()
    exact = logits(copy.deepcopy(model), by_kernels=False, rows=1)
    fuse(model)
    launched: list[str] = []
    for function in ("norm_rows", "add_and_norm_rows", "angle_rows"):
        made = getattr(decode_step, function)

        def noting(*given: Any, name: str = function, made: Any = made) -> Any:
            launched.append(name)
            return made(*given)

        monkeypatch.setattr(decode_step, function, noting)
    torch.testing.assert_close(logits(model, by_kernels=True, rows=1), exact, rtol=1e-4, atol=1e-4)
    alone = launched.count("norm_rows") - STEPS  # the last one of all
    assert (alone, launched.count("add_and_norm_rows"), launched.count("angle_rows")) == (0, 0, STEPS)


@pytest.mark.parametrize(
    ("part", "rows"),
    [("self_attn.q_proj", 1)]
    + [pytest.param(part, 1, marks=LONG) for part in ("self_attn", "mlp", "post_attention_layernorm")]
    + [pytest.param(part, 2, marks=LONG) for part in ("self_attn", "mlp", "input_layernorm")],
)
def test_a_hook_sees_what_the_stock_model_would_show_it(part: str, rows: int) -> None:
    model = of_one_layer("llama_gqa")
    fuse(model)
    found: list[list[Tensor]] = []
    for by_kernels in (False, True):
        seen: list[Tensor] = []
        module = model.get_decoder().layers[0].get_submodule(part)

        def look(module: nn.Module, given: Any, named: Any, output: Any, seen: list[Tensor] = seen) -> None:
            states = given[0] if given else named["hidden_states"]
            seen.extend((states.clone(), (output[0] if isinstance(output, tuple) else output).clone()))

        hook = module.register_forward_hook(look, with_kwargs=True)
        logits(model, by_kernels, rows=rows)
        hook.remove()
        found.append(seen)
    assert len(found[0]) == len(found[1]) == 2 * (1 + STEPS)
    for stock, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.cover("one")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mha", "qwen2", "qwen3", "llava"])
def test_a_fused_step_gives_the_logits_of_the_models_own(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = half(name).to(dtype), half(name).to(dtype)
    fuse(ours)
    launched: list[torch.dtype] = []
    product = products.project_rows
    monkeypatch.setattr(
        products, "project_rows", lambda x, *rest, **more: launched.append(x.dtype) or product(x, *rest, **more)
    )
    exact = logits(copy.deepcopy(plain).double(), by_kernels=False)
    scale = float(exact.norm())
    error = float((logits(ours, by_kernels=True) - exact).norm()) / scale
    stock_error = float((logits(plain, by_kernels=False) - exact).norm()) / scale
    assert set(launched) == {dtype}, "or the model's own step would be compared with itself"
    assert error < 2 * stock_error + (1e-4 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("looks", [False, pytest.param(True, marks=pytest.mark.long)])
def test_keys_are_rotated_as_they_are_written_unless_somebody_looks_at_them_before(
    looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_one_layer("llama_gqa")
    fuse(model)
    exact = logits(model, by_kernels=False)
    apart: list[Tensor] = []
    rotate = decode_step.rotate_now
    monkeypatch.setattr(decode_step, "rotate_now", lambda keys, left: apart.append(keys) or rotate(keys, left))
    monkeypatch.setattr(PolicyLayer, "_turns_by_writing", PolicyLayer._turns_by_writing if not looks else never)
    torch.testing.assert_close(logits(model, by_kernels=True), exact, rtol=1e-4, atol=1e-4)
    assert len(apart) == (STEPS * model.config.num_hidden_layers if looks else 0)


class Adapted(nn.Module):
    """A product with something of its own beside it, as adapters have it."""

    more: Tensor

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("more", torch.linspace(-1, 1, inner.weight.numel()).sin().view_as(inner.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + nn.functional.linear(x, self.more)


def adapt(model: Any, product: str) -> Any:
    for layer in model.get_decoder().layers:
        setattr(layer.self_attn, product, Adapted(getattr(layer.self_attn, product)).to(ON))
    return model


def test_a_layer_in_which_something_was_replaced_or_is_watched_is_not_what_was_fused() -> None:
    model = half("llama_gqa")
    fuse(model)
    layer: Any = model.get_decoder().layers[0]
    twin = copy.deepcopy(layer)
    assert layer._is_as_it_was()
    assert twin._is_as_it_was()
    for module in (layer.self_attn, layer.self_attn.v_proj, layer.mlp, layer.mlp.up_proj, layer.input_layernorm):
        hook = module.register_forward_hook(lambda *_: None)
        assert not layer._is_as_it_was()
        hook.remove()
        assert layer._is_as_it_was()
    adapt(model, "o_proj")
    assert not layer._is_as_it_was()
    assert twin._is_as_it_was()


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("product", ["q_proj", "o_proj"])
def test_a_product_that_was_replaced_after_fusing_gets_and_gives_what_it_does_in_the_stock_model(
    product: str, rows: int
) -> None:
    model = half("llama_gqa").float()
    exact = logits(adapt(copy.deepcopy(model), product), by_kernels=False, rows=rows)
    fuse(model)
    torch.testing.assert_close(logits(adapt(model, product), by_kernels=True, rows=rows), exact, rtol=1e-4, atol=1e-4)


def never(layer: PolicyLayer) -> bool:
    return False


@pytest.mark.parametrize(
    "kind",
    [
        "hunyuan_v1_dense",
        *(pytest.param(kind, marks=LONG) for kind in ("cohere", "ernie4_5", "helium", "ministral3", "nanochat", "phi")),
    ],
)
def test_a_model_that_rotates_otherwise_or_goes_on_with_what_it_rotated_gives_its_own_logits(kind: str) -> None:
    """Norms of turned queries and keys, a factor to the queries, a part of the head only; pairs of neighbours."""
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **TEXT_SETTINGS | heads)
    model = seeded(AutoModelForCausalLM.from_config, config).float().to(ON)
    attach(model)
    exact = logits(copy.deepcopy(model), by_kernels=False)
    fuse(model)
    torch.testing.assert_close(logits(model, by_kernels=True), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in PORTED_FAMILIES])
def test_attention_of_every_supported_family_leaves_the_rotation_to_who_writes(family: str, tmp_path: Path) -> None:
    if family in TEXT_FAMILIES:
        model = text_model(family)
    else:
        model = tiny_model("llava") if family == "llava" else VISION_CHECKPOINTS[family](tmp_path)
    attention = model.get_decoder().layers[0].self_attn
    assert type(attention).__name__ in fused._ATTENTIONS
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)  # of some by another name
    assert rotate is None or fused._turns_halves(getattr(rotate, "kvbench_stock", rotate))


class Looking(PolicyCache):
    """A user's own, which looks at what comes before it is taken in."""

    def update(self, key_states: Tensor, *args: Any, **options: Any) -> Any:
        self.came = [*getattr(self, "came", ()), key_states.clone()]
        return super().update(key_states, *args, **options)


def test_only_a_cache_with_the_librarys_own_update_takes_keys_before_their_rotation() -> None:
    caches: list[Any] = [kind(tiny_model("llama_gqa"), H2O(), Budget(fraction=0.5)) for kind in (PolicyCache, Looking)]
    assert [cache.takes_unturned for cache in caches] == [True, False]
    caches[0].update = lambda *args, **options: caches[1].update(*args, **options)
    assert not caches[0].takes_unturned


@pytest.mark.long
@pytest.mark.parametrize("by_instance", [False, True])
def test_a_users_own_cache_is_given_keys_that_are_rotated(by_instance: bool) -> None:
    model, tokens = half("llama_gqa").float(), random_tokens(1, 2, PROMPT + STEPS).to(ON)
    fuse(model)
    found = []
    for by_kernels in (False, True):
        cache: Any = (PolicyCache if by_instance else Looking)(model, H2O(), Budget(fraction=0.5), reserve_tokens=STEPS)
        if by_instance:
            cache.came = []
            stock = cache.update
            cache.update = lambda keys, *rest, c=cache, u=stock, **more: (
                c.came.append(keys.clone()) or u(keys, *rest, **more)
            )
        with kernels_forced(by_kernels):
            drive(model, cache, tokens, PROMPT)
        found.append(cache.came)
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_a_cache_that_is_not_ours_gets_its_keys_rotated() -> None:
    model, tokens = half("llama_gqa").float(), random_tokens(1, 2, PROMPT + STEPS).to(ON)
    fuse(model)
    found = []
    for by_kernels in (False, True):
        cache = Unattending(config=model.config)
        with kernels_forced(by_kernels), torch.no_grad():
            model.set_attn_implementation("eager")
            model(tokens[:, :PROMPT], **cache_argument(model, cache))
            found.append(model(tokens[:, PROMPT:], **cache_argument(model, cache)).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class Unattending(DynamicCache):
    """A cache that knows nothing of kvbench."""


def test_a_prompt_and_a_cpu_step_run_the_models_own_forward() -> None:
    plain, ours = copy.deepcopy(tiny_model("llama_gqa")), copy.deepcopy(tiny_model("llama_gqa"))
    fuse(ours)
    tokens = random_tokens(1, 2, PROMPT)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, plain(tokens).logits)


def test_every_linear_and_norm_of_the_decoder_is_fused() -> None:
    plain, model = half("llama_gqa"), half("llama_gqa")
    fuse(model)
    stock = dict(plain.get_decoder().named_modules())
    modules = model.get_decoder().named_modules()
    with_own = {name for name, module in modules if type(module) is not type(stock[name])}
    for layer in range(model.config.num_hidden_layers):
        assert {f"layers.{layer}.self_attn.{part}_proj" for part in "qkvo"} <= with_own
        assert {f"layers.{layer}.mlp", f"layers.{layer}.self_attn"} <= with_own
        assert {f"layers.{layer}", f"layers.{layer}.input_layernorm"} <= with_own


def test_a_projection_that_is_asked_with_another_input_computes_anew() -> None:
    model = half("llama_gqa")
    attention = model.get_decoder().layers[0].self_attn
    stock = copy.deepcopy(attention)
    fuse(model)
    one, other = (torch.randn(1, 1, 32).to(ON, torch.float16) for _ in range(2))
    with torch.no_grad(), kernels_forced(True):
        attention.q_proj(one)
        torch.testing.assert_close(attention.k_proj(other), stock.k_proj(other), atol=1e-2, rtol=1e-2)
        attention.q_proj(one)
        torch.testing.assert_close(attention.k_proj(one), stock.k_proj(one), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(attention.v_proj(one), stock.v_proj(one), atol=1e-2, rtol=1e-2)


def test_a_copy_of_a_fused_model_computes_with_its_own_weights() -> None:
    model = half("llama_gqa")
    fuse(model)
    twin, x = copy.deepcopy(model), torch.randn(1, 1, 32).to(ON, torch.float16)
    ours, theirs = (copied.get_decoder().layers[0] for copied in (model, twin))
    with torch.no_grad(), kernels_forced(True):
        before = [ours.self_attn.q_proj(x), ours.self_attn.k_proj(x), ours.mlp(x)]
        for parameter in twin.parameters():
            parameter.zero_()
        after = [ours.self_attn.q_proj(x), ours.self_attn.k_proj(x), ours.mlp(x)]
        zeros = [theirs.self_attn.q_proj(x), theirs.self_attn.k_proj(x), theirs.mlp(x)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(bool(zero.any()) for zero in zeros)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 3), (0, 1)])
def test_embeddings_are_found_for_tokens_of_any_shape(shape: tuple[int, ...]) -> None:
    model, tokens = half("llama_gqa"), random_tokens(1, *shape).to(ON)
    stock = model.get_input_embeddings()(tokens)
    fuse(model)
    with kernels_forced(True):
        assert torch.equal(model.get_input_embeddings()(tokens), stock)


@pytest.mark.long
def test_a_fused_model_is_freed_as_soon_as_it_is_let_go() -> None:
    model = half("llama_gqa")
    fuse(model)
    logits(model, by_kernels=True, steps=1)
    parts = [weakref.ref(module) for module in model.get_decoder().layers[0].modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


def test_a_model_is_fused_once() -> None:
    once = half("llama_gqa")
    fuse(once)
    kinds = [type(module) for module in once.modules()]
    fuse(once)
    assert [type(module) for module in once.modules()] == kinds


class Noisy(nn.Linear):
    """Does more than to multiply by its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_what_only_derives_from_linear_keeps_its_own_forward() -> None:
    model = half("llama_gqa")
    layer = model.get_decoder().layers[0]
    for linear in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.up_proj, model.lm_head):
        linear.__class__ = Noisy
    stock, x = copy.deepcopy(layer), torch.randn(1, 1, 32).to(ON, torch.float16)
    fuse(model)
    assert type(model.lm_head) is Noisy
    with torch.no_grad(), kernels_forced(True):
        for name in ("q_proj", "k_proj", "o_proj"):
            got, want = getattr(layer.self_attn, name)(x), getattr(stock.self_attn, name)(x)
            torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(layer.mlp(x), stock.mlp(x), atol=1e-2, rtol=1e-2)


def test_weights_of_another_type_than_the_input_are_left_to_the_models_own() -> None:
    model = half("llama_gqa")
    fuse(model)
    layer = model.get_decoder().layers[0]
    layer.self_attn.v_proj.to(torch.bfloat16)
    layer.mlp.up_proj.to(torch.bfloat16)
    x = torch.randn(1, 1, 32).to(ON, torch.float16)
    with torch.no_grad(), kernels_forced(True):
        assert layer.self_attn.q_proj(x).dtype == torch.float16
        for part in (layer.self_attn.v_proj, layer.mlp):
            with pytest.raises(RuntimeError, match="dtype"):
                part(x)


def test_the_kernel_turns_in_fused_attention_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """`model.fused=false` after a fused model: the function that both models call by name does as it did."""
    asked: list[bool] = []

    def stock(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        return apply_rotary_pos_emb(q, k, cos, sin) if isinstance(q, Tensor) else ("stock", q)

    modeling = SimpleNamespace(apply_rotary_pos_emb=stock)
    fused._rotate_by_kernel(modeling)
    monkeypatch.setattr(fused, "use_triton", lambda q: asked.append(True))
    q, table = HalfOnCuda(shape=(1, 2, 1, 8)), HalfOnCuda(shape=(1, 1, 8))

    class Attention(nn.Module):
        def forward(self) -> Any:
            return modeling.apply_rotary_pos_emb(q, q, table, table)

    plain, other = Attention(), Attention()
    fused._extend(other, fused._Attention)
    assert plain() == ("stock", q)
    assert not asked, "no kernel was even thought of"
    other()
    assert asked == [True]
    assert plain() == ("stock", q)
    assert asked == [True]


def test_a_rotation_that_is_called_otherwise_is_left_as_it_is() -> None:
    for stock in (
        lambda x, cos, sin: x,
        lambda x, cos, sin, dim=1: x,
        lambda q, k, cos, sin: (q, k, k),
        lambda q, k, cos, sin: (q[..., :4], k[..., :4]),
        lambda q, k, cos, sin: apply_rotary_pos_emb(q, k, cos, -sin),
    ):
        modeling = SimpleNamespace(apply_rotary_pos_emb=stock)
        fused._rotate_by_kernel(modeling)
        assert modeling.apply_rotary_pos_emb is stock


def test_an_attention_that_fails_leaves_the_flag_as_it_was() -> None:
    class Attention(nn.Module):
        def forward(self) -> Any:
            assert fused._fused_attention.get() is not None
            raise ValueError("no room")

    attention = fused._extend(Attention(), fused._Attention)
    with pytest.raises(ValueError, match="no room"):
        attention()
    assert fused._fused_attention.get() is None


@dataclass(frozen=True)
class HalfOnCuda:
    """What the rotary function asks of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float16
    is_cuda: bool = True

    def element_size(self) -> int:
        return 2
