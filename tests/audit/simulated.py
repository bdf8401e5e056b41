"""Honest records made from a seed: a toy cache is stepped, a toy clock is read, and every number follows.

Nothing here uses the audit's own arithmetic: entries are counted step by step as a cache does.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
from typing import Any

from kvbench.results.record import BODY_SCHEMA, cell_key
from kvbench.stats.intervals import Interval, launch_interval, mean_interval, pooled_ratio_interval, ratio_interval
from kvbench.tasks.rouge import first_divergence, length_ratio, rouge_scores

LAYERS, ENTRY_BYTES, WEIGHTS_BYTES = 3, 128, 10_000
NEW_TOKENS, TIMED_TOKENS, BLOCKS = 24, 9, 2
WORDS = ("red", "blue", "ring", "star", "there", "is", "one", "two", "large", "small")
CLASSES: dict[str, dict[str, Any]] = {
    "full": {"_target_": "kvbench.policies.full.Full"},
    "h2o": {"_target_": "kvbench.policies.h2o.H2O"},
    "snapkv": {"_target_": "kvbench.policies.snapkv.SnapKV"},
    "elastic_released": {"_target_": "kvbench.policies.released.elastic.ElasticReleased", "target_rounded_up": True},
}
Body = dict[str, Any]


class Machine:
    """A model, a data set and a clock: everything that the cells of one sweep share."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self.seed, rng = seed, random.Random(seed)
        self.prompts = [rng.randint(12, 60) for _ in range(num_samples)]
        self.clusters = [f"picture {rng.randint(0, num_samples)}" for _ in range(num_samples)]
        self.full_answers = [self._answer(rng) for _ in range(num_samples)]
        self.references = [a if rng.random() < 0.5 else self._answer(rng) for a in self.full_answers]

    @staticmethod
    def _answer(rng: random.Random) -> list[str]:
        return [rng.choice(WORDS) for _ in range(rng.randint(1, NEW_TOKENS))]

    def cell(self, policy: str, budget: dict[str, Any] | None, *, when: str = "both", up: bool = False) -> Body:
        """Return the record of one cell; budget as in the settings, unknown policies are somebody's own."""
        rng = random.Random(f"{self.seed} {policy} {budget} {when} {up}")
        answers = self.full_answers if budget is None else [self._changed(rng, a) for a in self.full_answers]
        rows = [self._row(rng, number, answer, full=budget is None) for number, answer in enumerate(answers)]
        body: Body = {"schema": BODY_SCHEMA, "attempt": f"{rng.getrandbits(128):032x}", "sweep": "s", "status": "ok"}
        body |= {"phase": None, "error": None, "started_utc": "2026-11-23T13:00:00+00:00", "duration_s": 30.0}
        body |= {"labels": _labels(policy, budget, when, up), "cell": self._settings(policy, budget)}
        body |= {"environment": _environment(), "samples": rows, "measurements": {}, "curves": {}}
        body["key"] = cell_key(body["cell"])
        self._quality(body)
        self._entries(body, budget, when, up)
        _speed(body, rng)
        self._memory(body, budget, when, up)
        return body

    @staticmethod
    def _changed(rng: random.Random, answer: list[str]) -> list[str]:
        start = rng.randint(0, len(answer))
        return [*answer[:start], *(rng.choice(WORDS) for _ in range(rng.randint(0, NEW_TOKENS - start)))]

    def _row(self, rng: random.Random, number: int, answer: list[str], *, full: bool) -> dict[str, Any]:
        theirs, wanted = self.full_answers[number], self.references[number]
        texts = {"text": " ".join(answer), "full_text": " ".join(theirs), "reference": " ".join(wanted)}
        compared = max(1, len(theirs))  # of an empty answer the end
        row: dict[str, Any] = {"id": f"sample {number}", "cluster": self.clusters[number], **texts}
        row |= {"num_new_tokens": len(answer), "length_ratio": length_ratio(len(answer), len(theirs))}
        row |= {"first_divergence_tokens": first_divergence(answer, theirs)}
        row |= {"nll_sum": rng.expovariate(0.2), "num_scored_tokens": len(wanted) + 1}
        row |= {"kl_sum": 0.0 if full else rng.expovariate(1.0), "num_compared_tokens": compared}
        row["num_agreeing_tokens"] = compared if full else rng.randint(0, compared)
        for against, other in (("full", texts["full_text"]), ("reference", texts["reference"])):
            scores = rouge_scores(prediction=texts["text"], reference=other)
            row |= {f"{name}_vs_{against}": score for name, score in scores.items()}
        return row

    def _quality(self, body: Body) -> None:
        rows = body["samples"]
        pooled = {
            "ppl": pooled_ratio_interval(*_columns(rows, "nll_sum", "num_scored_tokens"), self.clusters, math.exp),
            "kl_to_full": pooled_ratio_interval(*_columns(rows, "kl_sum", "num_compared_tokens"), self.clusters),
            "top1_agreement_fraction": pooled_ratio_interval(
                *_columns(rows, "num_agreeing_tokens", "num_compared_tokens"), self.clusters
            ),
        }
        for name in [n for n in rows[0] if n.startswith(("rouge", "length", "first"))]:
            scored = [row for row in rows if row[name] is not None]
            pooled[name] = mean_interval([row[name] for row in scored], [row["cluster"] for row in scored])
        body["measurements"] |= {name: interval.as_measurement() for name, interval in pooled.items()}

    def _entries(self, body: Body, budget: dict[str, Any] | None, when: str, up: bool) -> None:
        counts: dict[int, list[int]] = {}
        for prompt, row in zip(self.prompts, body["samples"], strict=True):
            steps = min(row["num_new_tokens"], NEW_TOKENS - 1)
            for seen, held in held_at_steps(prompt, steps, budget, when, up):
                counts.setdefault(seen, []).extend([held] * LAYERS)
        number = sum(map(len, counts.values()))
        if not number:
            return
        body["curves"]["entries"] = [[seen, statistics.fmean(c), max(c)] for seen, c in sorted(counts.items())]
        numbers = {
            "realised_budget_fraction": sum(held / seen for seen, c in counts.items() for held in c) / number,
            "entries_mean": sum(map(sum, counts.values())) / number,
            "entries_peak": max(map(max, counts.values())),
        }
        body["measurements"] |= {name: _told(value, number) for name, value in numbers.items()}

    def _memory(self, body: Body, budget: dict[str, Any] | None, when: str, up: bool) -> None:
        seen, held = held_at_steps(self.prompts[0], TIMED_TOKENS - 1, budget, when, up)[-1]
        unit = LAYERS * ENTRY_BYTES
        stored = (held + 1) * unit
        decode, activations = WEIGHTS_BYTES + stored + 700, 5000
        numbers = {"kv_stored_bytes": stored, "kv_valid_bytes": held * unit, "kv_theoretical_bytes": held * unit}
        numbers |= {"peak_load_bytes": WEIGHTS_BYTES, "peak_decode_bytes": decode, "peak_prefill_bytes": decode + 900}
        numbers |= {"peak_memory_bytes": decode + 900, "plain_activation_bytes": activations}
        bound = WEIGHTS_BYTES + activations + held * unit + 64 + ENTRY_BYTES * seen
        body["measurements"] |= {name: _told(value, 1) for name, value in numbers.items()}
        body["measurements"]["peak_over_bound_ratio"] = _told((decode + 900) / bound, 1)

    def _settings(self, policy: str, budget: dict[str, Any] | None) -> dict[str, Any]:
        tasks: dict[str, dict[str, Any]] = {
            "perplexity": {"_target_": "kvbench.tasks.perplexity.Perplexity"},
            "generation": {"_target_": "kvbench.tasks.generation.Generation", "max_new_tokens": NEW_TOKENS},
            "fidelity": {"_target_": "kvbench.tasks.perplexity.Fidelity", "max_new_tokens": NEW_TOKENS},
            "speed": {"_target_": "a.Speed", "new_tokens": TIMED_TOKENS, "num_blocks": BLOCKS, "batch_size": 1},
            "memory": {"_target_": "a.Memory", "new_tokens": TIMED_TOKENS, "batch_size": 1},
        }
        return {
            "model": {"fingerprint": f"model {self.seed}", "dtype": "float32"},
            "dataset": {"fingerprint": f"data {self.seed}", "num_samples": len(self.prompts)},
            "policy": CLASSES.get(policy, {"_target_": f"mine.{policy}"}),
            "budget": budget,
            "positions": "original",
            "task": tasks,
            "device": "cpu",
            "versions": {"kvbench": "0.1.0", "torch": "2.13.0"},
        }


def held_at_steps(prompt: int, steps: int, budget: dict[str, Any] | None, when: str, up: bool) -> list[tuple[int, int]]:
    """Return (seen, held) after each step of one row, one entry coming and at most one going at a time."""
    held = prompt if budget is None or when == "decode" else min(prompt, _allowed(budget, prompt, prompt, up))
    after = []
    for seen in range(prompt + 1, prompt + steps + 1):
        held += 1
        if budget is not None and when != "prompt":
            floor = prompt if when == "decode" else 0
            held = min(held, max(_allowed(budget, seen, prompt, up), floor, held - 1))
        after.append((seen, held))
    return after


def _allowed(budget: dict[str, Any], seen: int, prompt: int, up: bool) -> int:
    if budget["tokens"] is not None:
        return int(budget["tokens"])
    base = seen if budget["of"] == "seen" else prompt
    share = round(budget["fraction"] * base, 9)
    return max(1, math.ceil(share) if up else math.floor(share))


def _columns(rows: list[dict[str, Any]], *names: str) -> list[list[float]]:
    return [[row[name] for row in rows] for name in names]


def _told(value: float, n: int) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": n, "unit": "", "method": "counted"}


def _speed(body: Body, rng: random.Random) -> None:
    launches = [[_launch(rng), _launch(rng)] for _ in range(2 * BLOCKS)]
    rows = [[a[0], statistics.median(a[1]), b[0], statistics.median(b[1])] for a, b in launches]
    ttft, tpot, full_ttft, full_tpot = zip(*rows, strict=True)
    ours, theirs = ([arm[0] + sum(arm[1]) for arm in arms] for arms in zip(*launches, strict=True))
    intervals: dict[str, Interval] = {
        "ttft_ms": launch_interval(ttft),
        "tpot_ms": launch_interval(tpot),
        "tpot_p90_ms": launch_interval([sorted(a[1])[(9 * len(a[1]) - 1) // 10] for a, _ in launches]),
        "settle_ms": launch_interval([a[0] / 4 for a, _ in launches]),
        "full_ttft_ms": launch_interval(full_ttft),
        "full_tpot_ms": launch_interval(full_tpot),
        "throughput_tokens_per_s": launch_interval([TIMED_TOKENS / total_ms * 1e3 for total_ms in ours]),
        "throughput_ratio_to_full": ratio_interval(theirs, ours),
        "ttft_ratio_to_full": ratio_interval(ttft, full_ttft),
        "tpot_ratio_to_full": ratio_interval(tpot, full_tpot),
        "roof_share_fraction": launch_interval([0.5 / one for one in tpot]),
    }
    body["measurements"] |= {name: interval.as_measurement() for name, interval in intervals.items()}
    body["measurements"]["roof_ms"] = _told(0.5, 1)
    body["curves"]["launches_ms"] = rows


def _launch(rng: random.Random) -> tuple[float, list[float]]:
    return rng.lognormvariate(2.0, 0.3), [rng.lognormvariate(0.5, 0.2) for _ in range(TIMED_TOKENS - 1)]


def _labels(policy: str, budget: dict[str, Any] | None, when: str, up: bool) -> dict[str, Any]:
    words = "-"
    if budget is not None:
        share = f"{100 * (budget['fraction'] or 0):g} % of {budget['of']}"
        words = f"{budget['tokens']} tokens" if budget["tokens"] is not None else share
    limits = budget or {"fraction": None, "tokens": None}
    shared = {"model": "toy", "dataset": "toy", "policy": policy, "positions": "original", "budget": words}
    shared |= {"budget_fraction": limits["fraction"], "budget_tokens": limits["tokens"]}
    evicts_at = "prompt and decode" if when == "both" else when
    return shared | ({"evicts_at": evicts_at, "budget_rounds": "up" if up else "down"} if budget else {})


def _environment() -> dict[str, Any]:
    info = {"python": "3.11", "system": "Linux", "machine": "x86_64", "device": "cpu", "cpu_model": "toy"}
    return info | {"num_threads": 2, "torch": "2.13.0", "transformers": "5.23.0", "kvbench": "0.1.0"}


def failed(body: Body, status: str) -> Body:
    """Return the record of the same cell had it failed."""
    error = {"type": "SomeError", "message": "it failed", "traceback": "..."}
    attempt = hashlib.sha256(f"{body['attempt']}{status}".encode()).hexdigest()[:32]
    empty: Body = {"measurements": {}, "samples": [], "curves": {}, "environment": {}}
    return {**body, **empty, "status": status, "error": error, "phase": "generation", "attempt": attempt}
