from __future__ import annotations

import re

import pytest

from kvbench.errors import ConfigError
from kvbench.measures import (
    MEASURES,
    bounds_on_scale,
    format_bytes,
    format_interval,
    format_value,
    format_with_interval,
    measure,
    measure_named,
    printed_scale,
)


def test_every_measurement_is_described_in_one_sentence() -> None:
    for name, known in MEASURES.items():
        assert known.name == name
        assert known.definition.endswith(".")
        assert ". " not in known.definition
        assert known.label
        assert known.better in ("higher", "lower", "none")


def test_names_carry_the_unit_that_the_registry_states() -> None:
    for name, known in MEASURES.items():
        for suffix, unit in (
            ("_bytes", "bytes"),
            ("_ms", "ms"),
            ("_fraction", "fraction"),
            ("_tokens_per_s", "tokens/s"),
        ):
            assert name.endswith(suffix) == (known.unit == unit)


def test_an_unknown_name_is_refused_with_close_matches() -> None:
    with pytest.raises(ConfigError, match="rougeL_vs_full"):
        measure("rougel_vs_ful")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ppl", 1.23456, "1.235"),
        ("ppl", 23456.0, "23,456"),
        ("ppl", 3.2e9, "3.2e+09"),
        ("rougeL_vs_full", 1.0, "1.000"),
        ("objects_recalled_fraction", 0.853, "85.3 %"),
        ("ttft_ms", 45.123, "45.1 ms"),
        ("tpot_ratio_to_full", 1.049, "1.05x"),
        ("kl_to_full", 1.2e-5, "1.2e-05 nats"),
        ("kv_stored_bytes", 0.0, "0 B"),
        ("kv_stored_bytes", 3 * 2**20, "3.00 MiB"),
        ("kv_stored_bytes", None, "-"),
    ],
)
def test_values_are_printed_with_their_unit(name: str, value: float | None, text: str) -> None:
    assert format_value(name, value) == text


def test_an_interval_is_printed_in_the_scale_of_its_value() -> None:
    assert format_with_interval("ppl", 1.2, 1.1, 1.36) == "1.200 [1.100, 1.360]"
    assert format_with_interval("peak_memory_bytes", 2.0**20, 1000 * 2.0**10, 2.0**21) == "1.00 MiB [0.98, 2.00]"
    assert format_with_interval("objects_recalled_fraction", 0.85, 0.81, 0.88) == "85.0 % [81.0, 88.0]"


def test_half_an_interval_is_no_interval() -> None:
    assert format_interval("ppl", 1.2, 1.1, None) == ""
    assert format_with_interval("ppl", 1.2, None, 1.3) == "1.200"


def test_axes_and_tables_use_the_same_scale() -> None:
    assert printed_scale("kv_stored_bytes", 5e6) == (2.0**20, "MiB")
    assert printed_scale("tpot_ratio_to_full", 1.0) == (1.0, "x full")
    assert format_bytes(1536) == "1.50 KiB"


def test_a_bandwidth_is_printed_in_powers_of_ten() -> None:
    assert format_value("copy_bandwidth_bytes_per_s", 3.05e12) == "3.05 TB/s"
    assert format_value("copy_bandwidth_bytes_per_s", 12.34e9) == "12.3 GB/s"
    assert format_value("capacity_prompts", 48.0) == "48 prompts"


@pytest.mark.parametrize(
    ("name", "interval", "cut"),
    [
        ("rougeL_vs_full", (-2.93, 3.43), (0.0, 1.0)),
        ("turn2_needles_recalled_fraction", (-0.1, 0.4), (0.0, 0.4)),
        ("ppl", (0.2, 9.0), (1.0, 9.0)),
        ("kl_to_full", (-0.5, 2.0), (0.0, 2.0)),
        ("length_ratio", (-0.45, 1.1), (0.0, 1.1)),
        ("roof_share_fraction", (-0.1, 1.2), (0.0, 1.2)),
        ("a_measure_of_ones_own", (-3.0, 3.0), (-3.0, 3.0)),
    ],
)
def test_no_interval_goes_beyond_what_the_measure_can_be(
    name: str, interval: tuple[float, float], cut: tuple[float, float]
) -> None:
    assert bounds_on_scale(name, 1.0 if name == "ppl" else 0.25, *interval) == cut


def test_a_value_that_rounding_put_off_the_scale_stays_in_its_interval() -> None:
    assert bounds_on_scale("kl_to_full", -1e-9, -2e-9, 0.1) == (-1e-9, 0.1)


def test_a_measure_is_meant_by_its_name_its_label_and_its_title() -> None:
    for name, known in MEASURES.items():
        for text in (name, name.upper(), known.label, known.title):
            assert measure_named("--measure", text) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [("tpot", "tpot_ms"), ("kl", "kl_to_full"), ("rouge-1 vs f", "rouge1_vs_full"), ("kv_stor", "kv_stored_bytes"),
     ("agreement", "top1_agreement_fraction"), ("Perplexity", "ppl"), ("turn2_ex", "turn2_exact_fraction"),
     ("TPOT / full", "tpot_ratio_to_full"), ("divergent", "first_divergence_tokens")],
)  # fmt: skip
def test_an_unambiguous_beginning_is_enough(text: str, name: str) -> None:
    assert measure_named("--measure", text) == name


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rougeL_vs", "which may be any of rougeL_vs_full, rougeL_vs_reference; give one of them"),
        ("rouge", "which may be any of rougeL_released_vs_full, rouge1_vs_full, rouge2_vs_full, rougeL_vs_full, "),
        ("divergence", "which may be any of first_divergence_tokens, kl_to_full; give one of them"),
        ("turn", "more; give one of them"),
        ("pppl", "did you mean 'ppl'?"),
        ("rougL", "did you mean 'rougeL_released_vs_full' or 'rougeL_vs_full' or 'rougeL_vs_reference'?"),
        ("quality", "--measure is 'quality'; kvbench measures lists them"),
        ("", "--measure is ''; kvbench measures lists them"),
        ("--", "kvbench measures lists them"),
    ],
)
def test_a_name_that_is_several_measures_or_none_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)) as error:
        measure_named("--measure", text)
    assert "\n" not in str(error.value)


def test_a_measure_that_may_not_be_asked_for_there_is_not_taken_for_another_one() -> None:
    with pytest.raises(ConfigError, match="measure is 'tpot_ms'"):
        measure_named("measure", "tpot_ms", ["ppl"])
    with pytest.raises(ConfigError, match="measure is 'ppl'"):
        measure_named("measure", "ppl", ["ppl_released"])
    assert measure_named("measure", "rougeL", ["ppl", "rougeL_vs_full"]) == "rougeL_vs_full"
