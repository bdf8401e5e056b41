"""H2O as its authors' code really drops entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View


@dataclass(frozen=True, kw_only=True)
class H2OReleased(ScorePolicy):
    """H2O as released (github.com/FMInference/H2O at ac75c2a, h2o_hf/utils_real_drop).

    That code keeps `hh_size` heavy hitters and `recent_size` newest tokens, absolute numbers: budget=tokens
    with their sum, and num_recent=recent_size with recent_fraction=0. Its own default, 1024 + 1024, is
    budget.tokens=2048 with recent_fraction=0.5.

    half_precision_scores: scores are summed in the dtype of the model. In float16 a score of 64 takes
        increments of 1/16 and loses those below 1/32, so heavy hitters stop growing.

    What cannot be had from it: models with grouped queries (its scores have one row per query head and
    its keys one per KV head; here the heads of a group are averaged) and batches (it adds the scores of
    all rows; here each row is on its own). Of equal scores the older goes; there torch.topk decides.
    """

    needs: ClassVar[Needs] = Needs.MASS

    recent_fraction: float = 0.5
    half_precision_scores: bool = True

    @property
    def mass_in_model_dtype(self) -> bool:
        """Whether scores are as coarse as the model's numbers."""
        return self.half_precision_scores

    def score(self, view: View) -> Tensor:
        """Return the attention mass itself."""
        return view.mass.float()
