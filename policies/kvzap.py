"""KVzap: KVzip's judgement of a token, told from its hidden states alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import Calibrated, Layout, Needs, Sample, ScorePolicy, View
from kvbench.errors import ConfigError

_LEAST = 1e-12  # of a score, whose logarithm is learnt


@dataclass(frozen=True, kw_only=True)
class KVzap(Calibrated, ScorePolicy):
    """Keep the entries of highest predicted log score of KVzip+, one linear map of the hidden state for each layer.

    Source: the linear variant of KVzap (arXiv 2601.07891; KVzapPress and kvzap/train.py of kvpress,
    github.com/NVIDIA/kvpress at 8bb29b9): ridge regression with an intercept from what the layer's attention is given
    of a token to the logarithm of the token's KVzip+ score in each KV head (`KVzipPlus`). A token is judged once, when
    it comes, so that prompts are cut and entries freed at decode alike, and nothing is read of attention.

    Differs in: the release drops what falls below a threshold (-4) once it left a window of 128 tokens, so that its
    size is an outcome; here the budget sets the threshold, one for all heads of all layers by the allocation
    global_threshold, and the window is `num_recent`. The map is learnt here, by kvbench calibrate kvzap, exactly and
    from every token of the data set's prompts, where the released weights saw 500 tokens of each of some 4,500 texts of
    750 to 1,250 tokens; the default there is a two-layer network of 512. Shares of attention are of sinks, chunk and
    repetition, as in KVzip.
    """

    needs: ClassVar[Needs] = Needs.ARTEFACT | Needs.HIDDEN
    learns_from: ClassVar[Needs] = Needs.HIDDEN | Needs.REPEATED
    repeated_as: ClassVar[Literal["attention", "output"]] = "output"

    num_sinks: int = 4
    num_recent: int = 32
    ridge: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0.0:
            raise ConfigError(f"policy.ridge is {self.ridge:g}; it must be above 0")

    def shapes(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Name the map, (H, E), and its intercept, (H,)."""
        return {"weight": (layout.num_heads, layout.hidden), "bias": (layout.num_heads,)}

    def gather(self, sample: Sample) -> Mapping[str, Tensor]:
        """Sum x x' and x y' of the hidden states x, to which a 1 is joined, and the log scores y; without pads."""
        states = sample.hidden[sample.real].double()
        states = torch.cat((states, states.new_ones(len(states), 1)), dim=-1)
        targets = sample.repeated.transpose(1, 2)[sample.real].double().clamp(min=_LEAST).log()
        return {"squares": states.T @ states, "products": states.T @ targets}

    def learn(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the ridge regression; the intercept is not held down."""
        squares = sums["squares"].clone()
        squares.diagonal()[:-1] += self.ridge
        found = torch.linalg.solve(squares, sums["products"])
        return {"weight": found[:-1].T.float().contiguous(), "bias": found[-1].float().contiguous()}

    def note(self, view: View) -> Tensor:
        """Return the predicted log scores (B, H, T) of tokens that arrive."""
        return (
            torch.matmul(view.artefact["weight"], view.hidden.float().transpose(1, 2)) + view.artefact["bias"][:, None]
        )

    def score(self, view: View) -> Tensor:
        """Return what was noted."""
        return view.noted
