"""What every measurement is: its unit, which way is better, its names, and how it is printed.

One registry, so that a table, a plot and the page's glossary can not disagree, which makes the file long. Values
are stored in base units (bytes, milliseconds, fractions of one); only printing scales them.

    >>> format_with_interval("ppl", 1.2345, 1.1, 1.36)
    '1.234 [1.100, 1.360]'
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from kvbench.errors import ConfigError, close_matches, did_you_mean, near_names

Better = Literal["higher", "lower", "none"]
_Counts = Literal["tokens", "entries", "prompts"]
_Rates = Literal["tokens/s", "bytes/s"]
Unit = Literal["score", "fraction", "ratio", "ppl", "nats/token", "ms", "bytes", _Counts, _Rates]

MISSING = "-"
_BYTE_SCALES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
_SUFFIXES = {
    "nats/token": " nats",
    "tokens/s": " tok/s",
    "tokens": " tokens",
    "prompts": " prompts",
    "bytes/s": " TB/s",
    "ms": " ms",
    "fraction": " %",
    "ratio": "x",
}
_OBSERVED = ("roof_share_fraction", "full_roof_share_fraction", "foreign_gpu_processes", "timing_passes")
_ONE_AND_MORE = ("roof_share_fraction", "spread_fraction", "drift_fraction")  # shares of what may be less than they
# What a task itself asks for, which leads wherever policies are compared: what is known to be true decides alone where
# a data set knows it, the first of them that it has before the others; else it may be whether answers are exact.
FACT_MEASURES = ("needles_recalled_fraction", "objects_recalled_fraction", "answers_right_fraction")
TASK_MEASURES = (*FACT_MEASURES, "exact_fraction")
NEAR_LENGTH_FRACTION = 0.1  # ROUGE against full follows the answer's length, so what is further from it is told
_NO_WORD = re.compile(r"[^A-Za-z0-9]+")
_MOST_NAMED = 6
_SIGNIFICANT = {"ppl": 4, "tokens": 3, "entries": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One measurement: `label` heads a column, `title` an axis; `definition` is one sentence."""

    name: str
    unit: Unit
    better: Better
    label: str
    title: str
    definition: str

    @property
    def reproduces(self) -> bool:
        """Whether the same cell gives the same number again; times, rates and bytes are observations."""
        if self.unit in ("ms", "tokens/s", "bytes") or self.name in _OBSERVED or is_of_a_device(self.name):
            return False
        return not self.name.endswith(("_ratio_to_full", "_spread_fraction", "_drift_fraction"))


def _rouge(kind: str, what: str, against: str, target: str) -> tuple[str, Unit, Better, str, str, str]:
    return (
        f"rouge{kind}_vs_{against}", "score", "higher", f"ROUGE-{kind} vs {against}", f"ROUGE-{kind} against {target}",
        f"F1 of {what} between the greedy answer and {target}, Porter-stemmed, mean over samples (0 to 1).",
    )  # fmt: skip


def _peak(phase: str, when: str, called: str = "") -> tuple[str, Unit, Better, str, str, str]:
    return (
        f"peak_{phase}_bytes", "bytes", "lower", f"peak {called or phase}", f"Peak memory, {called or phase}",
        f"Largest total of live tensors {when}, weights and inputs included; on a GPU what its allocator reports.",
    )  # fmt: skip


_FULL = "the answer of the full cache"
_REFERENCE = "the data set's reference answer"
_WORDS = {"1": "shared single words", "2": "shared word pairs", "L": "the longest common subsequence of words"}
_ROWS: tuple[tuple[str, Unit, Better, str, str, str], ...] = (
    ("ppl", "ppl", "lower", "PPL", "Perplexity",
     "exp of the mean negative log-likelihood (float32) of the reference answer's tokens and end of sequence, pooled."),
    ("ppl_released", "ppl", "lower", "PPL (released loop)", "Perplexity, released loop",
     "The same as Elastic Cache's code computes it: without the last and the end token, in the model's precision."),
    ("rougeL_released_vs_full", "score", "higher", "ROUGE-L (released) vs full", "ROUGE-L of the released code",
     "F1 over distinct words of the union of sentence-wise common subsequences, as in Elastic Cache's code (0 to 1)."),
    *(_rouge(kind, _WORDS[kind], "full", _FULL) for kind in "12L"),
    *(_rouge(kind, _WORDS[kind], "reference", _REFERENCE) for kind in "12L"),
    ("length_ratio", "ratio", "none", "length / full", "Answer length relative to full",
     "Tokens of the policy's answer over tokens of the full cache's answer; 1 is the same length."),
    ("first_divergence_tokens", "tokens", "none", "first divergence", "First divergent token",
     "Answer tokens equal to the full cache's before the first different one; mean over the answers that differ."),
    ("kl_to_full", "nats/token", "lower", "KL to full", "KL divergence to full",
     "KL(full || policy) of the next-token distributions along the same forced answer, mean per token."),
    ("top1_agreement_fraction", "fraction", "higher", "top-1 agreement", "Top-1 agreement with full",
     "Share of forced answer tokens at which policy and full cache rank the same next token first."),
    ("first_disagreement_tokens", "tokens", "none", "first disagreement", "First disagreement along a text",
     "Tokens of the text fed before policy and full cache first rank different tokens first; mean where they do."),
    ("objects_recalled_fraction", "fraction", "higher", "objects recalled", "Objects recalled",
     "Share of the objects in the picture that the answer states in the right place and right in all that they are."),
    ("objects_f1", "score", "higher", "objects F1", "Objects F1",
     "F1 of the objects that the answer states against those in the picture; invented objects count against it."),
    ("answers_right_fraction", "fraction", "higher", "answers right", "Questions answered right",
     "Share of the questions with one right answer that get it, case, white space and a final full stop aside; of a "
     "problem of mathematics its final answer counts alone, and of several draws of an answer their mean (avg@k)."),
    ("needles_recalled_fraction", "fraction", "higher", "needles found", "Needles found",
     "Share of what is hidden in the context and asked for that the answer names."),
    ("needles_f1", "score", "higher", "needles F1", "Needles F1",
     "F1 of the needles that the answer names against those asked for; other items' needles count against it."),
    ("exact_fraction", "fraction", "higher", "exact", "Exact answers",
     "Share of answers equal to the reference but for case, white space and a final full stop."),
    ("ttft_ms", "ms", "lower", "TTFT", "Time to first token",
     "From prepared inputs to first token: vision, prefill, compression; separate timed pass after warm-up."),
    ("tpot_ms", "ms", "lower", "TPOT", "Time per output token",
     "Median time of one decode step (50th percentile), same timed pass, end of sequence switched off."),
    ("tpot_p90_ms", "ms", "lower", "TPOT p90", "Time per output token, 90th percentile",
     "90th percentile of the time of one decode step in the same timed pass."),
    ("answer_ms", "ms", "lower", "answer time", "Time of a whole answer",
     "Of a problem that was answered and timed: TTFT, and a TPOT for each further token of its own answers, mean."),
    ("throughput_tokens_per_s", "tokens/s", "higher", "throughput", "Throughput",
     "Tokens made per second of a whole run, prompt included, over the whole batch."),
    ("policy_ms", "ms", "lower", "policy cost", "Policy cost per token",
     "Time in which all layers of the policy name their victims once, alone, with nothing applied; per decode step."),
    ("settle_ms", "ms", "lower", "compression time", "Compression time of the prompt",
     "Part of TTFT in which the policy plans and what it keeps moves into slots, over all layers."),
    ("prepare_ms", "ms", "lower", "prepare", "Preparation of the engine",
     "What the engine does once before the first decode step (capturing a CUDA graph); in no other number."),
    ("roof_ms", "ms", "lower", "roof", "Memory roof of a decode step",
     "Bytes of the decoder's weights and of the valid entries over the copy bandwidth: on a GPU no step is faster."),
    ("roof_share_fraction", "fraction", "higher", "MBU", "Memory-bandwidth utilisation (MBU)",
     "Memory roof over TPOT: the share of the copy bandwidth used; below 50 % the step is overhead-bound."),
    ("copy_bandwidth_bytes_per_s", "bytes/s", "higher", "copy bandwidth", "Copy bandwidth",
     "Bytes read and written per second by copying a large buffer, median over the cells of a machine and sweep."),
    ("full_ttft_ms", "ms", "lower", "TTFT of full", "Time to first token of the full cache",
     "TTFT of the full cache in the same interleaved runs."),
    ("full_tpot_ms", "ms", "lower", "TPOT of full", "Time per output token of the full cache",
     "TPOT of the full cache in the same interleaved runs."),
    ("full_roof_ms", "ms", "lower", "roof of full", "Memory roof of the full cache",
     "Memory roof of a decode step of the full cache."),
    ("full_roof_share_fraction", "fraction", "higher", "MBU of full", "Memory-bandwidth utilisation of the full cache",
     "Memory roof over TPOT of the full cache in the same interleaved runs."),
    ("throughput_ratio_to_full", "ratio", "higher", "throughput / full", "Throughput relative to full",
     "Throughput of the policy over that of the full cache, interleaved in the same process; above 1 is faster."),
    ("capacity_prompts", "prompts", "higher", "capacity", "Largest batch that fits",
     "Largest number of prompts together whose whole run fits in the device's memory."),
    ("full_capacity_prompts", "prompts", "higher", "capacity of full", "Largest batch of the full cache",
     "Largest number of prompts together whose whole run fits with the full cache, in the same process."),
    ("capacity_ratio_to_full", "ratio", "higher", "capacity / full", "Largest batch relative to full",
     "Largest batch of the policy over that of the full cache."),
    ("capacity_throughput_tokens_per_s", "tokens/s", "higher", "throughput at capacity", "Throughput at capacity",
     "Tokens made per second of a whole run at the policy's largest batch, prompts included."),
    ("full_capacity_throughput_tokens_per_s", "tokens/s", "higher", "throughput of full at capacity",
     "Throughput of the full cache at capacity", "The same for the full cache at its own largest batch."),
    ("capacity_throughput_ratio_to_full", "ratio", "higher", "throughput / full at capacity",
     "Throughput at capacity relative to full", "Throughput at its largest batch over the full cache's at its own."),
    ("capacity_peak_bytes", "bytes", "none", "peak at capacity", "Peak memory at capacity",
     "Largest total of live tensors in the runs at the policy's largest batch, weights included; on a GPU only."),
    ("capacity_kv_bytes", "bytes", "none", "KV bytes at capacity", "KV cache stored at capacity",
     "Bytes of the storages that hold keys and values at the end of a run at the policy's largest batch."),
    ("ttft_ratio_to_full", "ratio", "lower", "TTFT / full", "Time to first token relative to full",
     "TTFT of the policy over TTFT of the full cache, interleaved in the same process; below 1 is faster."),
    ("tpot_ratio_to_full", "ratio", "lower", "TPOT / full", "Time per output token relative to full",
     "TPOT of the policy over TPOT of the full cache, interleaved in the same process; below 1 is faster."),
    ("tpot_spread_fraction", "fraction", "none", "spread of TPOT", "Spread of TPOT between runs",
     "Largest standard deviation over mean of one setting's runs, policy or full; above 3 % the cell is noisy."),
    ("ttft_spread_fraction", "fraction", "none", "spread of TTFT", "Spread of TTFT between runs",
     "The same for the time to first token."),
    ("reference_drift_fraction", "fraction", "none", "reference drift", "Drift of a reference kernel",
     "Change of the time of a fixed matrix product from start to end of the timing; above 2 % the cell is noisy."),
    ("foreign_gpu_processes", "entries", "none", "other GPU processes", "Other processes on the GPU",
     "Processes beside ours that computed on the GPU after the timing; with any the cell is noisy."),
    ("timing_passes", "entries", "none", "timing passes", "Timing passes",
     "1, or 2 where the first pass was noisy and was measured again; the last one counts."),
    ("peak_memory_bytes", "bytes", "lower", "peak memory", "Peak memory",
     "Largest total of live tensors in any phase, weights included; on a GPU what its allocator reports."),
    ("peak_load_bytes", "bytes", "lower", "peak load", "Memory of the loaded model",
     "Bytes of weights and buffers."),
    _peak("vision", "while the picture is encoded"),
    _peak("prefill", "while the prompt is processed, outside of picture and policy"),
    _peak("settle", "while the policy plans and what it keeps moves into slots", "compression"),
    _peak("decode", "while the answer is made, the engine's preparation included"),
    ("peak_reserved_bytes", "bytes", "lower", "peak reserved", "Peak memory reserved by the allocator",
     "Most memory that the GPU's allocator held in any phase, its unused parts included."),
    ("plain_activation_bytes", "bytes", "none", "activations", "Activations of the plain model",
     "Peak of the same prompt in the model without any cache, above weights and inputs."),
    ("peak_over_bound_ratio", "ratio", "lower", "peak / bound", "Peak memory over its bound",
     "Peak over weights, inputs, budgeted KV, one layer's prompt KV and the plain model's activations."),
    ("peak_rss_bytes", "bytes", "lower", "peak RSS", "Peak resident memory of the process",
     "Largest resident set of the whole process in the memory pass, interpreter and libraries included."),
    ("kv_stored_bytes", "bytes", "lower", "KV bytes", "KV cache stored",
     "Bytes of the storages that hold keys and values, unused slots included, counted from the tensors."),
    ("kv_valid_bytes", "bytes", "lower", "KV valid", "KV cache in use",
     "Bytes of the keys and values of the slots in use."),
    ("kv_theoretical_bytes", "bytes", "lower", "KV theory", "KV cache in theory",
     "Bytes that the budget implies: entries x layers x KV heads x head size x 2 x bytes per number."),
    ("statistics_bytes", "bytes", "lower", "statistics", "Attention statistics held",
     "Bytes of the attention mass and of what a policy remembers of its plan, beside the cache at the end."),
    ("bookkeeping_bytes", "bytes", "lower", "bookkeeping", "Bookkeeping of the cache",
     "Bytes of positions, kinds, ranks and lengths of the slots, beside the cache at the end."),
    ("realised_budget_fraction", "fraction", "none", "realised budget", "Realised budget",
     "Entries really kept over tokens seen, mean over decode steps, layers and rows; of a layer its fullest head."),
    ("entries_mean", "entries", "none", "entries, mean", "Entries kept, mean",
     "Cache entries per layer and KV head, mean over decode steps."),
    ("entries_peak", "entries", "none", "entries, peak", "Entries kept, peak",
     "Largest number of cache entries per layer and KV head at any decode step."),
    ("num_skipped_items", "entries", "none", "items skipped", "Items skipped",
     "Items of the data set that were left out because they are bad (on_bad_item: skip)."),
    ("num_beyond_context", "prompts", "none", "beyond context", "Prompts beyond the context",
     "Prompts that with their answer exceed the model's context, measured all the same (beyond_context: allow)."),
)  # fmt: skip

MEASURES: dict[str, Measure] = {
    name: Measure(name=name, unit=unit, better=better, label=label, title=title, definition=definition)
    for name, unit, better, label, title, definition in _ROWS
}
MAX_TURNS = 8
_PER_TURN = ("rouge", "length_ratio", "objects", "needles", "answers", "exact", "realised_budget")
MEASURES |= {
    f"turn{turn}_{name}": replace(
        one, name=f"turn{turn}_{name}", label=f"turn {turn}: {one.label}", title=f"Turn {turn}: {one.title}"
    )
    for turn in range(1, MAX_TURNS + 1)
    for name, one in list(MEASURES.items())
    if name.startswith(_PER_TURN)
}
MAX_DEVICES = 8
_PER_DEVICE = (
    *("roof_ms", "full_roof_ms", "copy_bandwidth_bytes_per_s", "peak_memory_bytes", "peak_load_bytes"),
    *("kv_stored_bytes", "kv_valid_bytes", "capacity_peak_bytes", "capacity_kv_bytes"),
)
MEASURES |= {
    f"device{number}_{name}": replace(
        MEASURES[name],
        name=f"device{number}_{name}",
        better="none",  # of the whole model it is said; where its layers lie is no policy's doing
        label=f"device {number}: {MEASURES[name].label}",
        title=f"Device {number}: {MEASURES[name].title}",
        definition=f"Of the layers on the model's device {number}: {MEASURES[name].definition}",
    )
    for number in range(MAX_DEVICES)
    for name in _PER_DEVICE
}


def is_of_a_device(name: str) -> bool:
    """Whether the measurement is of one device of several that a model lies on."""
    return name.startswith("device")


def measure(name: str) -> Measure:
    """Return what `name` is. Raises: ConfigError with close matches if there is no such measurement."""
    if name not in MEASURES:
        raise ConfigError(f"there is no measurement {name!r}; {close_matches(name, MEASURES)}")
    return MEASURES[name]


def measure_named(what: str, text: str, known: Iterable[str] = tuple(MEASURES)) -> str:
    """Return the one measure of `known` that `text` means: by name, label or title, or by how one of them begins.

    Case and what is no letter or digit do not count: "tpot", "kl" and "ROUGE-L vs full" are enough. Raises:
    ConfigError, with the measures that it may be where there are several, with close ones where there is none.
    """
    names, asked = list(known), _plain(text)
    if text in MEASURES or not asked:
        found = [text] if text in names else []
    else:
        own = {name: (name, MEASURES[name].label, MEASURES[name].title) for name in names}
        found = (
            [name for name in names if asked in map(_plain, own[name])]
            or [name for name in names if any(_plain(part).startswith(asked) for part in own[name][:2])]
            or [name for name in names if any(_plain(word).startswith(asked) for word in _words(own[name]))]
        )
    if len(found) == 1:
        return found[0]
    if found:
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        shown = f"{', '.join(found[:_MOST_NAMED])}{more}"
        raise ConfigError(f"{what} is {text!r:.80}, which may be any of {shown}; give one of them")
    begins = near_names(text, {name[: len(text) + 1] for name in names})[:1]
    near = near_names(text, names) or [name for name in names if name.startswith(tuple(begins))][:3]
    raise ConfigError(f"{what} is {text!r:.80}; {did_you_mean(near) if near else 'kvbench measures lists them'}")


@cache
def _plain(text: str) -> str:
    return _NO_WORD.sub("", text).lower()


def _words(names: tuple[str, ...]) -> Iterator[str]:
    """Yield each of the names from each of its words on."""
    for name in names:
        yield from (name[found.end() :] for found in _NO_WORD.finditer(name))


def has_other_length(ratio: float) -> bool:
    """Tell whether answers of this length relative to the full cache's must be told, wherever ROUGE is shown."""
    return abs(ratio - 1) > NEAR_LENGTH_FRACTION


def to_minimise(name: str, value: float) -> float:
    """Return the value with the sign by which less is better, so that every search of a sweeper's minimises."""
    return -value if measure(name).better == "higher" else value


def scale_of(name: str) -> tuple[float, float]:
    """Return the least and the most that the measure can be; no bounds for a name that is not known."""
    known = MEASURES.get(name)
    if known is None:
        return -math.inf, math.inf
    if known.unit in ("score", "fraction") and not name.endswith(_ONE_AND_MORE):
        return 0.0, 1.0
    return (1.0 if known.unit == "ppl" else 0.0), math.inf


def score_scale(name: str) -> tuple[float, float] | None:
    """Return the least and the most that a sample's score can be; None for what has no such bounds or is no score."""
    known = MEASURES.get(name)
    is_score = known is not None and known.better != "none" and known.unit in ("score", "fraction") and known.reproduces
    return scale_of(name) if is_score else None


def bounds_on_scale(name: str, value: float, low: float, high: float) -> tuple[float, float]:
    """Return the interval cut to what can be: a t interval of two samples knows no bounds. It keeps its value."""
    least, most = scale_of(name)
    return min(max(low, least), value), max(min(high, most), value)


def budget_words(label: str) -> str:
    """Return a record's label of a budget as a reader is told: "20 % tokens kept" for "20 % of seen"."""
    return label.replace("% of seen", "% tokens kept").replace("% of prompt", "% prompt tokens kept")


def format_value(name: str, value: float | None) -> str:
    """Return `value` (base units) with its printed unit; "-" when there is none."""
    if value is None:
        return MISSING
    factor, suffix = _scale(measure(name).unit, value)
    return _number(value / factor, _decimals(name, value / factor)) + suffix


def format_interval(name: str, value: float | None, low: float | None, high: float | None) -> str:
    """Return "[low, high]" in the scale that `format_value` chose for `value`; empty without both bounds."""
    if value is None or low is None or high is None:
        return ""
    factor, _ = _scale(measure(name).unit, value)
    decimals = _decimals(name, value / factor)
    return f"[{_number(low / factor, decimals)}, {_number(high / factor, decimals)}]"


def format_with_interval(name: str, value: float | None, low: float | None, high: float | None) -> str:
    """Return "1.234 [1.100, 1.360]" or "85.0 % [81.2, 88.3]"; without both bounds the value alone."""
    return f"{format_value(name, value)} {format_interval(name, value, low, high)}".rstrip()


def format_bytes(value: float) -> str:
    """Return bytes as B, KiB, MiB or GiB with three significant digits."""
    return format_value("kv_stored_bytes", value)


def printed_scale(name: str, value: float) -> tuple[float, str]:
    """Return (divisor, unit) that `value` is printed with, for axes that are labelled once."""
    factor, suffix = _scale(measure(name).unit, value)
    return factor, "x full" if suffix == "x" else suffix.strip()


def _scale(unit: Unit, value: float) -> tuple[float, str]:
    if unit == "fraction":
        return 0.01, _SUFFIXES[unit]
    if unit == "bytes/s":
        return (1e12, _SUFFIXES[unit]) if abs(value) >= 1e12 else (1e9, " GB/s")
    if unit == "bytes":
        for factor, suffix in _BYTE_SCALES:
            if abs(value) >= factor:
                return factor, f" {suffix}"
        return 1.0, " B"
    return 1.0, _SUFFIXES.get(unit, "")


def _decimals(name: str, printed: float) -> int:
    """Scores, shares and ratios have fixed places so that a column lines up; others significant digits."""
    unit = measure(name).unit
    if unit in ("score", "fraction", "ratio"):
        return {"score": 3, "fraction": 1, "ratio": 2}[unit]
    if (
        printed == 0
        or not math.isfinite(printed)
        or (unit in ("tokens", "entries", "prompts") and printed == round(printed))
    ):
        return 0
    leading = math.floor(math.log10(abs(printed))) + 1
    return max(0, min(_SIGNIFICANT.get(unit, 3) - leading, 6))


def _number(printed: float, decimals: int) -> str:
    if abs(printed) >= 1e6 or (0 < abs(printed) < 1e-3 and decimals > 3):
        return f"{printed:.3g}"
    return f"{printed:,.{decimals}f}"
