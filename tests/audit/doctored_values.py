"""Results whose numbers cannot be, or are not there; every number that follows from another follows from it."""

from __future__ import annotations

from tests.audit.folders import Bodies, Doctored, scale, summarise


def interval_removed(bodies: Bodies) -> None:
    for name in ("ppl", "tpot_ms"):
        bodies["h2o 0.2"]["measurements"][name] |= {"low": None, "high": None}


def interval_of_a_rate_removed(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["measurements"]["throughput_tokens_per_s"] |= {"low": None, "high": None}


def likelier_than_certain(bodies: Bodies) -> None:
    for row in bodies["h2o 0.2"]["samples"]:
        row["nll_sum"] = -row["nll_sum"]
    summarise(bodies["h2o 0.2"])


def nearer_than_equal(bodies: Bodies) -> None:
    for row in bodies["h2o 0.2"]["samples"]:
        row["kl_sum"] = -row["kl_sum"]
    summarise(bodies["h2o 0.2"])


def agrees_twice(bodies: Bodies) -> None:
    for row in bodies["h2o 0.2"]["samples"]:
        row["num_agreeing_tokens"] = 2 * row["num_compared_tokens"]
    summarise(bodies["h2o 0.2"])


def half_a_token_agrees(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["samples"][0]["num_agreeing_tokens"] -= 0.5
    summarise(bodies["h2o 0.2"])


def recalls_more_than_there_is(bodies: Bodies) -> None:
    for row in bodies["h2o 0.2"]["samples"]:
        row["objects_recalled_fraction"] = 1.5
    summarise(bodies["h2o 0.2"])


def time_runs_back(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["measurements"]["policy_ms"]["value"] = -0.2


def ratio_of_throughputs_doubled(bodies: Bodies) -> None:
    scale(bodies["h2o 0.2"], "throughput_ratio_to_full", 2.0)


def capacity_doubled(bodies: Bodies) -> None:
    numbers = {"capacity_prompts": 12, "full_capacity_prompts": 4, "capacity_ratio_to_full": 6.0}
    for name, value in numbers.items():
        bodies["h2o 0.2"]["measurements"][name] = {"value": value, "low": None, "high": None, "n": 1}


def noise_kept_silent(bodies: Bodies) -> None:
    del bodies["h2o 0.2"]["measurements"]["tpot_spread_fraction"]


def drift_kept_silent(bodies: Bodies) -> None:
    del bodies["h2o 0.2"]["measurements"]["reference_drift_fraction"]


def latency_made_null(bodies: Bodies) -> None:
    for name in ("tpot_ms", "tpot_ratio_to_full"):
        bodies["h2o 0.2"]["measurements"][name] |= {"value": None, "low": None, "high": None}


def realised_budget_made_null(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["measurements"]["realised_budget_fraction"]["value"] = None


def ratio_kept_silent(bodies: Bodies) -> None:
    del bodies["h2o 0.2"]["measurements"]["tpot_ratio_to_full"]


def facts_kept_silent(bodies: Bodies) -> None:
    del bodies["h2o 0.2"]["measurements"]["objects_recalled_fraction"]


def reference_kept_silent(bodies: Bodies) -> None:
    del bodies["h2o 0.2"]["measurements"]["rougeL_vs_reference"]


def facts_removed_from_rows_too(bodies: Bodies) -> None:
    body = bodies["h2o 0.2"]
    del body["measurements"]["objects_recalled_fraction"]
    for row in body["samples"]:
        del row["objects_recalled_fraction"]


DOCTORED_VALUES: list[Doctored] = [
    (interval_removed, "R7", set()),
    (interval_of_a_rate_removed, "R7", set()),
    (likelier_than_certain, "R14", set()),
    (nearer_than_equal, "R14", set()),
    (agrees_twice, "R14", set()),
    (half_a_token_agrees, "R14", set()),
    (recalls_more_than_there_is, "R14", set()),
    (time_runs_back, "R14", set()),
    (ratio_of_throughputs_doubled, "R11", set()),
    (capacity_doubled, "R11", set()),
    (noise_kept_silent, "R2", set()),
    (drift_kept_silent, "R2", set()),
    (latency_made_null, "R2", set()),
    (realised_budget_made_null, "R2", set()),
    (ratio_kept_silent, "R2", set()),
    (facts_kept_silent, "R6", set()),
    (reference_kept_silent, "R6", set()),
    (facts_removed_from_rows_too, "R6", set()),
]
