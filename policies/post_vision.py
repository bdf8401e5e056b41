"""VL-Cache's score: what the queries after the picture look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import Needs, ScorePolicy, View, When


@dataclass(frozen=True, kw_only=True)
class PostVision(ScorePolicy):
    """Keep what the queries after the picture attend to most, a tenth of the budget being the newest tokens.

    Source: VL-Cache (arXiv 2410.23317, Sec. 4.2): the rows of all queries behind the last picture token are summed per
    head; the yaml's allocation divides the layers by their density (Sec. 4.1). The prompt is cut, what is generated
    stays. Differs in: of those queries the last `window_tokens` are read; the query heads of a KV head are averaged
    (EffiVLM-Bench 9cd861a sums them, the same order); the window of 10 % is of the layer's budget and within it (there
    beside it). Where nothing follows the picture the newest query alone is read. Only for prompts with a picture.
    """

    needs: ClassVar[Needs] = Needs.WINDOW | Needs.PICTURE
    when: ClassVar[When] = When.PREFILL
    window_tokens: ClassVar[int] = 128

    recent_fraction: float = 0.1

    def score(self, view: View) -> Tensor:
        """Return the sum of the rows after the last picture token that is held."""
        newest = view.seen[:, None]
        query = newest - torch.arange(view.window.shape[2], 0, -1, device=newest.device)
        last = torch.where(view.picture, view.position, -1).amax(dim=(1, 2))
        read = (query > last[:, None]) | (query == newest - 1)
        return (view.window * read[:, None, :, None]).sum(dim=2)
