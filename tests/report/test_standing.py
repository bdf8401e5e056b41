from __future__ import annotations

from pathlib import Path

from kvbench.report.compare import group_comparisons
from kvbench.report.load import Group, load_results
from kvbench.report.standing import best_policies
from tests.report.synthetic import body, write_cell


def group_of(folder: Path, *bodies: dict[str, object]) -> Group:
    for one in bodies:
        write_cell(folder, one)
    (group,) = load_results(folder).groups
    return group


def test_the_best_value_at_each_budget_wins_and_the_runner_up_is_compared_with_it(tmp_path: Path) -> None:
    policies = ("full", "random", "h2o", "elastic")
    cells = [body(policy=name, budget=None if name == "full" else at) for name in policies for at in (0.2, 0.5)]
    group = group_of(tmp_path, *{one["key"]: one for one in cells}.values())
    found = {(one.budget, one.measure): one for one in best_policies(group, group_comparisons(group))}
    assert {budget for budget, _ in found} == {"20 % of seen", "50 % of seen"}
    for (budget, name), one in found.items():
        values = {cell.policy: cell.estimate(name) for cell in group.budgeted if cell.budget == budget}
        known = {policy: estimate.value for policy, estimate in values.items() if estimate}
        choose = min if name in ("ppl", "kl_to_full") or name.endswith(("_ms", "_bytes", "_ratio_to_full")) else max
        assert known[one.cell.policy] == choose(known.values())
        del known[one.cell.policy]
        assert known[one.runner_up.policy] == choose(known.values())
    clear = found["20 % of seen", "ppl"]
    assert (clear.cell.policy, clear.runner_up.policy, clear.verdict) == ("elastic", "h2o", "better")
    (direct,) = (
        one
        for one in group_comparisons(group)
        if one.measure == "ppl" and {one.first.key, one.second.key} == {clear.cell.key, clear.runner_up.key}
    )
    turned = {"better": "worse", "worse": "better"}
    same_way = direct.first.key == clear.cell.key
    assert clear.verdict == (direct.verdict if same_way else turned[direct.verdict])


def test_noisy_times_are_never_the_best_and_one_policy_alone_has_nobody_to_beat(tmp_path: Path) -> None:
    group = group_of(
        tmp_path,
        body(policy="full", budget=None),
        body(policy="elastic", status="noisy"),
        body(policy="h2o"),
        body(policy="random"),
        body(policy="h2o", budget=0.5),
    )
    found = best_policies(group, group_comparisons(group))
    assert {one.budget for one in found} == {"20 % of seen"}
    ranked = {name: {cell.policy for one in found if one.measure == name for cell in (one.cell, one.runner_up)}
              for name in ("tpot_ratio_to_full", "ppl")}  # fmt: skip
    assert ranked == {"tpot_ratio_to_full": {"h2o", "random"}, "ppl": {"elastic", "h2o"}}
