"""Results that somebody made better: each changes one thing of the real sweep, and seals it again.

A change gets the bodies by name. `DOCTORED`: what was done, the change, the check meant for it, and the other
checks that notice it too.
"""

from __future__ import annotations

import copy

from tests.audit.doctored_labels import DOCTORED_LABELS
from tests.audit.doctored_values import DOCTORED_VALUES
from tests.audit.folders import Bodies, Doctored, rekey, scale, summarise, summarise_launches


def better_perplexity(bodies: Bodies) -> None:
    scale(bodies["h2o 0.2"], "ppl", 0.9)


def narrower_interval(bodies: Bodies) -> None:
    entry = bodies["h2o 0.2"]["measurements"]["ppl"]
    entry |= {bound: entry["value"] + (entry[bound] - entry["value"]) / 4 for bound in ("low", "high")}


def worst_sample_dropped(bodies: Bodies) -> None:
    body = bodies["h2o 0.2"]
    body["samples"].remove(max(body["samples"], key=lambda row: row["nll_sum"] / row["num_scored_tokens"]))
    summarise(body)


def over_budget_at_one_step(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["curves"]["entries"][7][2] += 1


def half_the_realised_budget(bodies: Bodies) -> None:
    scale(bodies["h2o 0.5"], "realised_budget_fraction", 0.5)


def half_the_bytes(bodies: Bodies) -> None:
    for kind in ("stored", "valid", "theoretical"):
        scale(bodies["h2o 0.5"], f"kv_{kind}_bytes", 0.5)


def masked_not_freed(bodies: Bodies) -> None:
    full = bodies["full"]["measurements"]["kv_stored_bytes"]["value"]
    bodies["h2o 0.2"]["measurements"]["kv_stored_bytes"]["value"] = full


def simulated_with_a_speed(bodies: Bodies) -> None:
    body = bodies["h2o 0.2"]
    body["cell"]["policy"]["simulated"] = True
    rekey(body)


def two_end_tokens(bodies: Bodies) -> None:
    for body in bodies.values():
        for row in body["samples"]:
            row["num_scored_tokens"] += 1
        summarise(body)


def two_end_tokens_in_one_cell(bodies: Bodies) -> None:
    for row in bodies["h2o 0.2"]["samples"]:
        row["num_scored_tokens"] += 1
    summarise(bodies["h2o 0.2"])


def tokens_missing(bodies: Bodies) -> None:
    body = bodies["h2o 0.2"]
    for row in body["samples"]:
        row["length_ratio"] *= (row["num_new_tokens"] - 9) / row["num_new_tokens"]
        row["num_new_tokens"] -= 9
        row["first_divergence_tokens"] = min(row["first_divergence_tokens"], row["num_new_tokens"])
    summarise(body)


def other_settings_than_the_key(bodies: Bodies) -> None:
    body = bodies["h2o 0.5"]
    body["cell"]["policy"]["num_sinks"] = 4


def half_sold_as_a_fifth(bodies: Bodies) -> None:
    """Settings, labels, key and place all say 20 %; what was measured is half."""
    body = bodies.pop("random 0.5")
    bodies.pop("random 0.2")
    body["cell"]["budget"]["fraction"] = body["labels"]["budget_fraction"] = 0.2
    body["labels"]["budget"] = "20 % of seen"
    rekey(body)
    bodies["random 0.2"] = body


def labelled_otherwise(bodies: Bodies) -> None:
    bodies["random 0.2"]["labels"]["policy"] = "full"


def faster_than_its_launches(bodies: Bodies) -> None:
    scale(bodies["h2o 0.2"], "tpot_ms", 0.8)


def slowest_launch_dropped(bodies: Bodies) -> None:
    body = bodies["h2o 0.2"]
    rows = body["curves"]["launches_ms"]
    rows.remove(max(rows, key=lambda row: row[1]))
    summarise_launches(body)


def noise_hidden(bodies: Bodies) -> None:
    scale(bodies["h2o 0.2"], "tpot_spread_fraction", 0.1)


def noisy_called_ok(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["measurements"]["reference_drift_fraction"]["value"] = 0.05


def prompts_of_another_day(bodies: Bodies) -> None:
    """The same data set and model, but a template wrote a date into the prompts of one cell."""
    for name, body in bodies.items():
        body["prompts"] = {"digest": "b" * 64 if name == "h2o 0.2" else "a" * 64}


def throughput_inflated(bodies: Bodies) -> None:
    scale(bodies["h2o 0.2"], "throughput_tokens_per_s", 3.0)


def full_row_replaced(bodies: Bodies) -> None:
    """A worse full cache lets everything else look better."""
    bodies["full"]["samples"] = copy.deepcopy(bodies["h2o 0.5"]["samples"])
    summarise(bodies["full"])


def environment_removed(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["environment"] = {}


def nonfinite_called_ok(bodies: Bodies) -> None:
    body = bodies["random 0.2"]
    body |= {"phase": "perplexity", "measurements": {}, "samples": [], "curves": {}}
    body["error"] = {"type": "NonFiniteError", "message": "not finite", "traceback": "..."}


def nonfinite_called_ok_with_care(bodies: Bodies) -> None:
    nonfinite_called_ok(bodies)
    bodies["random 0.2"] |= {"phase": None, "error": None}


def samples_of_another_policy(bodies: Bodies) -> None:
    theirs = copy.deepcopy(bodies["h2o 0.2"])
    for name in ("samples", "measurements", "curves"):
        bodies["random 0.2"][name] = theirs[name]


def ids_exchanged(bodies: Bodies) -> None:
    first, second = bodies["h2o 0.2"]["samples"][:2]
    for name in ("id", "cluster"):
        first[name], second[name] = second[name], first[name]


def scores_raised(bodies: Bodies) -> None:
    body = bodies["h2o 0.2"]
    for row in body["samples"]:
        row["rougeL_vs_full"] = min(1.0, row["rougeL_vs_full"] + 0.1)
    summarise(body)


def lengths_kept_silent(bodies: Bodies) -> None:
    del bodies["h2o 0.2"]["measurements"]["length_ratio"]


def launches_longer_than_the_run(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["duration_s"] = 0.01


DOCTORED: list[Doctored] = [
    (better_perplexity, "R6", set()),
    (narrower_interval, "R7", set()),
    (worst_sample_dropped, "R3", {"R4", "A3"}),
    (over_budget_at_one_step, "A7", set()),
    (half_the_realised_budget, "A7", set()),
    (half_the_bytes, "A6", set()),
    (masked_not_freed, "R9", {"A6"}),
    (simulated_with_a_speed, "R9", set()),
    (two_end_tokens, "A3", set()),
    (two_end_tokens_in_one_cell, "A3", set()),
    (tokens_missing, "A3", set()),
    (other_settings_than_the_key, "A5", set()),
    (half_sold_as_a_fifth, "A7", {"A6"}),
    (labelled_otherwise, "A5", set()),
    (faster_than_its_launches, "R10", {"R7"}),
    (slowest_launch_dropped, "R10", {"R7", "R11"}),
    (noise_hidden, "R10", set()),
    (noisy_called_ok, "R2", set()),
    (throughput_inflated, "R11", set()),
    (full_row_replaced, "R5", {"A3"}),
    (environment_removed, "A8", set()),
    (nonfinite_called_ok, "R2", {"R3"}),
    (nonfinite_called_ok_with_care, "R2", {"R3"}),
    (samples_of_another_policy, "R13", set()),
    (ids_exchanged, "R4", set()),
    (prompts_of_another_day, "R4", set()),
    (scores_raised, "R8", set()),
    (lengths_kept_silent, "A4", {"R2", "R6"}),
    (launches_longer_than_the_run, "R12", set()),
    *DOCTORED_LABELS,
    *DOCTORED_VALUES,
]
