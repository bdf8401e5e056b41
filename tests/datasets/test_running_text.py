from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.config.build import build
from kvbench.config.compose import compose_grid
from kvbench.datasets.base import Window
from kvbench.datasets.retrieval import Needles, Recall
from kvbench.datasets.text import _BUNDLED, TextWindows
from tests.covering import share_of
from tests.datasets.files import refusal

WORDS = " ".join(f"w{number}" for number in range(1000))  # 4,889 characters
SMALL = {"prompt_tokens": 40, "scored_tokens": 10, "chars_per_token": 4.0}


def write(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode())
    return str(path)


def test_windows_begin_at_words_and_do_not_overlap(tmp_path: Path) -> None:
    examples = TextWindows(path=write(tmp_path / "book.txt", WORDS), **SMALL).examples()
    assert len(examples) == len(WORDS) // 200
    place = 0
    for number, example in enumerate(examples):
        begin = WORDS.index(example.question, place)
        assert 200 * number <= begin < 200 * number + 6
        assert begin == 0 or WORDS[begin - 1] == " "
        assert len(example.question) <= 200
        assert example.window == Window(prompt_tokens=40, scored_tokens=10)
        assert (example.id, example.cluster, example.reference) == (f"book.txt/{number}", f"book.txt/{number}", "")
        place = begin + len(example.question)


@settings(max_examples=share_of(50), deadline=None)
@given(text=st.text(min_size=60, max_size=400), size=st.integers(10, 60))
def test_windows_are_parts_of_any_text_in_order(tmp_path_factory: pytest.TempPathFactory, text: str, size: int) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    try:
        path.write_bytes(text.encode())
    except UnicodeEncodeError:
        return
    options = {"prompt_tokens": size - 1, "scored_tokens": 1, "chars_per_token": 1.0}
    data = TextWindows(path=write(path, "begin " + text), **options, on_bad_item="skip")
    whole, place = ("begin " + text).replace("\r\n", "\n").removeprefix("\ufeff"), 0
    for example in data.examples():
        place = whole.index(example.question, place) + len(example.question)


def test_a_folder_gives_the_first_windows_of_each_book(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        write(tmp_path / "books" / name, f"{name} {WORDS}")
    (tmp_path / "books" / "notes.md").write_text("not a book")
    data = TextWindows(path=str(tmp_path / "books"), windows_per_file=2, **SMALL)
    assert [(e.id, e.cluster) for e in data.examples()] == [
        ("a.txt/0", "a.txt"),
        ("a.txt/1", "a.txt"),
        ("b.txt/0", "b.txt"),
        ("b.txt/1", "b.txt"),
    ]


def test_a_table_is_joined(tmp_path: Path) -> None:
    parts = [WORDS[start : start + 500] for start in range(0, len(WORDS), 500)]
    pd.DataFrame({"text": parts}).to_parquet(tmp_path / "wiki.parquet")
    data = TextWindows(path=str(tmp_path / "wiki.parquet"), joiner="", **SMALL)
    whole = TextWindows(path=write(tmp_path / "book.txt", WORDS), **SMALL)
    assert [e.question for e in data.examples()] == [e.question for e in whole.examples()]
    assert "row 0 has no text 'body'" in refusal(
        lambda: TextWindows(path=str(tmp_path / "wiki.parquet"), column="body")
    )


def test_windows_lines_end_as_unix_lines_do(tmp_path: Path) -> None:
    one = TextWindows(path=write(tmp_path / "book.txt", WORDS.replace(" ", "\r\n")), **SMALL)
    assert "\r" not in one.examples()[0].question


def test_a_bad_book_is_named_or_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    write(folder / "good.txt", WORDS)
    write(folder / "short.txt", "too short")
    (folder / "latin.txt").write_bytes(b"\xe9" * 500)
    write(tmp_path / "secret.txt", WORDS)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    data = TextWindows(path=str(folder), windows_per_file=1, on_bad_item="skip", **SMALL)
    assert [e.id for e in data.examples()] == ["good.txt/0"]
    reasons = {found.item: found.reason for found in data.skipped}
    assert set(reasons) == {"short.txt", "latin.txt", "link.txt"}
    assert "has 9 characters, and a window takes 200" in reasons["short.txt"]
    assert "is not text in UTF-8" in reasons["latin.txt"]
    assert "lies outside" in reasons["link.txt"]
    assert "latin.txt" in refusal(lambda: TextWindows(path=str(folder), windows_per_file=1, **SMALL))


@pytest.mark.parametrize(
    "change", [{"prompt_tokens": 0}, {"scored_tokens": 0}, {"windows_per_file": 0}, {"chars_per_token": 0.0}]
)
def test_wrong_windows_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    assert next(iter(change)) in refusal(lambda: TextWindows(path=write(tmp_path / "a.txt", WORDS), **change))


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(lambda: TextWindows(path=str(tmp_path / "nowhere.txt")))
    (tmp_path / "empty").mkdir()
    assert "holds no item" in refusal(lambda: TextWindows(path=str(tmp_path / "empty")))


@pytest.mark.parametrize("kind", ["passkey", "needle"])
def test_a_needle_lies_at_its_depth_and_is_asked_for(kind: str) -> None:
    data = Needles(num_samples=10, kind=kind, context_words=200, num_depths=5)  # type: ignore[arg-type]
    for number, example in enumerate(data.examples()):
        assert example.context.count(example.reference) == 1
        assert example.reference not in example.question
        depth = (number % 5) / 4
        share = example.context.index(example.reference) / len(example.context)
        assert abs(share - depth) < 0.15
        assert 200 <= len(example.context.split()) < 240
        assert data.facts_in(f"It is {example.reference}.") == example.facts == frozenset({example.reference})
    assert data.facts_in("1" + data.examples()[0].reference) == frozenset()


def test_needles_follow_from_the_seed_alone() -> None:
    def contexts(**options: int) -> list[str]:
        return [example.context for example in Needles(num_samples=3, context_words=50, **options).examples()]

    assert contexts() == contexts()
    assert set(contexts()).isdisjoint(contexts(seed=1))


def test_needles_take_their_hay_from_files(tmp_path: Path) -> None:
    write(tmp_path / "hay" / "a.txt", "One fish swims. Two fish swim! Do three fish swim?\nYes they do.")
    data = Needles(filler=str(tmp_path / "hay"), context_words=30, num_samples=2)
    assert "Two fish swim!" in data.examples()[0].context
    before = data.fingerprint
    write(tmp_path / "hay" / "b.txt", "Four fish.")
    assert Needles(filler=str(tmp_path / "hay"), context_words=30, num_samples=2).fingerprint != before


def test_wrong_needles_are_refused(tmp_path: Path) -> None:
    assert "did you mean 'needle'" in refusal(lambda: Needles(kind="needl"))  # type: ignore[arg-type]
    assert "context_words is 3" in refusal(lambda: Needles(context_words=3))
    assert "holds 0 sentences" in refusal(lambda: Needles(filler=write(tmp_path / "empty.txt", " \n")))
    assert "dataset.filler nowhere.txt cannot be read" in refusal(lambda: Needles(filler="nowhere.txt"))
    (tmp_path / "latin.txt").write_bytes(b"A caf\xe9. And more.")
    assert "is not text in UTF-8" in refusal(lambda: Needles(filler=str(tmp_path / "latin.txt")))


def test_a_text_begins_to_state_a_thing_again_and_every_place_comes_equally_often() -> None:
    data = Recall(num_samples=16, num_keys=4, filler_words=20)
    for number, example in enumerate(data.examples()):
        stated = example.context.split(f"{example.question} {example.reference}. ")
        assert len(stated) == 2, "the key has one value, and the question begins to state it"
        assert stated[0].count("Here is ") == number % 4
        assert example.context.count("Here is ") == 4
        assert 80 <= len(example.context.split()) < 150
        assert example.completes
        assert example.can_hide_question
        assert example.id == f"recall/{number}/depth-{number % 4 / 3:.2f}"
        assert data.facts_in(f" {example.reference}. Here is Anna's") == example.facts == {example.reference}
        assert len(example.reference.split()) == 2, "one token of it is decided before any cut; the rest is not"
    assert data.facts_in("silk anchor. Here is Anna's red tin drum.") == {"silk anchor"}, "the text goes on"
    assert data.facts_in("anchor.") == data.facts_in("anchor, silk") == data.facts_in("") == frozenset()


def test_recall_follows_from_the_seed_alone() -> None:
    def contexts(**options: int) -> list[str]:
        return [example.context for example in Recall(num_samples=3, **options).examples()]

    assert contexts() == contexts()
    assert set(contexts()).isdisjoint(contexts(seed=1))
    assert all(context.count("Here is ") == 1 for context in contexts(num_keys=1))


@pytest.mark.parametrize("change", [{"num_samples": 0}, {"num_keys": 0}, {"num_keys": 19}, {"filler_words": 10**6}])
def test_wrong_recall_is_refused(change: dict[str, int]) -> None:
    ((name, value),) = change.items()
    assert f"dataset.{name} is {value}; it must lie in" in refusal(lambda: Recall(**change))


@pytest.mark.parametrize(
    ("path", "begin", "end"),
    [
        ("bundled", "Letter 1\n\n_To Mrs. Saville", "lost in darkness and distance.\n"),
        ("bundled_lectures", "THE ORIGIN OF MUSIC\n\nDarwin's theory", "in the musical acceptance of the word.\n"),
    ],
)
def test_a_text_that_comes_along_is_whole_and_has_its_source_and_licence_beside_it(
    path: str, begin: str, end: str
) -> None:
    text = _BUNDLED[path].read_text(encoding="utf-8")
    assert text.startswith(begin)
    assert text.endswith(end)
    assert "Gutenberg" not in text
    source = _BUNDLED[path].with_suffix(".md").read_text(encoding="utf-8")
    assert "public domain" in source
    assert f"{len(text):,} characters" in source


def test_the_texts_that_come_along_take_less_than_a_megabyte() -> None:
    assert sum(path.stat().st_size for path in _BUNDLED.values()) < 1_000_000


@pytest.mark.parametrize(("name", "number"), [("", 8), ("_long", 48)])
@pytest.mark.parametrize("text", ["frankenstein", "lectures"])
def test_each_text_has_windows_for_both_sizes_of_the_experiments(text: str, name: str, number: int) -> None:
    (grid,) = compose_grid([f"dataset={text}{name}"], multirun=False, config_dir=None)
    data = build(grid.config.dataset, "dataset")
    assert len(data.examples()) == number
    assert data.examples()[-1].id == f"{text}.txt/{number - 1}"
