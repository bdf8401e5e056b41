from __future__ import annotations

import hashlib
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.bundled.tiny_llava import PATCH_PIXELS
from kvbench.datasets.scenes import (
    CELL_PIXELS,
    COLOURS,
    GRID_CELLS,
    MAX_OBJECTS,
    MIN_OBJECTS,
    NUMBERS,
    PLURALS,
    RADII,
    SHAPES,
    SPLITS,
    Scene,
    Scenes,
    describe,
    draw_scene,
    drawing_of,
    follow_up_turns,
    parse_objects,
    scene_at,
    sprite,
)
from kvbench.errors import ConfigError
from tests.covering import share_of

SCENES = st.builds(scene_at, st.sampled_from(SPLITS), st.integers(0, 10**9))
few = settings(max_examples=share_of(60), deadline=None, derandomize=True)


@given(SCENES)
@few
def test_objects_have_cells_and_looks_of_their_own(scene: Scene) -> None:
    cells = [(item.row, item.column) for item in scene.objects]
    assert cells == sorted(set(cells))
    assert len({item.look for item in scene.objects}) == len(cells)
    assert MIN_OBJECTS <= len(cells) <= MAX_OBJECTS
    assert all(0 <= row < GRID_CELLS and 0 <= column < GRID_CELLS for row, column in cells)
    assert all(item.colour in COLOURS and item.shape in SHAPES for item in scene.objects)


@given(SCENES)
@few
def test_an_object_stays_within_its_cell(scene: Scene) -> None:
    drawing = drawing_of(scene)
    half = CELL_PIXELS // 2
    for item, radius, (x, y) in zip(scene.objects, drawing.radii, drawing.centres, strict=True):
        assert abs(x - item.column * CELL_PIXELS - half) + radius < half
        assert abs(y - item.row * CELL_PIXELS - half) + radius < half


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_many_patches_and_grows_with_its_radius(shape: str) -> None:
    side = CELL_PIXELS // PATCH_PIXELS
    shares = [sprite(shape, radius).reshape(side, PATCH_PIXELS, side, PATCH_PIXELS) / 255 for radius in RADII]
    covered = [int((share.mean(axis=(1, 3)) > 0.1).sum()) for share in shares]
    assert covered[0] >= 8
    assert covered[-1] <= 32
    assert all(before.sum() < after.sum() for before, after in pairwise(shares))


@given(SCENES)
@few
def test_a_description_is_read_back_as_the_truth(scene: Scene) -> None:
    assert parse_objects(describe(scene)) == frozenset(scene.objects)
    assert describe(scene).startswith(f"{NUMBERS[len(scene.objects)].capitalize()} objects: ")


@given(SCENES, st.text("ABrowed 12,. \n", max_size=80))
@few
def test_reading_back_ignores_other_text(scene: Scene, text: str) -> None:
    assert parse_objects(describe(scene) + "\n" + text) >= frozenset(scene.objects)
    assert parse_objects(re.sub(r"([A-D])([1-4])", r"\1 \2", describe(scene))) == frozenset()


@given(st.integers(0, 10**6))
@few
def test_splits_share_no_seed(index: int) -> None:
    scenes = [scene_at(split, index) for split in SPLITS]
    assert len({scene.name for scene in scenes}) == len(SPLITS)
    assert len({scene.objects for scene in scenes}) == len(SPLITS)
    assert scenes == [scene_at(split, index) for split in SPLITS]


@given(SCENES)
@few
def test_a_follow_up_answer_follows_from_the_truth(scene: Scene) -> None:
    turns = follow_up_turns(scene, 4)
    assert turns == follow_up_turns(scene, 4)
    for turn in turns:
        assert turn.answer == _answer(scene, turn.question)


def _answer(scene: Scene, question: str) -> str:
    """Work the answer out again, from the question's words and the truth alone."""
    if match := re.fullmatch(r"How many (\w+) objects are there\?", question):
        return NUMBERS[[item.colour for item in scene.objects].count(match[1])].capitalize() + "."
    if match := re.fullmatch(r"How many (\w+) are there\?", question):
        return NUMBERS[[PLURALS[item.shape] for item in scene.objects].count(match[1])].capitalize() + "."
    if match := re.fullmatch(r"What is in (\w\d)\?", question):
        found = [item.look for item in scene.objects if item.cell == match[1]]
        return f"{match[1]} {found[0] if found else 'nothing'}."
    if match := re.fullmatch(r"Describe row (\w)\.", question):
        return ", ".join(f"{item.cell} {item.look}" for item in scene.objects if item.cell[0] == match[1]) + "."
    match = re.fullmatch(r"Where is the (\w+) (\w+)\?", question)
    assert match is not None, question
    (item,) = (item for item in scene.objects if (item.colour, item.shape) == match.groups())
    return f"In {item.cell}."


def test_every_kind_of_question_is_asked() -> None:
    asked = {turn.question.split()[0] for index in range(20) for turn in follow_up_turns(scene_at("test", index), 3)}
    assert asked == {"What", "Where", "How", "Describe"}


def test_scenes_are_the_same_for_ever() -> None:
    truth = "".join(
        scene.name + describe(scene) + str(follow_up_turns(scene, 3))
        for split in SPLITS
        for scene in (scene_at(split, index) for index in range(20))
    )
    assert hashlib.sha256(truth.encode()).hexdigest()[:16] == "ef10a144885ea82a"


@pytest.mark.parametrize(
    ("split", "index", "digest"),
    [("train", 0, "5077c7180727704b"), ("test", 0, "94936adc670f5745"), ("test", 7, "58eda0117234b11e")],
)
def test_drawings_are_the_same_for_ever(split: str, index: int, digest: str) -> None:
    picture = draw_scene(scene_at(split, index))
    assert (picture.mode, picture.size) == ("RGB", (144, 144))
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:16] == digest


def test_examples_are_what_was_asked_for() -> None:
    examples = Scenes(num_samples=3, first=5).examples()
    assert [example.id for example in examples] == [f"scenes-v2/test/{index}" for index in (5, 6, 7)]
    for example in examples:
        assert example.facts == parse_objects(example.reference)
        assert example.load_image is not None
        assert example.load_image().tobytes() == draw_scene(scene_at("test", int(example.id.split("/")[-1]))).tobytes()


def test_follow_up_examples_share_the_cluster_of_their_scene() -> None:
    examples = Scenes(num_samples=2, ask="follow_up", num_follow_ups=3).examples()
    assert len({example.id for example in examples}) == 6
    assert [example.cluster for example in examples] == ["scenes-v2/test/0"] * 3 + ["scenes-v2/test/1"] * 3
    assert all(example.facts is None and example.one_answer for example in examples)


def test_both_are_the_description_of_a_scene_and_then_its_questions() -> None:
    alone, asked, both = (Scenes(num_samples=2, ask=ask).examples() for ask in ("describe", "follow_up", "both"))
    assert not any(example.one_answer for example in alone)
    assert [example.id for example in both] == [
        name for number in range(2) for name in (alone[number].id, *(one.id for one in asked[3 * number :][:3]))
    ]
    assert {example.cluster for example in both} == {example.cluster for example in alone}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "tst"}, "did you mean 'test'"),
        ({"ask": "descrbe"}, "did you mean 'describe'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"first": -1}, "first is -1"),
        ({"num_follow_ups": 0}, "num_follow_ups is 0"),
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Scenes(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("split", "index"), [("valid", 0), ("test", -1)])
def test_a_scene_that_does_not_exist_is_refused(split: str, index: int) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        scene_at(split, index)
