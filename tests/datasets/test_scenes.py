from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.datasets.scenes import (
    COLOURS,
    NUMBERS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Scenes,
    describe,
    draw_scene,
    follow_up_turns,
    parse_objects,
    scene_at,
)
from kvbench.errors import ConfigError
from tests.covering import share_of

SCENES = st.builds(scene_at, st.sampled_from(("train", "test")), st.integers(0, 10**9))
few = settings(max_examples=share_of(60), deadline=None, derandomize=True)


@given(SCENES)
@few
def test_objects_have_cells_and_looks_of_their_own(scene: Scene) -> None:
    cells = [(item.row, item.column) for item in scene.objects]
    looks = {(item.size, item.texture, item.colour, item.shape) for item in scene.objects}
    assert cells == sorted(set(cells))
    assert len(looks) == len(cells)
    assert 4 <= len(cells) <= 8
    assert all(0 <= row < 4 and 0 <= column < 4 for row, column in cells)
    for item in scene.objects:
        assert item.size in SIZES
        assert item.texture in TEXTURES
        assert item.colour in COLOURS
        assert item.shape in SHAPES


@given(SCENES)
@few
def test_a_description_is_read_back_as_the_truth(scene: Scene) -> None:
    assert parse_objects(describe(scene)) == frozenset(scene.objects)
    assert describe(scene).startswith(f"There are {NUMBERS[len(scene.objects)]} objects. ")


@given(SCENES, st.text("rowclumn twhe,. \n", max_size=80))
@few
def test_reading_back_ignores_other_text(scene: Scene, text: str) -> None:
    assert parse_objects(describe(scene) + "\n" + text) >= frozenset(scene.objects)
    assert parse_objects(describe(scene)[:-1].replace("row", "raw")) == frozenset()


@given(st.integers(0, 10**6))
@few
def test_train_and_test_share_no_seed(index: int) -> None:
    train, test = scene_at("train", index), scene_at("test", index)
    assert train.name != test.name
    assert train.objects != test.objects
    assert scene_at("test", index) == test


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
        return NUMBERS[len([item for item in scene.objects if item.colour == match[1]])].capitalize() + "."
    if match := re.fullmatch(r"What is in row (\w+), column (\w+)\?", question):
        place = (NUMBERS.index(match[1]), NUMBERS.index(match[2]))
        for item in scene.objects:
            if (item.row + 1, item.column + 1) == place:
                return f"There is a {item.size} {item.texture} {item.colour} {item.shape}."
        return "There is nothing."
    match = re.fullmatch(r"Where is the (\w+) (\w+) (\w+) (\w+)\?", question)
    assert match is not None, question
    (item,) = (i for i in scene.objects if (i.size, i.texture, i.colour, i.shape) == match.groups())
    return f"In row {NUMBERS[item.row + 1]}, column {NUMBERS[item.column + 1]}."


def test_scenes_are_the_same_for_ever() -> None:
    truth = "".join(
        scene.name + describe(scene) + str(follow_up_turns(scene, 3))
        for split in ("train", "test")
        for scene in (scene_at(split, index) for index in range(20))
    )
    assert hashlib.sha256(truth.encode()).hexdigest()[:16] == "56c32f908b95f9b3"


@pytest.mark.parametrize(
    ("split", "index", "digest"),
    [("train", 0, "8739a8f47a7d3b26"), ("test", 0, "35cc1f9859fe04db"), ("test", 7, "b0f881d7539eb76e")],
)
def test_drawings_are_the_same_for_ever(split: str, index: int, digest: str) -> None:
    picture = draw_scene(scene_at(split, index))
    assert (picture.mode, picture.size) == ("RGB", (144, 144))
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:16] == digest


def test_examples_are_what_was_asked_for() -> None:
    examples = Scenes(num_samples=3, first=5).examples()
    assert [example.id for example in examples] == [f"scenes-v1/test/{index}" for index in (5, 6, 7)]
    for example in examples:
        assert example.facts == parse_objects(example.reference)
        assert example.load_image is not None
        assert example.load_image().tobytes() == draw_scene(scene_at("test", int(example.id.split("/")[-1]))).tobytes()


def test_follow_up_examples_share_the_cluster_of_their_scene() -> None:
    examples = Scenes(num_samples=2, ask="follow_up", num_follow_ups=3).examples()
    assert len({example.id for example in examples}) == 6
    assert [example.cluster for example in examples] == ["scenes-v1/test/0"] * 3 + ["scenes-v1/test/1"] * 3
    assert all(example.facts is None for example in examples)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "tst"}, "did you mean 'test'"),
        ({"ask": "descrbe"}, "did you mean 'describe'"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"first": -1}, "first=-1"),
        ({"num_follow_ups": 0}, "num_follow_ups=0"),
    ],
)
def test_a_wrong_setting_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Scenes(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("split", "index"), [("valid", 0), ("test", -1)])
def test_a_scene_that_does_not_exist_is_refused(split: str, index: int) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        scene_at(split, index)
