"""Fast KVzip: a small gate on the hidden states that says what KVzip would keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from kvbench.cache import Calibrated, Layout, Needs, Sample, ScorePolicy, View
from kvbench.errors import ConfigError

_WIDTH, _SINKS = 16, 16  # numbers of the gate's queries and keys, and keys that stand for all other tokens
_BATCH, _RATE, _MOMENTUM, _ROOT_EPSILON = 1000, 0.2, 0.9, 1e-6


@dataclass(frozen=True, kw_only=True)
class FastKVzip(Calibrated, ScorePolicy):
    """Keep the entries that a low-rank attention of each token with itself, against learnt sinks, gives most.

    Source: Fast KVzip (arXiv 2601.17668; Janghyun1230/FastKVzip at 7d78b34, optim.py and math/method): of the hidden
    state h that the layer's attention is given, queries q_g = norm(W_q h + b_q) of 16 numbers for each query head and a
    key k = norm(W_k h) for each KV head; with learnt sinks s and an offset o_g a token's score is the mean over the
    group of 1 / (1 + sum over s of exp(q_g s / 4 - q_g k / 4 - o_g)). It is trained, each layer by itself, to tell the
    KVzip score (arXiv 2505.23416), by binary cross entropy and gradient descent with momentum at rate 0.2, a hundredth
    of the steps to warm up, half the rate from the middle on, a quarter from three quarters on, 1,000 tokens a step.
    A token is judged once, when it comes. One threshold holds for all heads of all layers, at prompt and decode: the
    allocation global_threshold, which the yaml names.

    Differs in: gates are trained here, by kvbench calibrate fast_kvzip, `epochs` times over `tokens_per_text` tokens
    of each of the data set's prompts, where the released ones saw 5,000 steps over 34 long texts; their training adds
    the offset twice, their use once, as here; the window is the 8 tokens of their decoding, at prompts too (2 % there).
    """

    needs: ClassVar[Needs] = Needs.ARTEFACT | Needs.HIDDEN
    learns_from: ClassVar[Needs] = Needs.HIDDEN | Needs.REPEATED

    num_sinks: int = 4
    num_recent: int = 8
    tokens_per_text: int = 512
    epochs: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens_per_text", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy.{name} is {getattr(self, name)}; it must be at least 1")

    def shapes(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Name the gate's weights: of G query heads and a KV head, for each of H."""
        heads, group, hidden = layout.num_heads, layout.group, layout.hidden
        return {
            "query": (heads, group, _WIDTH, hidden),
            "query_bias": (heads, group, _WIDTH),
            "query_norm": (_WIDTH,),
            "key": (heads, _WIDTH, hidden),
            "key_norm": (_WIDTH,),
            "sinks": (heads, _SINKS, _WIDTH),
            "offset": (heads, group),
        }

    def gather(self, sample: Sample) -> Mapping[str, Tensor]:
        """Take some tokens of each text, evenly spaced: their hidden states (N, E) and KVzip scores (N, H)."""
        heads = sample.keys.shape[1]
        states, scores = [], []
        for row, real in enumerate(sample.real):
            at = real.nonzero()[:, 0]
            at = at[torch.linspace(0, len(at) - 1, min(len(at), self.tokens_per_text), device=at.device).round().long()]
            states.append(sample.hidden[row, at].float())
            scores.append(sample.repeated[row][:, at].T.float())
        group = torch.full((1, heads), float(sample.query.shape[1] // heads), device=at.device)
        return {"states": torch.cat(states), "scores": torch.cat(scores), "group": group}

    def together(self, before: Tensor, more: Tensor) -> Tensor:
        """Keep the examples of all batches."""
        return torch.cat((before, more))

    @torch.inference_mode(False)
    @torch.enable_grad()
    def learn(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Train the gate of a layer; the same every time on the same machine."""
        states, scores = sums["states"].clone(), sums["scores"].clone().clamp(0.0, 1.0)
        heads, group, hidden = scores.shape[1], int(sums["group"][0, 0]), states.shape[1]
        generator = torch.Generator().manual_seed(self.seed)

        def drawn(*shape: int) -> Tensor:  # as torch.nn.Linear begins
            return (torch.rand(shape, generator=generator) * 2 - 1).div_(hidden**0.5).to(states.device)

        gate = {
            "query": drawn(heads, group, _WIDTH, hidden),
            "query_bias": drawn(heads, group, _WIDTH),
            "query_norm": torch.ones(_WIDTH, device=states.device),
            "key": drawn(heads, _WIDTH, hidden),
            "key_norm": torch.ones(_WIDTH, device=states.device),
            "sinks": torch.zeros(heads, _SINKS, _WIDTH, device=states.device),
            "offset": torch.zeros(heads, group, device=states.device),
        }
        for one in gate.values():
            one.requires_grad_()
        optimizer = torch.optim.SGD(gate.values(), lr=_RATE, momentum=_MOMENTUM)
        per_epoch = -(-len(states) // _BATCH)
        for step in range(self.epochs * per_epoch):
            if step % per_epoch == 0:
                order = torch.randperm(len(states), generator=generator).to(states.device)
            chosen = order[step % per_epoch * _BATCH :][:_BATCH]
            optimizer.param_groups[0]["lr"] = _RATE * _share_of_rate(step, self.epochs * per_epoch)
            optimizer.zero_grad()
            told = gated(gate, states[chosen][None])[0].T
            functional.binary_cross_entropy(told, scores[chosen], reduction="none").mean(dim=0).sum().backward()
            optimizer.step()
        return {name: one.detach() for name, one in gate.items()}

    def note(self, view: View) -> Tensor:
        """Return what the gate says (B, H, T) of tokens that arrive."""
        return gated(view.artefact, view.hidden.float())

    def score(self, view: View) -> Tensor:
        """Return what was noted."""
        return view.noted


def gated(gate: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Return the scores (B, H, T), in 0 to 1, of hidden states (B, T, E)."""
    query = torch.einsum("bte,hgwe->bhtgw", states, gate["query"]) + gate["query_bias"][:, None]
    key = torch.einsum("bte,hwe->bhtw", states, gate["key"])
    query, key = _normed(query, gate["query_norm"]), _normed(key, gate["key_norm"])
    own = (query * key[:, :, :, None]).sum(dim=-1) / _WIDTH**0.5 + gate["offset"][:, None]
    others = torch.einsum("bhtgw,hsw->bhtgs", query, gate["sinks"]) / _WIDTH**0.5
    return torch.sigmoid(own - others.logsumexp(dim=-1)).mean(dim=-1)


def _normed(states: Tensor, weight: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().mean(dim=-1, keepdim=True) + _ROOT_EPSILON) * weight


def _share_of_rate(step: int, num_steps: int) -> float:
    if step < 0.01 * num_steps:
        return min(1.0, 0.01 * step)
    return 0.25 if step >= 0.75 * num_steps else 0.5 if step >= 0.5 * num_steps else 1.0
