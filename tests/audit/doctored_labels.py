"""Results that say of themselves what is not so: labels and curves, the part of a record that no key covers."""

from __future__ import annotations

import copy

from tests.audit.folders import Bodies, Body, Doctored, rekey

_OWN = "mine.policies.Own"


def _half_sold_as_a_fifth(bodies: Bodies, policy: str) -> Body:
    """Return the cell of half the budget, which settings, labels, key and bytes now call a fifth."""
    body, fifth = bodies.pop(f"{policy} 0.5"), bodies.pop(f"{policy} 0.2")
    for name in ("budget", "budget_fraction"):
        body["labels"][name] = fifth["labels"][name]
    body["cell"]["budget"] = fifth["cell"]["budget"]
    for name in ("kv_stored_bytes", "kv_valid_bytes", "kv_theoretical_bytes", "peak_over_bound_ratio"):
        body["measurements"][name] = fifth["measurements"][name]
    rekey(body)
    bodies[f"{policy} 0.2"] = body
    return body


def curve_removed(bodies: Bodies) -> None:
    """Nothing tells how much was held."""
    body = _half_sold_as_a_fifth(bodies, "h2o")
    del body["curves"]["entries"]
    for name in ("realised_budget_fraction", "entries_mean", "entries_peak"):
        del body["measurements"][name]


def realised_budget_kept_silent(bodies: Bodies) -> None:
    del bodies["h2o 0.5"]["measurements"]["realised_budget_fraction"]


def turns_kept_silent(bodies: Bodies) -> None:
    body = bodies["h2o 0.5"]
    body["cell"]["task"]["turns"] = {"_target_": "kvbench.tasks.generation.MultiTurn", "max_turns": 2}
    for row in body["samples"]:
        row |= {f"turn1_{name}": row[name] for name in ("text", "full_text", "rougeL_vs_full", "length_ratio")}
    for name in ("rougeL_vs_full", "length_ratio"):
        body["measurements"][f"turn1_{name}"] = copy.deepcopy(body["measurements"][name])
    rekey(body)


def over_budget_step_as_text(bodies: Bodies) -> None:
    row = bodies["h2o 0.2"]["curves"]["entries"][7]
    row[2] = str(row[2] + 1)


def launch_as_text(bodies: Bodies) -> None:
    rows = bodies["h2o 0.2"]["curves"]["launches_ms"]
    rows.append([str(one) for one in rows[0]])


def called_decode_only(bodies: Bodies) -> None:
    body = _half_sold_as_a_fifth(bodies, "random")
    body["labels"]["evicts_at"] = "decode"


def own_policy_called_decode_only(bodies: Bodies) -> None:
    """Of somebody's own policy only the label says when it evicts."""
    body = _half_sold_as_a_fifth(bodies, "random")
    body["labels"] |= {"policy": "own", "evicts_at": "decode"}
    body["cell"]["policy"] = {"_target_": _OWN}
    rekey(body)


def own_policy_called_decode_only_in_one_cell(bodies: Bodies) -> None:
    for name in ("random 0.2", "random 0.5", "h2o 0.2"):
        bodies[name]["cell"]["policy"]["_target_"] = _OWN
        bodies[name]["labels"]["policy"] = "own"
        rekey(bodies[name])
    bodies["random 0.5"]["labels"]["evicts_at"] = "decode"


def rule_kept_silent(bodies: Bodies) -> None:
    """A prompt that is cut and an answer that is kept are no H2O, whether or not the label says what H2O is."""
    body = bodies["h2o 0.2"]
    del body["labels"]["evicts_at"], body["labels"]["budget_rounds"]
    for number, row in enumerate(body["curves"]["entries"]):
        row[1:] = [31.0 + number, 31 + number]
    numbers = {"realised_budget_fraction": 0.35, "entries_mean": 70.0, "entries_peak": 111}
    for name, value in numbers.items():
        body["measurements"][name]["value"] = value


def called_rounded_up(bodies: Bodies) -> None:
    """One entry more at most steps."""
    body = bodies["h2o 0.2"]
    body["labels"]["budget_rounds"] = "up"
    for row in body["curves"]["entries"]:
        row[1:] = [-(-row[0] // 5)] * 2
    body["measurements"]["entries_peak"]["value"] = max(row[2] for row in body["curves"]["entries"])
    body["measurements"]["realised_budget_fraction"]["value"] = 0.2025


def labelled_with_a_smaller_share(bodies: Bodies) -> None:
    bodies["h2o 0.5"]["labels"]["budget_fraction"] = 0.2


def labelled_with_a_number_of_tokens(bodies: Bodies) -> None:
    bodies["h2o 0.5"]["labels"]["budget_tokens"] = 31


def two_policies_exchanged(bodies: Bodies) -> None:
    for name, body in bodies.items():
        body["labels"]["policy"] = {"h2o": "random", "random": "h2o", "full": "full"}[name.split()[0]]


def another_model_in_one_cell(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["labels"]["model"] = "llava-1.5-7b"


def another_data_set_in_one_cell(bodies: Bodies) -> None:
    bodies["h2o 0.2"]["labels"]["dataset"] = "my photographs"


def another_data_set_in_every_cell(bodies: Bodies) -> None:
    for body in bodies.values():
        body["labels"]["dataset"] = "mm_vet"


DOCTORED_LABELS: list[Doctored] = [
    (curve_removed, "A7", {"R2"}),
    (realised_budget_kept_silent, "R2", set()),
    (turns_kept_silent, "R2", set()),
    (over_budget_step_as_text, "A7", set()),
    (launch_as_text, "R10", set()),
    (called_decode_only, "A7", {"A5"}),
    (own_policy_called_decode_only, "A7", set()),
    (own_policy_called_decode_only_in_one_cell, "A5", set()),
    (rule_kept_silent, "A7", set()),
    (called_rounded_up, "A5", set()),
    (labelled_with_a_smaller_share, "A5", set()),
    (labelled_with_a_number_of_tokens, "A5", set()),
    (two_policies_exchanged, "A5", set()),
    (another_model_in_one_cell, "A5", set()),
    (another_data_set_in_one_cell, "A5", set()),
    (another_data_set_in_every_cell, "A5", set()),
]
