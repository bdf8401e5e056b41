"""What the reader chose (margins, a sweep, common samples) and the uncertainty of parts are said where they matter."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvbench.measures import measure
from kvbench.report.answer import answer_html, answer_sentences
from kvbench.report.compare import Choices
from kvbench.report.figures import FIGURES
from kvbench.report.load import load_results
from kvbench.report.page import again_html, methods_html, render_page
from kvbench.report.page_tables import frontier_html, latency_html
from kvbench.report.standing import judge
from kvbench.results.frontier import Frontier
from tests.report.synthetic import body, without_facts, write_cell

WIDE = Choices(margins={"rougeL_vs_full": 0.5, "ppl": 0.02}, intersect=True)


def sweep(folder: Path) -> Path:
    for policy, budget in (("full", None), ("h2o", 0.2), ("random", 0.2)):
        write_cell(folder, without_facts(body(policy=policy, budget=budget, num_samples=8)))
    return folder


def test_a_margin_that_was_not_declared_is_called_so_wherever_it_counts(tmp_path: Path) -> None:
    results = load_results(sweep(tmp_path))
    (group,) = results.groups
    text = " ".join(answer_sentences(judge(group, WIDE)))
    assert "is shown to be kept (margin 0.500, chosen for this page; declared: 0.020): 20 % tokens kept, with" in text
    methods = methods_html(results, [judge(group, WIDE)], WIDE)
    assert "margin, which was chosen for this page in ROUGE-L vs full (0.500 instead of 0.020) and declared" in methods
    assert "margin, which was declared before measuring." in methods_html(results, [judge(group)])


def test_the_command_that_makes_the_page_again_has_every_choice(tmp_path: Path) -> None:
    results = replace(load_results(sweep(tmp_path), sweep="first"), folders=("my results",))
    drawn = again_html(results, WIDE)
    options = "--sweep=first --margin=ppl=0.02 --margin=rougeL_vs_full=0.5 --intersect"
    assert f"kvbench report &#x27;my results&#x27; {options}\n" in drawn
    assert drawn.count(options) == 3
    assert drawn in render_page(results, [], WIDE)
    assert "--" not in again_html(load_results(tmp_path)).split("--format")[0]


def test_policies_scored_on_other_samples_are_called_not_comparable(tmp_path: Path) -> None:
    write_cell(tmp_path, without_facts(body(policy="full", budget=None, num_samples=8)))
    for policy, num, score in (("h2o", 8, 0.8), ("elastic", 5, 0.5)):
        write_cell(tmp_path, scored(policy, num, score))
    (group,) = load_results(tmp_path).groups
    text = " ".join(answer_sentences(judge(group)))
    assert "do not decide" not in text
    assert re.search(r"`h2o` has the best ROUGE-L vs full so far, .* but is not comparable with `elastic` \(5", text)
    assert ", compared with none" in answer_html(judge(group))
    write_cell(tmp_path, scored("random", 8, 0.01))
    (group,) = load_results(tmp_path).groups
    text = " ".join(answer_sentences(judge(group)))
    assert re.search(r"take `h2o`: .*, better than `random`\. `h2o` is not comparable with `elastic` \(5 samples", text)
    assert "take <code>h2o</code>" in answer_html(judge(group))


def scored(policy: str, num_samples: int, score: float) -> dict[str, Any]:
    record = without_facts(body(policy=policy, num_samples=num_samples))
    for sample in record["samples"]:
        sample["rougeL_vs_full"] = score
    record["measurements"]["rougeL_vs_full"] |= {"value": score, "low": None, "high": None}
    return record


def test_the_interval_of_a_search_carries_its_confidence_and_another_margin_is_said() -> None:
    frontier = Frontier(
        name="f", measure="rougeL_vs_full", margin=0.1, ladder=(0.1, 0.2), budget_setting="fraction", confidence=0.975,
        num_cells=3, num_cells_of_grid=6, searches=(),
    )  # fmt: skip
    drawn = frontier_html([frontier])
    assert "at that budget, 97.5&nbsp;% interval" in drawn
    assert "The margin here is 0.1 and in the answer and the verdicts 0.02" in drawn
    assert "The margin here" not in frontier_html([frontier], Choices(margins={"rougeL_vs_full": 0.1}))


def test_noise_of_one_time_greys_its_own_columns(tmp_path: Path) -> None:
    record = body()
    record["measurements"]["ttft_spread_fraction"] = {"value": 0.05}
    write_cell(tmp_path / "first", record)
    (group,) = load_results(tmp_path / "first").groups
    drawn = latency_html(group)
    assert drawn.count('class="noisy"') == 3, "TTFT, its ratio and the policy's part of it"
    assert "noisy: TTFT</small>" in drawn
    record["measurements"]["tpot_spread_fraction"] = {"value": 0.05}
    del record["measurements"]["ttft_spread_fraction"]
    write_cell(tmp_path / "step", record)
    (group,) = load_results(tmp_path / "step").groups
    assert latency_html(group).count('class="noisy"') == 5, "TPOT, ratio, p90, policy, share of the roof"


def test_figures_and_definitions_hold_on_a_dark_page_and_on_a_cpu() -> None:
    assert not any("black" in kind.caption.lower() for kind in FIGURES.values())
    for text in (FIGURES["latency"].caption, measure("roof_ms").definition):
        assert "on a GPU no step" in text
