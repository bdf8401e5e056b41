"""Figures of a report, made with matplotlib: every one by name, what it shows, how it is read and what it needs.

Nothing is drawn here and matplotlib is not imported, so that `kvbench plot --help` is quick; `draw` draws.
"""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = ("svg", "pdf", "png")
STYLES = ("light", "dark")
# Inches, and points of ordinary text. `page` is drawn for a screen, the others for the columns of a paper.
WIDTHS = {"page": (10.0, 9.0), "double": (7.0, 8.0), "single": (3.4, 7.0)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FigureKind:
    """One kind of figure; it is not drawn where a group has nothing of what it `needs`."""

    name: str
    title: str
    summary: str
    caption: str
    needs: str
    takes_measures: bool


_KINDS = (
    FigureKind(
        name="quality", title="Quality against budget",
        summary="each quality measure over the budget, a line with its 95 % band per policy, full as reference",
        caption="Quality against budget. Bands are 95 % intervals over samples; the dashed line is the full cache with "
        "its own. Ticks are budget settings, points stand at the budget really kept where that is near its setting. "
        "Daggers are failed cells.",
        needs="a quality measure and a cell with a budget", takes_measures=True,
    ),
    FigureKind(
        name="pareto", title="Quality against cost",
        summary="quality over KV bytes and over TPOT with both intervals, the Pareto front drawn",
        caption="Quality against the KV bytes stored and against the time per output token. Bars are 95 % intervals in "
        "both directions. The grey line is the Pareto front: no other cell has both lower cost and better quality; its "
        "points are larger, ringed and carry their budget. Thin lines join the budgets of one policy. Cells whose "
        "timing was noisy are pale and never on the front over time.",
        needs="a quality measure, and KV bytes or TPOT", takes_measures=True,
    ),
    FigureKind(
        name="latency", title="Where the time goes",
        summary="TTFT, TPOT (p50, p90) with the policy's own time and the memory roof, share of it (MBU), to full",
        caption="Time to first token and per output token; lines through the points are 95 % intervals over runs. "
        "Bars are the policy's own part of it. The thick tick is the memory roof: on a GPU no step can be faster. The "
        "thin tick below a point is the 90th percentile of TPOT. Ratios compare with the full cache in the same "
        "process; the dashed line at 1 is its speed. Pale cells were noisy. n counts runs.",
        needs="the speed task", takes_measures=False,
    ),
    FigureKind(
        name="memory", title="Where the bytes are",
        summary="the peak in its parts (weights, activations, KV, the rest), peaks by phase, KV stored and nominal",
        caption="Left: weights, activations of the model without a cache (vision inside), KV stored at the end, and "
        "what of the measured peak (tick) is none of these: attention statistics, inputs, bookkeeping. The parts need "
        "not be alive at once, so the tick may lie inside the bar. Middle: peak of each phase above the weights. "
        "Right: KV stored (bar) and what the budget implies (tick).",
        needs="the memory task", takes_measures=False,
    ),
    FigureKind(
        name="entries", title="Entries held while decoding",
        summary="cache entries at every decode step, a panel per policy",
        caption="Entries per layer and KV head over the tokens seen, mean over layers and the rows still answering; "
        "the shade reaches up to the fullest. A line ends (mark) where the last answer ended. "
        "The square marks the full cache.",
        needs="the generation task", takes_measures=False,
    ),
    FigureKind(
        name="differences", title="Which samples collapse",
        summary="every sample's difference to the full cache, and the share of samples at or below each value",
        caption="Left: each column is one sample, its dots the policies' differences to the full cache on it; the "
        "samples that lose most, over all cells, stand on the left. Right: share of samples at or below each "
        "difference. The dashed line is no difference.",
        needs="per-sample scores of the full cache and of a cell with a budget", takes_measures=True,
    ),
    FigureKind(
        name="capacity", title="Throughput and the largest batch",
        summary="throughput over the batch, and the largest batch that fits, per policy",
        caption="Left: tokens per second of a whole run over the prompts that run together, with 95 % intervals. "
        "Right: the largest batch that fits, full as reference.",
        needs="the capacity task, or the speed task at several batch sizes", takes_measures=False,
    ),
    FigureKind(
        name="frontier", title="The smallest safe budget",
        summary="per policy the smallest budget shown to be as good as full at a margin, and every budget looked at",
        caption="Per policy the smallest budget at which quality was shown to be at most the margin worse than with "
        "the full cache (mark and number). The thick line is where the true one may lie, from the budget above the "
        "largest that was shown to be worse. Small marks below are the budgets that were looked at, and what they "
        "showed.",
        needs="a file that kvbench frontier wrote", takes_measures=True,
    ),
)  # fmt: skip
FIGURES = {kind.name: kind for kind in _KINDS}
