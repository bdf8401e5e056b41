"""Prompts beyond the model's context: counted, refused, or measured and said so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.cache import Budget
from kvbench.datasets.base import Example, Turn, Window
from kvbench.errors import ConfigError, ModelSupportError
from kvbench.models.chat import next_turn_tokens
from kvbench.models.inputs import answer_tokens, given_prompts, prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.report.findings import _beyond_text
from kvbench.report.load import parse_cell
from kvbench.sweep.cell import check_windows, context_tokens, context_use
from kvbench.tasks.generation import Generation, MultiTurn
from kvbench.tasks.perplexity import Perplexity
from kvbench.tasks.speed import Speed
from tests.models.checkpoints import save_checkpoint
from tests.models.test_families import examples as pictured
from tests.sweep.watching import run_cells
from tests.tasks.benches import FULL, SCENES, cell_of, cut

LONG = Example(
    id="long",
    cluster="x",
    question="What is it? " * 20,
    reference="A red dot in row one.",
    follow_ups=(Turn(question="Where?", answer="-"),),
)
SHORT = replace(LONG, id="short", question="What?")


class Few:
    """A data set of given examples."""

    fingerprint = "few"

    def __init__(self, *examples: Example) -> None:
        self._examples = examples

    def examples(self) -> tuple[Example, ...]:
        return self._examples

    def facts_in(self, text: str) -> frozenset[Any]:
        return frozenset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return limited(save_checkpoint("llama", tmp_path_factory.mktemp("llama")), 32)


def limited(folder: Path, tokens: int | None) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": tokens}))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(ModelSpec(checkpoint=str(folder)), "cpu")


def use(loaded: LoadedModel, *tasks: Any, setting: Any = FULL, examples: tuple[Example, ...] = (LONG, SHORT)) -> Any:
    return context_use(loaded, examples, given_prompts(loaded, examples), setting, dict(enumerate(tasks)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 32}, 32),
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": -1}, None),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 8}, 64),
        ({"max_position_embeddings": 32, "rope_scaling": None}, 32),
        ({"max_position_embeddings": 32, "rope_scaling": {"type": "linear", "factor": 4.0}}, 128),
        ({"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 64),
        ({"max_position_embeddings": 32, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 128),
        (
            {
                "max_position_embeddings": 128,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            },
            128,
        ),
        (
            {
                "max_position_embeddings": 128,
                "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32},
            },
            128,
        ),
        ({"max_position_embeddings": 128, "rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, 128),
        ({"max_position_embeddings": 32, "rope_parameters": {"rope_type": "default", "factor": 4.0}}, 32),
    ],
)
def test_the_context_is_what_the_config_says_and_its_rotation_stretches(config: Any, limit: int | None) -> None:
    assert context_tokens(config) == limit


def test_lengths_count_every_token_of_prompts_with_and_without_pictures(tmp_path: Path) -> None:
    for family in ("llava", "llava_onevision", "qwen2_5_vl", "qwen", "qwen3"):
        (tmp_path / family).mkdir()
        ours = load_model(ModelSpec(checkpoint=str(save_checkpoint(family, tmp_path / family))), "cpu")
        some = pictured(ours.takes_images)
        given = given_prompts(ours, some)
        assert list(given.num_tokens.values()) == prompt_batch(ours, some).prompt_tokens
        assert given == given_prompts(ours, some)
        assert given.digest != given_prompts(ours, some[1:]).digest


def test_a_prompt_counts_with_what_each_task_feeds_after_it(loaded: LoadedModel) -> None:
    prompt = given_prompts(loaded, [SHORT]).num_tokens["short"]
    room = 32 - prompt
    assert not use(loaded, Generation(max_new_tokens=room + 1), examples=(SHORT,)).beyond
    assert use(loaded, Generation(max_new_tokens=room + 2), examples=(SHORT,)).beyond == {"short": 33}
    for words in range(1, 40):
        example = replace(SHORT, reference="x " * words)
        fed = prompt + len(answer_tokens(loaded, example)) - 1
        assert use(loaded, Perplexity(), examples=(example,)).beyond == ({"short": fed} if fed > 32 else {})
    talk = MultiTurn(max_new_tokens=20)
    fed = prompt + 20 + len(next_turn_tokens(loaded, SHORT, 2)) + 19
    assert use(loaded, talk, examples=(SHORT,)).beyond == {"short": fed}


def test_ranks_in_the_cache_stay_inside_after_a_prompt_that_does(loaded: LoadedModel) -> None:
    """But not where answers are compared with the full cache's, and not if the prompt itself is too long."""
    wordy = replace(SHORT, reference="A red dot. " * 20)
    ranks = replace(cut(Budget(tokens=8)), positions="in_cache")
    assert use(loaded, Perplexity(), setting=cut(), examples=(wordy,)).beyond
    assert not use(loaded, Perplexity(), setting=ranks, examples=(wordy,)).beyond
    assert use(loaded, Perplexity(), setting=replace(ranks, budget=Budget(tokens=64)), examples=(wordy,)).beyond
    assert use(loaded, Generation(max_new_tokens=64), setting=ranks, examples=(SHORT,)).beyond
    assert list(use(loaded, Perplexity(), setting=ranks).beyond) == ["long"]
    assert use(loaded, Perplexity(), setting=replace(FULL, positions="in_cache"), examples=(wordy,)).beyond


def test_time_is_measured_beyond_the_context_and_only_counted(loaded: LoadedModel) -> None:
    found = use(loaded, Speed(new_tokens=3))
    assert (list(found.beyond), found.refused) == (["long"], {})
    found.check()
    assert not use(loaded, Speed(new_tokens=3), examples=(SHORT, LONG)).beyond  # of which the first alone is timed


def test_a_model_that_names_no_limit_is_asked_for_nothing(loaded: LoadedModel) -> None:
    sizes = loaded.model.config.get_text_config
    config = SimpleNamespace(
        to_dict=lambda: {"max_position_embeddings": None}, model_type="llama", get_text_config=sizes
    )
    free = replace(loaded, model=SimpleNamespace(config=config))
    found = use(free, Generation(max_new_tokens=1000))
    assert (found.limit, found.beyond) == (None, {})
    assert found.measurement() == {}


def test_a_cell_beyond_the_context_is_refused_before_it_is_measured(folder: Path, tmp_path: Path) -> None:
    spec = ModelSpec(checkpoint=str(folder))
    fits = cell_of({"g": Generation(max_new_tokens=2)}, dataset=Few(SHORT), model=spec)
    cells = [cell_of({"g": Generation(max_new_tokens=9)}, dataset=Few(LONG, SHORT), model=spec, number=1)]
    notes = run_cells(cells, tmp_path)
    body = notes.bodies[cells[0].key]
    assert (body["status"], body["phase"]) == ("incompatible", "load")
    message = body["error"]["message"]
    assert message.startswith("1 of 2 prompts go beyond the model's context of 32 tokens (long needs ")
    assert "beyond_context=allow" in message
    assert "\n" not in message
    body = run_cells([fits], tmp_path).bodies[fits.key]
    assert body["status"] == "ok"
    assert body["prompts"]["num_beyond_context"] == 0
    assert "num_beyond_context" not in body["measurements"]


def test_a_cell_that_is_allowed_beyond_the_context_says_so_in_record_and_report(folder: Path, tmp_path: Path) -> None:
    spec, dataset = ModelSpec(checkpoint=str(folder)), Few(LONG, SHORT)
    cell = replace(
        cell_of({"g": Generation(max_new_tokens=2)}, dataset=dataset, model=spec, setting=cut()), beyond_context="allow"
    )
    body = run_cells([cell], tmp_path).bodies[cell.key]
    assert body["status"] == "ok"
    prompts = body["prompts"]
    assert (prompts["context_tokens"], prompts["num_beyond_context"]) == (32, 1)
    assert prompts["longest_tokens"] > 32
    assert len(prompts["digest"]) == 64
    entry = body["measurements"]["num_beyond_context"]
    assert (entry["value"], entry["n"], entry["unit"]) == (1, 2, "prompts")
    group: Any = SimpleNamespace(cell_label=lambda cell: "h2o")
    assert _beyond_text(group, parse_cell(body)) == "h2o: 1 of 2 prompts (prompt and answer against 32 tokens)"


def test_other_prompts_get_other_answers_of_the_full_cache(folder: Path, tmp_path: Path) -> None:
    """Where prompts changed and no setting did, stored answers are made anew instead of failing the cell."""
    spec = ModelSpec(checkpoint=str(folder))
    for question in ("What?", "Why?"):
        cell = cell_of({"g": Generation(max_new_tokens=2)}, dataset=Few(replace(SHORT, question=question)), model=spec)
        assert run_cells([cell], tmp_path).bodies[cell.key]["status"] == "ok"
    assert len(list((tmp_path / "full_answers").iterdir())) == 2


def test_a_template_that_writes_another_prompt_each_time_is_refused(tmp_path: Path) -> None:
    save_checkpoint("llama", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ range(90000) | random }}{{ messages[0].content }}")
    ours = load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    with pytest.raises(ModelSupportError, match="writes another prompt each time"):
        given_prompts(ours, [SHORT])


def test_windows_beyond_the_context_are_refused_before_a_model_is_loaded() -> None:
    window = replace(SHORT, window=Window(prompt_tokens=33, scored_tokens=9))
    config = {"max_position_embeddings": 32}
    with pytest.raises(ConfigError, match=r"a prompt of 33 tokens goes .* context of 32; lower dataset"):
        check_windows(config, [window], {"ppl": Perplexity()})
    check_windows(config, [window], {"speed": Speed()})
    check_windows(None, [window], {"ppl": Perplexity()})
    check_windows({}, [window], {"ppl": Perplexity()})
    check_windows({"max_position_embeddings": 33}, [window, *SCENES.examples()], {"ppl": Perplexity()})
