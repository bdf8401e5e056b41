from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kvbench.report.figures.living import look_of
from kvbench.report.figures.style import BUNDLED, COLOUR_NAMES, DARK, LIGHT, OTHERS, PLOT_STYLE, THEMES, Palette, Theme
from tests.report.figures.colour_vision import VISIONS, contrast, distance

REPO = Path(__file__).parents[3]
NAMES = st.lists(st.text("abcxyz_0", min_size=1, max_size=8), unique=True, max_size=len(OTHERS))
SERIES = ("ink", "grey", "orange", "blue", "green", "purple", "sky", "vermilion", "brown")
SMALLEST = 9.0


def smallest_distance(theme: Theme) -> tuple[float, str, str, str]:
    """Return the smallest distance between two colours of series, and between which it is for whom."""
    pairs = itertools.combinations(SERIES, 2)
    return min(
        (distance(getattr(theme, one), getattr(theme, two), vision), one, two, vision)
        for one, two in pairs
        for vision in VISIONS
    )


@pytest.mark.parametrize("style", THEMES)
def test_readers_with_colour_blindness_can_tell_all_colours_apart(style: str) -> None:
    found = smallest_distance(THEMES[style])
    print(f"{style}: smallest distance {found[0]:.1f}, {found[1]} and {found[2]}, {found[3]}")
    assert found[0] >= SMALLEST


def test_the_simulation_knows_a_palette_that_fails() -> None:
    assert distance("#00a000", "#b06000", "deuteranopia") < SMALLEST < distance("#00a000", "#b06000", "normal")
    assert distance("#123456", "#123456", "tritanopia") == 0
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_everything_stands_out_from_the_paper(theme: Theme) -> None:
    assert all(contrast(getattr(theme, name), theme.paper) >= 2.5 for name in SERIES)
    assert all(contrast(text, theme.paper) >= 4.5 for text in (theme.ink, theme.muted))


def test_a_policy_of_the_shipped_experiments_has_a_look_of_its_own_in_every_report() -> None:
    """Readable in grey: a marker says it alone, and policies of one colour differ in their line too."""
    swept: set[str] = set()
    for path in (REPO / "conf/experiment").glob("*.yaml"):
        params = OmegaConf.select(OmegaConf.load(path), "hydra.sweeper.params") or {}
        if not any(name.startswith("+policy/") for name in params):  # a score with parts is another policy
            named = str(params.get("policy", ""))
            swept |= set() if named.startswith("glob(") else {name for name in named.split(",") if name}
    assert swept <= set(BUNDLED) <= {path.stem for path in (REPO / "conf/policy").glob("*.yaml")}
    assert len({shape.marker for shape in BUNDLED.values()}) == len(BUNDLED)
    looks = [(shape.colour, str(shape.line)) for shape in BUNDLED.values()]
    assert len(set(looks)) == len(looks)


def test_looks_of_other_policies_are_never_those_of_bundled_ones() -> None:
    assert len({(shape.colour, shape.marker, str(shape.line)) for shape in OTHERS}) == len(OTHERS)
    assert not {shape.colour for shape in OTHERS} & {shape.colour for shape in BUNDLED.values()}
    assert not {shape.marker for shape in OTHERS} & {shape.marker for shape in BUNDLED.values()}


@given(NAMES)
def test_no_two_policies_of_one_report_look_the_same(names: list[str]) -> None:
    palette = Palette([*names, *BUNDLED])
    looks = [str(palette.mark(name)) for name in {*names, *BUNDLED}]
    assert len(set(looks)) == len(looks)


@given(NAMES, st.randoms(use_true_random=False))
def test_a_look_depends_neither_on_order_nor_on_repetition(names: list[str], random: object) -> None:
    shuffled = [*names, *names[:3]]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, two = Palette(names), Palette(shuffled)
    assert [one.mark(name) for name in names] == [two.mark(name) for name in names]


@pytest.mark.long
@given(st.text(min_size=1, max_size=12), st.sets(st.sampled_from(sorted(BUNDLED))))
def test_a_policy_looks_the_same_whatever_bundled_ones_stand_beside_it(name: str, others: set[str]) -> None:
    assert Palette([name]).mark(name) == Palette([name, *others]).mark(name)


def test_a_look_that_was_published_stays() -> None:
    """A change here changes every figure of everyone; it belongs in the changelog."""
    palette = Palette(["h2o", "mine", "my_policy"])
    assert (palette.mark("h2o").colour, palette.mark("h2o").marker) == ("#004a8c", "o")
    assert [palette.mark(name).colour for name in ("mine", "my_policy")] == [LIGHT.vermilion, LIGHT.sky]


def test_position_modes_and_twins_of_one_policy_differ_in_their_fill() -> None:
    palette = Palette(["h2o"])
    fills = [palette.mark("h2o", positions).fill for positions in ("original", "in_cache", "released")]
    assert len(set(fills)) == 3
    assert palette.mark("h2o", "original", 1) != palette.mark("h2o", "original", 0)


def test_more_policies_than_looks_still_get_one() -> None:
    names = [f"p{i}" for i in range(2 * len(OTHERS))]
    assert all(Palette(names).mark(name).colour for name in names)


def test_a_page_can_swap_every_colour() -> None:
    assert len(COLOUR_NAMES) == 12
    for colour, name in COLOUR_NAMES.items():
        assert getattr(LIGHT, name) == colour
        assert PLOT_STYLE.count(f"--plot-{name}: {getattr(DARK, name)};") == 2


def test_every_marker_is_an_outline_that_the_page_can_draw() -> None:
    palette = Palette([*BUNDLED, *(f"p{i}" for i in range(len(OTHERS)))])
    for name in BUNDLED:
        look = look_of(palette.mark(name))
        assert look["colour"] in COLOUR_NAMES.values()
        numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", look["outline"])]
        assert look["outline"].startswith("M")
        assert 0.3 < max(map(abs, numbers)) <= 0.72, name
    looks = {json.dumps(look_of(palette.mark(f"p{i}"))) for i in range(len(OTHERS))}
    assert len(looks) == len(OTHERS)
