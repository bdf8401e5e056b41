"""Combinations that cannot run are told before a model is loaded; what was left out is in the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvbench.cache.policy import needs_of
from kvbench.config.build import build_cell
from kvbench.config.compose import compose_grid
from kvbench.datasets.base import Example
from kvbench.datasets.questions import Conversation
from kvbench.datasets.retrieval import Needles
from kvbench.datasets.scenes import Scenes
from kvbench.errors import ConfigError, DataError
from kvbench.models.spec import ModelSpec, takes_images
from kvbench.sweep.cell import check_fit
from kvbench.sweep.group import ModelShelf
from kvbench.tasks.generation import MultiTurn
from kvbench.tasks.perplexity import Perplexity
from kvbench.tasks.speed import Speed
from tests.datasets.files import write_json, write_lines, write_picture
from tests.models.checkpoints import save_checkpoint
from tests.sweep.watching import run_cells
from tests.tasks.benches import FULL, cell_of, cut

BUNDLED = ModelSpec(checkpoint="bundled")
GOOD = {"question": "What is it?", "answer": "A dot."}


class Few:
    """A data set of the examples it is given."""

    fingerprint = "few"
    on_bad_item = "fail"

    def __init__(self, *examples: Example) -> None:
        self._examples = examples

    def examples(self) -> Any:
        return self._examples

    def facts_in(self, text: str) -> Any:
        return frozenset()


def example(name: str = "a", **changes: Any) -> Example:
    return Example(**{"id": name, "cluster": name, "question": "q", "reference": "r", **changes})


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(checkpoint=str(save_checkpoint("llama", tmp_path_factory.mktemp("llama"))))


def test_a_checkpoint_says_whether_it_takes_pictures(text_only: ModelSpec) -> None:
    assert takes_images(BUNDLED) is True
    assert takes_images(text_only) is False
    assert takes_images(ModelSpec(checkpoint="a/b", revision="0" * 40)) is None


def test_pictures_for_a_text_model_are_refused(text_only: ModelSpec) -> None:
    with pytest.raises(ConfigError, match=r"has pictures \(scenes-v2/test/0\), but the model .* takes text only"):
        check_fit(Scenes(num_samples=1), text_only, {}, query_visible=True)
    check_fit(Needles(num_samples=1), text_only, {}, query_visible=True)
    check_fit(Needles(num_samples=1), BUNDLED, {}, query_visible=True)


@pytest.mark.parametrize(
    ("examples", "task", "fragment"),
    [
        ([], Speed(), "has no example"),
        ([example(), example()], Speed(), "has the id 'a' twice"),
        ([example(), example("b", reference="")], Perplexity(), "task.it scores reference answers, and b has none"),
        ([example()], MultiTurn(), "task.it needs a second question, and a has none"),
    ],
)
def test_a_data_set_that_lacks_what_a_task_needs_is_refused(examples: list[Example], task: Any, fragment: str) -> None:
    with pytest.raises(DataError, match=fragment):
        check_fit(Few(*examples), BUNDLED, {"it": task}, query_visible=True)


def test_a_question_that_cannot_be_hidden_is_refused() -> None:
    with pytest.raises(DataError, match="b has neither a picture nor a context"):
        check_fit(Few(example(context="c"), example("b")), BUNDLED, {"p": Perplexity()}, query_visible=False)
    check_fit(Few(example(context="c"), example("b")), BUNDLED, {"p": Perplexity()}, query_visible=True)


@pytest.mark.parametrize(
    ("policy", "words"),
    [("look_m", "dataset=scenes"), ("finch", "dataset=recall"), ("finch", "dataset=scenes"), ("fastv", "task=speed")],
)
def test_a_policy_that_reads_spans_runs_where_data_says_where_they_are(policy: str, words: str) -> None:
    assert needs_of(cell_with(f"policy={policy}", "positions=original", words).setting.policy)


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        ("policy=look_m dataset=recall", "LookM ranks the tokens of pictures apart, and .* has no picture"),
        ("policy=vl_cache dataset=needles", "PostVision ranks the tokens of pictures apart"),
        ("policy=h2o +policy.protect=text dataset=recall", "H2O ranks the tokens of pictures apart"),
        ("policy=fastv model=qwen2.5-7b weights=random dataset=synthetic task=speed", "FastV ranks the tokens of pic"),
        ("policy=finch dataset=synthetic task=speed", "Finch reads where the question stands, and .* has none"),
        ("policy=finch dataset=frankenstein task=perplexity", "Finch reads where the question stands, and .* has none"),
        ("policy=finch dataset=recall query_visible=false", "Finch .* query_visible=false hides it until then"),
        ("policy=h2o +policy.protect=question dataset=synthetic task=speed", "H2O reads where the question stands"),
    ],
)
def test_a_policy_that_reads_spans_is_refused_in_one_line_where_data_cannot_say(words: str, fragment: str) -> None:
    task = [] if "task=" in words else ["task=quality"]
    with pytest.raises(ConfigError, match=fragment) as told:
        cell_with(*words.split(), *task)
    assert "\n" not in str(told.value)


def test_a_task_that_cannot_hide_the_question_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"leave ~task\.speed out"):
        check_fit(Scenes(), BUNDLED, {"ppl": Perplexity(), "speed": Speed()}, query_visible=False)


def cell_with(*overrides: str) -> Any:
    (composed,) = compose_grid(list(overrides), multirun=False, config_dir=None)
    return build_cell(composed)


def test_whether_the_question_is_seen_enters_the_key() -> None:
    seen, unseen = cell_with("task=quality"), cell_with("task=quality", "query_visible=false")
    assert seen.key != unseen.key
    assert (seen.query_visible, unseen.query_visible) == (True, False)
    with pytest.raises(ConfigError, match="query_visible is 'no'; it must be true or false"):
        cell_with("query_visible=no_", "query_visible='no'")


def test_every_yaml_of_a_file_says_what_to_do_with_bad_items() -> None:
    folder = Path(__file__).parents[2] / "conf" / "dataset"
    texts = {path.stem: path.read_text() for path in folder.glob("*.yaml")}
    assert {"mm_vet", "llava_description", "llava_bench", "wikitext2", "pg19", "longbench", "retrieval"} <= set(texts)
    of_files = {name for name, text in texts.items() if "path: ???" in text}
    assert of_files == {name for name, text in texts.items() if "on_bad_item: fail # " in text}


def test_needles_need_no_file_and_their_question_can_be_hidden() -> None:
    cell = cell_with("dataset=needles", "task=quality", "query_visible=false")
    assert len(cell.dataset.examples()) == 20


@pytest.mark.parametrize(("name", "number"), [("recall", 20), ("recall_many", 100)])
def test_recall_needs_no_file_and_what_is_asked_can_be_hidden(name: str, number: int) -> None:
    seen, hidden = (cell_with(f"dataset={name}", "task=text", f"query_visible={word}") for word in ("true", "false"))
    assert len(hidden.dataset.examples()) == number
    assert seen.key != hidden.key


@pytest.mark.parametrize(("name", "number"), [("frankenstein", 8), ("frankenstein_long", 48)])
def test_the_novel_needs_no_file_and_has_nothing_to_hide(name: str, number: int) -> None:
    cell = cell_with(f"dataset={name}", "task=text")
    assert len(cell.dataset.examples()) == number
    assert cell.settings["dataset"]["fingerprint"] == cell.dataset.fingerprint
    with pytest.raises(DataError, match="has neither a picture nor a context before its question"):
        cell_with(f"dataset={name}", "task=text", "query_visible=false")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("mm_vet", None),
        ("llava_bench", {"question_id": 0, "image": "a.png", "text": "q"}),
        ("mt_bench", {"question_id": 1, "turns": ["q", "p"]}),
        ("longbench", {"input": "q", "context": "c", "answers": ["a"]}),
        ("retrieval", {"input": "c\nq", "outputs": ["a"]}),
        ("multi_news", {"document": "d", "summary": "s"}),
        ("xsum", {"document": "d", "summary": "s"}),
        ("cnn_dailymail", {"article": "d", "highlights": "s"}),
        ("wikitext2", {"text": "word " * 1000}),
        ("pg19", {"text": "word " * 6000}),
    ],
)
def test_every_yaml_builds_from_a_small_file(tmp_path: Path, name: str, row: dict[str, Any] | None) -> None:
    write_picture(tmp_path / "a.png")
    if row is None:
        write_picture(tmp_path / "images" / "a.png")
        item = {"imagename": "a.png", "question": "q", "answer": "a"}
        path = write_json(tmp_path / "mm-vet.json", {"v1_0": item})
    else:
        path = write_lines(tmp_path / "rows.jsonl", [row])
    cell = cell_with(f"dataset={name}", f"dataset.path={path}", "task=generation")
    assert len(cell.dataset.examples()) == 1
    assert str(tmp_path) not in str(cell.settings), "where a file lies is not part of the key"


def test_the_record_counts_and_names_what_was_left_out(tmp_path: Path, shelf: ModelShelf) -> None:
    path = write_json(tmp_path / "t.json", [GOOD, "bad", {**GOOD, "image": "no.png"}])
    data = Conversation(path=path, on_bad_item="skip")
    cell = cell_of({"perplexity": Perplexity()}, dataset=data)
    body = run_cells([cell], tmp_path, shelf=shelf).bodies[cell.key]
    assert body["status"] == "ok", body["error"]
    assert body["measurements"]["num_skipped_items"]["value"] == 2
    assert body["measurements"]["num_skipped_items"]["n"] == 3
    assert [found["item"] for found in body["skipped_items"]] == ["t.json, item 1", "t.json, item 2"]
    assert "not a file" in body["skipped_items"][1]["reason"]


def test_a_record_of_a_data_set_that_skips_nothing_says_nothing(tmp_path: Path, shelf: ModelShelf) -> None:
    cell = cell_of({"perplexity": Perplexity()}, dataset=Scenes(num_samples=1))
    body = run_cells([cell], tmp_path, shelf=shelf).bodies[cell.key]
    assert "num_skipped_items" not in body["measurements"]
    assert body["skipped_items"] == []


@pytest.fixture(scope="module")
def grid_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(checkpoint=str(save_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("qwen"))))


def shown(name: str, width: int, height: int) -> Example:
    return example(name, question="What is it?", load_image=lambda: Image.new("RGB", (width, height), "red"))


def test_what_only_the_processor_rejects_is_left_out_and_named(tmp_path: Path, grid_model: ModelSpec) -> None:
    data = Few(shown("a", 30, 30), shown("strip", 2, 500), shown("b", 20, 40), example("c"))
    data.on_bad_item = "skip"
    cells = [
        cell_of({"perplexity": Perplexity()}, dataset=data, model=grid_model, setting=setting, number=number)
        for number, setting in enumerate((FULL, cut()))
    ]
    notes = run_cells(cells, tmp_path)
    for cell in cells:
        body = notes.bodies[cell.key]
        assert body["status"] == "ok", body["error"]
        assert [row["id"] for row in body["samples"]] == ["a", "b", "c"]
        (left_out,) = body["skipped_items"]
        assert left_out["item"] == "strip"
        assert "processor does not take strip (ValueError: absolute aspect ratio" in left_out["reason"]
        count = body["measurements"]["num_skipped_items"]
        assert (count["value"], count["n"]) == (1, 4)
    assert notes.num_beats >= 4, "looking at many pictures is no silence"


def test_without_skipping_it_is_a_data_error_of_that_item(tmp_path: Path, grid_model: ModelSpec) -> None:
    data = Few(shown("a", 30, 30), shown("strip", 2, 500))
    cell = cell_of({"perplexity": Perplexity()}, dataset=data, model=grid_model)
    body = run_cells([cell], tmp_path).bodies[cell.key]
    assert (body["status"], body["error"]["type"]) == ("data_error", "DataError")
    assert "does not take strip" in body["error"]["message"]


def test_when_the_processor_rejects_every_item_the_first_reason_is_told(tmp_path: Path, grid_model: ModelSpec) -> None:
    data = Few(shown("one", 2, 500), shown("two", 500, 2))
    data.on_bad_item = "skip"
    cell = cell_of({"perplexity": Perplexity()}, dataset=data, model=grid_model)
    body = run_cells([cell], tmp_path).bodies[cell.key]
    assert body["status"] == "data_error"
    assert "all 2 items are bad; the first: the model's processor does not take one" in body["error"]["message"]
