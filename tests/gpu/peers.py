"""What else decodes the same model, timed by the same clock: the peers that `make gpu-bars` puts beside kvbench.

    GrowingCache    transformers' DynamicCache with its fused attention (sdpa), launched kernel by kernel
    FixedCache      transformers' StaticCache, its decode step by torch.compile(mode="reduce-overhead"), as `generate`
    ReleasedH2O     eager attention with output_attentions, scores added up, the cache cut by gather: the way of the
                    published releases (FMInference/H2O, liuzuyan/ElasticCache), every row on its own
    KvpressProcess  NVIDIA's kvpress, which asks for other versions: its own python and process (kvpress_process.py)

The first three run the stock model over the very weights of kvbench's (`stock_twin`), so tokens can be compared. A peer
that compiles does so in its first launch, which `make gpu-bars` reports apart.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from kvbench.cache.attention import cache_argument
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.tasks.speed import Launch, Marks, synchronised_ms

_SCRIPT = Path(__file__).with_name("kvpress_process.py")


class Peer(Protocol):
    """Takes prompts (B, N) without pads, then one token a row at a time; both return the next logits (B, V)."""

    model: Any

    def prompt(self, ids: Tensor, new_tokens: int) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...


@torch.no_grad()
def timed(peer: Peer, ids: Tensor, new_tokens: int) -> tuple[Launch, Tensor]:
    """Return one launch of a peer, marked where `kvbench.tasks.speed.launch` marks ours, and its tokens (B, N)."""
    prompt, steps = Marks(ids.device), Marks(ids.device)
    with _stock_rotation(peer.model):
        synchronised_ms(ids.device)
        with prompt.around():
            token = peer.prompt(ids, new_tokens).argmax(dim=-1)
        ttft_ms, tokens = prompt.inside_ms(), [token]
        steps.mark()
        for _ in range(new_tokens - 1):
            token = peer.step(token).argmax(dim=-1)
            tokens.append(token)
            steps.mark()
        steps_ms = steps.between_ms()
    return Launch(ttft_ms=ttft_ms, steps_ms=steps_ms), torch.stack(tokens, dim=-1)


def stock_twin(loaded: LoadedModel, spec: ModelSpec, attention: str) -> Any:
    """Return the stock model of a random `spec` with transformers' own `attention`, over the weights of `loaded`.

    The same seed draws the same weights, and then both hold one copy of them.
    """
    twin = load_model(replace(spec, fused=False), str(loaded.device)).model
    ours = dict(loaded.model.named_parameters())
    for name, parameter in twin.named_parameters():
        parameter.data = ours[name].data
    nested = twin.config.get_text_config() is not twin.config
    twin.set_attn_implementation({"text_config": attention} if nested else attention)
    return twin


def other_attention(twin: Any, attention: str) -> Any:
    """Return one more model over the weights of `twin`, with another attention of transformers."""
    shared = {id(tensor): tensor for tensor in chain(twin.parameters(), twin.buffers())}
    model = copy.deepcopy(twin, shared)
    nested = model.config.get_text_config() is not model.config
    model.set_attn_implementation({"text_config": attention} if nested else attention)
    return model


@contextmanager
def _stock_rotation(model: Any) -> Iterator[None]:
    """Inside, the modeling file rotates by its own function: a fused model of ours put another before it."""
    modeling = sys.modules[type(model.get_decoder()).__module__]
    ours = getattr(modeling, "apply_rotary_pos_emb", None)
    if not hasattr(ours, "kvbench_stock"):
        yield
        return
    modeling.apply_rotary_pos_emb = ours.kvbench_stock  # type: ignore[attr-defined, union-attr]
    try:
        yield
    finally:
        modeling.apply_rotary_pos_emb = ours  # type: ignore[attr-defined]


@dataclass(kw_only=True)
class GrowingCache:
    """transformers as it is: a cache that grows by concatenation."""

    model: Any
    _position: Tensor = field(init=False)
    _cache: Any = field(init=False, default=None)

    def prompt(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Take prompts into a new cache."""
        self._cache = DynamicCache(config=self.model.config.get_text_config())
        self._position = torch.arange(ids.shape[1], device=ids.device)[None]
        return self._logits(ids, self.model)

    def step(self, tokens: Tensor) -> Tensor:
        """Take a token of each row."""
        self._position = self._position[:, -1:] + 1
        return self._logits(tokens[:, None], self.model)

    def _logits(self, ids: Tensor, call: Any, **options: Any) -> Tensor:
        output = self._output(ids, call, **options)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _output(self, ids: Tensor, call: Any, **options: Any) -> Any:
        cache = cache_argument(self.model, self._cache)
        return call(input_ids=ids, position_ids=self._position, use_cache=True, logits_to_keep=1, **cache, **options)


@dataclass(kw_only=True)
class FixedCache(GrowingCache):
    """transformers' way to be fast: a cache of fixed length, and the decode step compiled.

    The prompt is not compiled, as in `generate`. One cache serves all launches, because a graph holds its addresses, so
    all must have one shape. backend: that of torch.compile; the tests' needs no compiler.
    """

    backend: str = "inductor"
    _compiled: Any = field(init=False, default=None)
    _shape: tuple[int, int, int] = field(init=False, default=(0, 0, 0))

    def prompt(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Take prompts into the cache, which is emptied; a new one, and a new compilation, for another shape."""
        batch, length = ids.shape
        if self._shape != (batch, length, new_tokens):
            self._shape = (batch, length, new_tokens)
            self._cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=length + new_tokens)
            torch.compiler.reset()
            mode = {"mode": "reduce-overhead"} if self.backend == "inductor" else {}
            self._compiled = torch.compile(self.model.__call__, backend=self.backend, **mode)
        else:
            self._cache.reset()
        self._position = torch.arange(length, device=ids.device)[None]
        return self._logits(ids, self.model)

    def step(self, tokens: Tensor) -> Tensor:
        """Take a token of each row by the compiled step."""
        self._position = self._position[:, -1:] + 1
        torch.compiler.cudagraph_mark_step_begin()
        return self._logits(tokens[:, None], self._compiled)


@dataclass(kw_only=True)
class ReleasedH2O(GrowingCache):
    """H2O as releases write it: maps of all layers are handed out, their columns added up, entries gathered.

    Half of `budget_tokens`, an even number, are the newest, the rest those of highest sum. Scores have the dtype of the
    model. Query heads of a KV head are averaged, rows are on their own: the releases take neither.
    """

    budget_tokens: int
    _scores: list[Tensor] = field(init=False, default_factory=list)

    def prompt(self, ids: Tensor, new_tokens: int) -> Tensor:
        """Take prompts, all maps of attention being held at once, and cut the cache."""
        self._scores = []
        return super().prompt(ids, new_tokens)

    def _logits(self, ids: Tensor, call: Any, **options: Any) -> Tensor:
        output = self._output(ids, call, output_attentions=True)
        received = [self._by_kv_head(rows.sum(dim=2), layer) for rows, layer in self._layers(output.attentions)]
        if self._scores:
            old = self._scores
            received = [
                torch.cat((now[..., :-1] + before, now[..., -1:]), dim=-1)
                for before, now in zip(old, received, strict=True)
            ]
        self._scores = [self._cut(score, layer) for score, layer in self._layers(received)]
        logits: Tensor = output.logits[:, -1]
        return logits

    def _layers(self, values: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        return zip(values, self._cache.layers, strict=True)

    @staticmethod
    def _by_kv_head(received: Tensor, layer: Any) -> Tensor:
        return received.unflatten(1, (layer.keys.shape[1], -1)).mean(dim=2)

    def _cut(self, score: Tensor, layer: Any) -> Tensor:
        """Return the scores (B, H, T') of what stays; the keys and values of `layer` are replaced by theirs."""
        length, recent = score.shape[-1], self.budget_tokens // 2
        if length <= self.budget_tokens:
            return score
        heavy = score[..., :-recent].topk(self.budget_tokens - recent, dim=-1).indices.sort(dim=-1).values
        newest = torch.arange(length - recent, length, device=score.device).expand(*score.shape[:2], recent)
        kept = torch.cat((heavy, newest), dim=-1)
        for name in ("keys", "values"):
            states = getattr(layer, name)
            setattr(layer, name, states.gather(2, kept[..., None].expand(-1, -1, -1, states.shape[-1])))
        return score.gather(-1, kept)


class KvpressProcess:
    """kvpress in a python of its own, one launch at a time, so that launches interleave with ours on one device.

    It draws its own weights of the same architecture, whose text part alone it takes; costs do not depend on them.
    """

    def __init__(self, python: str, spec: ModelSpec, device: str, press: dict[str, Any]) -> None:
        """Start it and load its model. `press`: its class and settings; raises: RuntimeError with what it said."""
        config = dict(spec.config or {})
        asked = {"config": config.get("text_config", config), "dtype": spec.dtype, "device": device, "press": press}
        command = [python, str(_SCRIPT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: dict[str, str] = self._answer(asked)

    def launch(self, batch_size: int, prompt_tokens: int, new_tokens: int) -> Launch:
        """Return one launch."""
        asked = {"batch_size": batch_size, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        return Launch(**self._answer(asked))

    def close(self) -> None:
        """End it; what it held on the device is free then."""
        with suppress(BrokenPipeError):
            self._process.communicate()

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Return its next line; what libraries print on standard output stands before the mark."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        said: list[str] = []
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: dict[str, Any] = json.loads(line.removeprefix("answer "))
                return answer
            said.append(line.strip())
        raise RuntimeError(f"the process of kvpress ended with {self._process.wait()}; it said {' '.join(said[-3:])!r}")
