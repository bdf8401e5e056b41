from __future__ import annotations

from pathlib import Path
from typing import Any

from kvbench.report.findings import below_random, not_monotone, notes_of
from kvbench.report.load import Group, load_results
from kvbench.report.tables import counts_text
from tests.autopsy.autopsies import add_autopsies
from tests.report.synthetic import body, write_cell, write_sweep


def group_of(folder: Path, *records: dict[str, Any]) -> Group:
    for record in records:
        write_cell(folder, record)
    return load_results(folder).groups[0]


def text_of(group: Group) -> str:
    return "\n".join("\n".join((note.text, *note.details)) for note in notes_of(group))


def test_policies_below_random_are_named_with_a_reason_that_the_numbers_bear_out(sweep_folder: Path) -> None:
    group = load_results(sweep_folder).groups[0]
    assert list(below_random(group)) == ["streaming_llm"]
    text = text_of(group)
    assert "`random` is not the worst policy: `streaming_llm`" in text
    assert "drops the picture" in text
    assert "objects recalled agree" in text


def test_the_reason_is_called_unchecked_where_objects_were_not_counted(tmp_path: Path) -> None:
    records = [body(policy="random"), body(policy="streaming_llm")]
    for record in records:
        del record["measurements"]["objects_recalled_fraction"]
    text = text_of(group_of(tmp_path, *records))
    assert "can not tell" in text
    assert "drops what stands between them" in text
    assert "picture" not in text, "of a prompt without a picture nothing is said of one"


def test_scores_below_random_that_may_be_chance_are_called_so(tmp_path: Path) -> None:
    twin, other = body(policy="random"), body(policy="elastic")
    other["samples"], other["measurements"] = twin["samples"], dict(twin["measurements"])
    other["measurements"]["ppl"] = other["measurements"]["ppl"] | {"value": 99.0}
    text = text_of(group_of(tmp_path, twin, other))
    assert "`random` scores above `elastic` somewhere" in text
    assert "may be chance" in text
    labels = "PPL, ROUGE-L vs full, ROUGE-L vs reference, KL to full, top-1 agreement and objects recalled"
    assert f"Looked at: {labels}; 6 differences with one correction (Holm)." in text


def test_a_policy_below_random_in_any_declared_measure_alone_is_found(tmp_path: Path) -> None:
    baseline, other = body(policy="random"), body(policy="h2o")
    for record, agreeing in ((baseline, 90), (other, 60)):
        for index, sample in enumerate(record["samples"]):
            sample |= {"num_agreeing_tokens": agreeing + index % 5, "num_compared_tokens": 100}
        record["measurements"]["top1_agreement_fraction"] |= {"value": agreeing / 100 + 0.02}
    group = group_of(tmp_path, baseline, other)
    assert [one.name for one in below_random(group)["h2o"] if one.is_clear] == ["top1_agreement_fraction"]
    assert "`random` is not the worst policy: `h2o` scores below it at 20 % tokens kept (top-1 agreement). " in text_of(
        group
    )


def test_policies_below_random_for_one_reason_share_a_note(tmp_path: Path) -> None:
    records = [scored(0.1 + number / 100, policy=f"own{number}") for number in range(3)]
    found = [note for note in notes_of(group_of(tmp_path, scored(0.5, policy="random"), *records))
             if "not the worst" in note.text]  # fmt: skip
    assert [note.text.partition(". ")[0] for note in found] == [
        "`random` is not the worst policy: `own0`, `own1` and `own2` score below it"
    ]
    assert [line.partition(":")[0] for line in found[0].details[:3]] == [
        f"own{number}, 20 % tokens kept, ROUGE-L vs full" for number in range(3)
    ]


def test_what_only_many_looks_find_below_random_is_called_chance(tmp_path: Path) -> None:
    records = [scored(0.487 if number == 0 else 0.5, spread=0.03, policy=f"own{number}") for number in range(12)]
    group = group_of(tmp_path, scored(0.5, policy="random"), *records)
    (contrast,) = below_random(group)["own0"]
    assert contrast.difference.high is not None
    assert contrast.difference.high < 0, "alone it would be clear"
    assert contrast.difference.p_value is not None
    assert contrast.difference.p_value < 0.05
    assert not contrast.is_clear
    text = text_of(group)
    assert "not clear after Holm's correction" in text
    assert "12 differences with one correction (Holm)." in text


def scored(score: float, *, spread: float = 0.0, **labels: Any) -> dict[str, Any]:
    """Return a cell whose only quality is a ROUGE-L around `score`, differently on every sample."""
    record = body(**labels)
    for index, sample in enumerate(record["samples"]):
        sample["rougeL_vs_full"] = score + spread * (1 if index % 2 else -1)
    measured = record["measurements"]["rougeL_vs_full"] | {"value": score}
    return record | {"measurements": {"rougeL_vs_full": measured}}


def test_random_at_the_bottom_is_said_of_what_was_compared_and_how_clearly(tmp_path: Path) -> None:
    records = [scored(0.2, policy="random"), scored(0.5, policy="elastic"), scored(0.9, policy="elastic", budget=0.5)]
    text = text_of(group_of(tmp_path, *records, scored(0.201, spread=0.1, policy="h2o")))
    assert (
        "No policy scores below `random` in ROUGE-L vs full at 20 % tokens kept, as it should be; "
        "1 of 2 differences are clear after Holm's correction for all of them, the others may be chance."
    ) in text
    assert "Quality (ROUGE-L vs full) never rises where the budget shrinks, as it should be; 1 of 1 steps" in text


def test_nothing_is_praised_where_no_quality_was_compared(tmp_path: Path) -> None:
    records = [body(policy=policy, budget=budget) for policy in ("random", "h2o") for budget in (0.1, 0.2)]
    for record in (*records, full := body(policy="full", budget=None)):
        times = {name: one for name, one in record["measurements"].items() if name.endswith("_ms")}
        record |= {"measurements": times, "samples": []}
    group = group_of(tmp_path, *records, full)
    assert notes_of(group) == []
    one = group_of(tmp_path / "one", scored(0.5, policy="h2o"), scored(0.2, policy="random", budget=0.1))
    assert "below `random`" not in text_of(one), "at no budget are there two"


def test_policies_are_named_below_random_only_where_that_is_clear(tmp_path: Path) -> None:
    records = [scored(0.5, policy="random", budget=budget) for budget in (0.1, 0.2)]
    records += [scored(0.2, policy="h2o", budget=0.1), scored(0.499, spread=0.1, policy="h2o", budget=0.2)]
    text = text_of(group_of(tmp_path, *records))
    assert "`h2o` scores below it at 10 % tokens kept (ROUGE-L vs full). " in text
    assert "20 % tokens kept, ROUGE-L vs full: 0.499" in text, "the other one stays in the details"
    assert "undecided" in text
    assert "which tokens were kept was not recorded" in text
    add_autopsies(tmp_path)
    assert '"What the cache kept" shows' in text_of(load_results(tmp_path).groups[0])


def test_noise_of_the_first_token_is_named_as_that_of_the_steps_is(tmp_path: Path) -> None:
    record, drifting = body(policy="h2o"), body(policy="random")
    record["measurements"]["ttft_spread_fraction"] = {"value": 0.05}
    drifting["measurements"]["reference_drift_fraction"] = {"value": 0.04}
    details = [note.details for note in notes_of(group_of(tmp_path, record, drifting)) if "noisy" in note.text]
    assert details == [
        (
            "h2o, 20 % tokens kept: TTFT: runs of one setting spread by 5.0%, over 3%",
            "random, 20 % tokens kept: a reference kernel drifted by 4.0%, over 2%",
        )
    ]


def test_the_header_and_the_care_count_noisy_times_alike_and_say_which(tmp_path: Path) -> None:
    record, status_alone = body(policy="h2o"), body(policy="random", status="noisy")
    record["measurements"]["ttft_spread_fraction"] = {"value": 0.05}
    group = group_of(tmp_path, record, status_alone)
    assert counts_text(group.cells) == f"{len(group.cells)} cells: {len(group.cells)} ok; TPOT noisy in 1, TTFT in 2"
    assert f"TPOT noisy in 1, TTFT in 2 of {len(group.cells)} cells: read these times as a rough guide." in [
        note.text for note in notes_of(group)
    ]


def test_quality_that_rises_as_the_budget_falls_is_flagged(tmp_path: Path) -> None:
    small, large = body(policy="h2o", budget=0.1), body(policy="h2o", budget=0.5)
    small["samples"], large["samples"] = large["samples"], small["samples"]
    small["measurements"], large["measurements"] = large["measurements"], small["measurements"]
    group = group_of(tmp_path, small, large)
    assert {contrast.name for contrast in not_monotone(group)} >= {"ppl", "rougeL_vs_full"}
    assert "clearly worse where the budget grows" in text_of(group)


def test_failures_few_samples_and_unequal_machines_are_noted(tmp_path: Path) -> None:
    other = body(policy="elastic", num_samples=4)
    other["environment"]["device"] = "cuda"
    text = text_of(group_of(tmp_path, body(), other, body(policy="random", status="timeout")))
    for wanted in ("1 of 3 cells failed", "timeout in decode", "only 4 samples", "device: cpu, cuda", "not measured"):
        assert wanted in text


def test_a_copy_that_is_far_off_those_of_its_machine_and_sweep_is_named(tmp_path: Path) -> None:
    records = []
    for number, bandwidth in enumerate((31e9, 32e9, 33e9, 12e9, 34e9, 31.5e9, 32.5e9)):
        records.append(body(policy=f"own{number}"))
        records[-1]["measurements"]["copy_bandwidth_bytes_per_s"] = {"value": bandwidth, "n": 1}
    found = [note for note in notes_of(group_of(tmp_path, *records)) if "copy" in note.text]
    assert [(note.text, note.details) for note in found] == [
        (
            "A copy was far off the bandwidth of its machine and sweep, 32.0 GB/s [12.0, 34.0], n = 7; "
            "the roofs use that median.",
            ("own3, 20 % tokens kept: 12.0 GB/s",),
        )
    ]


def test_full_alone_needs_no_policy(tmp_path: Path) -> None:
    write_sweep(tmp_path / "a")
    group = group_of(tmp_path / "b", body(policy="full", budget=None))
    assert notes_of(group) == []
