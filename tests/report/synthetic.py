"""Records that look like a real sweep: 13 cells of 32 samples, made from a seed."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from pathlib import Path
from typing import Any

from kvbench.results.record import write_record

BUDGETS = (0.1, 0.2, 0.5)
STRENGTH = {"full": 1.0, "elastic": 0.9, "h2o": 0.8, "random": 0.35, "streaming_llm": 0.12}
COLOURS = ("red", "blue", "green", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "star", "cross")
MIB = 2**20


def body(
    *,
    policy: str = "h2o",
    budget: float | None = 0.2,
    status: str = "ok",
    model: str = "tiny-llava",
    dataset: str = "scenes",
    num_samples: int = 32,
    seed: int = 0,
    sweep: str = "first",
    **labels: Any,
) -> dict[str, Any]:
    """Return the record body of one cell."""
    rng = random.Random(f"{policy}/{budget}/{model}/{dataset}/{seed}")
    name = {"model": model, "dataset": dataset, "policy": policy, "positions": "original"}
    name |= {
        "budget": "-" if budget is None else f"{budget:.0%}".replace("%", " % of seen"),
        "budget_fraction": budget,
        "budget_tokens": None,
    } | labels
    key = hashlib.sha256(repr((sorted(name.items(), key=str), seed, sweep)).encode()).hexdigest()
    skill = 1.0 if budget is None else STRENGTH.get(policy, 0.6) * min(1.0, 0.45 + 1.1 * budget)
    failed = status not in ("ok", "noisy")
    samples = [] if failed else [_sample(index, skill, rng) for index in range(num_samples)]
    return {
        "schema": 1,
        "key": key,
        "sweep": sweep,
        "attempt": key[:32],
        "labels": name,
        "cell": {"policy": {"name": policy, "seed": seed}, "generation": {"max_new_tokens": 160}},
        "status": status,
        "phase": "decode" if failed else None,
        "error": {"type": "OutOfMemoryError", "message": "tried to allocate <2 GiB>", "traceback": "..."}
        if failed
        else None,
        "started_utc": "2026-11-23T13:00:00+00:00",
        "duration_s": 12.3,
        "environment": {"torch": "2.13.0", "python": "3.12.3", "device": "cpu", "num_threads": 2, "git_commit": None},
        "measurements": {} if failed else _measurements(samples, skill, budget, rng),
        "samples": samples,
        "curves": {} if failed else {"entries": _entries(budget)},
    }


def without_facts(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a data set that knows no facts, so that ROUGE against the full cache leads."""
    record["measurements"].pop("objects_recalled_fraction", None)
    for sample in record["samples"]:
        sample.pop("objects_recalled_fraction", None)
    return record


def write_cell(folder: Path, record: dict[str, Any]) -> Path:
    """Write `record` where an accepted record lies."""
    path = folder / "cells" / record["key"][:16] / "record.json"
    write_record(path, record)
    return path


def write_sweep(folder: Path, **labels: Any) -> Path:
    """Write the default sweep (13 cells) below `folder`."""
    write_cell(folder, body(policy="full", budget=None, **labels))
    for policy in ("random", "streaming_llm", "h2o", "elastic"):
        for budget in BUDGETS:
            write_cell(folder, body(policy=policy, budget=budget, **labels))
    return folder


def _sample(index: int, skill: float, rng: random.Random) -> dict[str, Any]:
    scene = random.Random(index)
    phrases = [
        f"In row {scene.choice(('one', 'two', 'three'))}, there is a big striped "
        f"{scene.choice(COLOURS)} {scene.choice(SHAPES)}."
        for _ in range(scene.randint(4, 8))
    ]
    kept = [rng.random() < skill**0.3 for _ in phrases]
    wrong = [phrase if keep else phrase.replace("big", "small <b>") for phrase, keep in zip(phrases, kept, strict=True)]
    name = f"scenes/test/{index}"
    full = " ".join([f"There are {len(phrases)} objects.", *phrases])
    text = full if skill == 1.0 else " ".join([f"There are {len(phrases)} objects.", *wrong])
    recalled = min(1.0, max(0.0, rng.gauss(skill, 0.12))) if skill < 1 else min(1.0, rng.gauss(0.985, 0.01))
    return {
        "id": name,
        "cluster": name,
        "nll_sum": 110 * (0.02 + 0.9 * (1 - skill) + 0.05 * rng.random()),
        "num_scored_tokens": 110,
        "rougeL_vs_full": 1.0 if skill == 1.0 else min(1.0, max(0.0, rng.gauss(0.3 + 0.68 * skill, 0.08))),
        "rougeL_vs_reference": min(1.0, max(0.0, rng.gauss(0.28 + 0.68 * skill, 0.06))),
        "objects_recalled_fraction": recalled,
        "text": text,
        "full_text": full,
        "reference": full,
        "first_divergence_tokens": None if text == full else rng.randint(3, 60),
    }


def _measurements(
    samples: list[dict[str, Any]], skill: float, budget: float | None, rng: random.Random
) -> dict[str, Any]:
    num = len(samples)
    share = 1.0 if budget is None else budget
    nll = [sample["nll_sum"] / sample["num_scored_tokens"] for sample in samples]
    mean_nll = sum(nll) / num
    found = {"ppl": _entry(math.exp(mean_nll), 0.04 * math.exp(mean_nll), num, "")}
    for name in ("rougeL_vs_full", "rougeL_vs_reference", "objects_recalled_fraction"):
        values = [sample[name] for sample in samples]
        found[name] = _entry(sum(values) / num, 0.0 if len(set(values)) == 1 else 0.03, num, "", most=1.0)
    stored = int(8 * MIB * share) + 4096
    decode = 9.0 - 2.0 * (1 - share) + rng.random()
    found |= {
        "ttft_ms": _entry(180 + 14 * (1 - share) + 3 * rng.random(), 4.0, 20, "ms"),
        "tpot_ms": _entry(decode, 0.3, 20, "ms"),
        "tpot_p90_ms": _entry(decode * 1.2, None, 20, "ms"),
        "tpot_ratio_to_full": _entry(decode / 9.5, 0.04, 20, ""),
        "ttft_ratio_to_full": _entry(1.0 + 0.08 * (1 - share), 0.03, 20, ""),
        "settle_ms": _entry(9.0, 0.5, 20, "ms"),
        "policy_ms": _entry(0.3 if budget else 0.0, None, 1, "ms"),
        "roof_ms": _entry(0.9 * (0.5 + share / 2), None, 1, "ms"),
        "roof_share_fraction": _entry(0.9 * (0.5 + share / 2) / decode, 0.004, 20, ""),
        "length_ratio": _entry(0.97, 0.02, num, ""),
        "kl_to_full": _entry(0.8 * (1 - skill), 0.05 * (1 - skill), num, "nats/token"),
        "top1_agreement_fraction": _entry(0.5 + 0.5 * skill, 0.02, num, ""),
        "realised_budget_fraction": _entry(share * 1.01 if budget else 1.0, None, num, ""),
        "kv_stored_bytes": _entry(stored, None, num, "bytes"),
        "kv_theoretical_bytes": _entry(stored - 4096, None, num, "bytes"),
        "peak_load_bytes": _entry(90 * MIB, None, 1, "bytes"),
        "peak_vision_bytes": _entry(104 * MIB, None, 1, "bytes"),
        "peak_prefill_bytes": _entry(112 * MIB + stored, None, 1, "bytes"),
        "peak_settle_bytes": _entry(103 * MIB + stored, None, 1, "bytes"),
        "plain_activation_bytes": _entry(15 * MIB, None, 1, "bytes"),
        "peak_decode_bytes": _entry(95 * MIB + stored, None, 1, "bytes"),
        "peak_memory_bytes": _entry(112 * MIB + stored, None, 1, "bytes"),
        "peak_rss_bytes": _entry(900 * MIB, None, 1, "bytes"),
    }
    return found


def _entries(budget: float | None) -> list[list[float]]:
    """Return the curve of a cell: tokens seen, mean entries, most entries."""
    return [[seen, seen * (budget or 1.0), float(int(seen * (budget or 1.0)) + 1)] for seen in range(150, 170)]


def _entry(value: float, half: float | None, n: int, unit: str, most: float = math.inf) -> dict[str, Any]:
    low, high = (None, None) if half is None else (max(0.0, value - half), min(most, value + half))
    return {"value": value, "low": low, "high": high, "n": n, "unit": unit, "method": "BCa bootstrap over samples"}


def embedded(page: str, name: str) -> Any:
    """Return what stands in a page for its scripts, as `read` of page.js does."""
    found = re.search(rf'id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    packed = json.loads(found[1])

    def whole(one: Any) -> Any:
        if isinstance(one, str) and one[0] == "!":
            return whole(packed["lists"][int(one[1:], 36)])
        if isinstance(one, str):
            return packed["texts"][int(one, 36)]
        if isinstance(one, list):
            return [whole(part) for part in one]
        if isinstance(one, dict):
            ((shape, values),) = one.items()
            return {name: whole(value) for name, value in zip(packed["shapes"][int(shape, 36)], values, strict=True)}
        return one

    return whole(packed["data"])
