"""A path that does not exist is said to be missing, with what is there under nearly that name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.datasets.questions import Conversation, MMVet
from kvbench.datasets.retrieval import Needles
from kvbench.datasets.text import TextWindows
from kvbench.errors import missing_path, near_paths
from kvbench.models.spec import ModelSpec
from tests.datasets.files import refusal, write_json, write_picture


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for folder in ("checkpoints/mine-7b", "checkpoints/other", "data/pictures"):
        (tmp_path / folder).mkdir(parents=True)
    write_json(tmp_path / "data" / "talks.json", [{"question": "q", "answer": "a", "image": "p.png"}])
    write_json(tmp_path / "data" / "asked-of-pictures.json", {"v1_0": {}})
    write_picture(tmp_path / "data" / "pictures" / "p.png")
    (tmp_path / "data" / "book.txt").write_text("One sentence. Another one.")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("checkpoints/mine-7", ["checkpoints/mine-7b"]),
        ("chekpoints/mine_7b", ["checkpoints/mine-7b"]),
        ("chekpoints/mine-7b", ["checkpoints/mine-7b"]),
        ("data/talk.jsn", ["data/talks.json"]),
        ("./data/../dta/talks.json", ["data/../data/talks.json"]),
        ("checkpoints/nothing-like-it", []),
        ("xyz/mine-7b", []),
        ("data/book.txt/x", []),
    ],
)
def test_close_matches_are_looked_for_at_every_level(here: Path, typed: str, near: list[str]) -> None:
    assert list(map(str, near_paths(Path(typed)))) == near
    assert list(map(str, near_paths(here / typed))) == [str(here / found) for found in near]


def test_without_a_close_match_the_folder_that_is_there_is_named(here: Path) -> None:
    assert missing_path(Path("data/xyz/a.json")) == f"there is no such file or folder: {here / 'data'} holds no 'xyz'"
    assert missing_path(Path("data/talk.json")) == "there is no such file or folder; did you mean 'data/talks.json'?"


@pytest.mark.parametrize("typed", ["chekpoints/mine-7b", "checkpoints/mine-7", "./checkpoints/mine-7"])
def test_a_mistyped_folder_of_a_model_is_not_told_to_pin_a_revision_first(here: Path, typed: str) -> None:
    message = refusal(lambda: ModelSpec(checkpoint=typed))
    assert message.startswith(f"model.checkpoint is {typed!r}")
    assert "there is no such file or folder; did you mean 'checkpoints/mine-7b'?" in message


def test_a_name_in_a_folder_that_exists_is_taken_for_a_path(here: Path) -> None:
    message = refusal(lambda: ModelSpec(checkpoint="checkpoints/zzz"))
    assert f"there is no such file or folder: {here / 'checkpoints'} holds no 'zzz'" in message
    assert "a checkpoint of that name on the hub needs model.revision" in message


def test_a_hub_name_is_told_to_pin_and_that_no_folder_is_there(here: Path) -> None:
    message = refusal(lambda: ModelSpec(checkpoint="llava-hf/llava-1.5-7b-hf"))
    assert message.startswith("model.revision is None; a hub checkpoint must be pinned")
    assert "model.checkpoint is 'llava-hf/llava-1.5-7b-hf': no folder of that name is here" in message


def test_a_name_near_the_bundled_one_and_a_file_are_told(here: Path) -> None:
    assert "did you mean 'bundled'?" in refusal(lambda: ModelSpec(checkpoint="bundeld"))
    assert "is a file" in refusal(lambda: ModelSpec(checkpoint="data/talks.json"))
    random = refusal(lambda: ModelSpec(checkpoint="checkpoints/mine-7", weights="random"))
    assert "did you mean 'checkpoints/mine-7b'?" in random


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "path": (lambda: Conversation(path="data/talk.json"), "dataset.path data/talk.json cannot be read"),
    "ids": (
        lambda: MMVet(path="data/asked-of-pictures.json", ids="data/talk.json"),
        "dataset.ids data/talk.json cannot be read",
    ),
    "running text": (lambda: TextWindows(path="data/bok.txt"), "dataset.path data/bok.txt cannot be read"),
    "filler": (lambda: Needles(filler="data/bok.txt"), "dataset.filler data/bok.txt cannot be read"),
    "images": (
        lambda: Conversation(path="data/talks.json", images="data/picture", on_bad_item="skip"),
        "dataset.images data/picture cannot be read",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_a_mistyped_data_file_is_told_what_is_near(here: Path, name: str) -> None:
    make, begin = DATA[name]
    message = refusal(make)
    assert message.startswith(f"{begin} (there is no such file or folder; did you mean 'data/")
    assert "'?); give a " in message


def test_pictures_in_the_folder_that_was_meant_are_found(here: Path) -> None:
    assert len(Conversation(path="data/talks.json", images="data/pictures").examples()) == 1
