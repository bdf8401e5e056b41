"""Autopsies of real cells: what they store against a replay of its own, and that nothing else feels them."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from kvbench.autopsy import AutopsySettings
from kvbench.autopsy import replay as autopsy
from kvbench.autopsy.replay import (
    Watching,
    coarsened,
    full_attention,
    held_at,
    replay,
    seen_picture,
    stored_layers,
    thumbnail_file,
    token_pieces,
    without_secrets,
)
from kvbench.cache import Budget, Needs, Plan, PolicyCache, View, artefact, cache_argument
from kvbench.cache.policy import needs_of
from kvbench.contract.driving import held_positions, learnt_artefact
from kvbench.datasets.scenes import Scenes
from kvbench.errors import ConfigError
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel
from kvbench.results.files import unpack
from kvbench.results.record import NEVER, autopsy_path, read_autopsy
from kvbench.sweep.cell import Cell
from kvbench.sweep.group import GroupPlan, ModelShelf, run_group
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.generation import Generation, divergence
from kvbench.tasks.task import BatchTask, Bench, Part, Payload, Prompts, TaskResult
from tests import covering
from tests.calibrating import in_process
from tests.covering import YAMLS, one_in
from tests.sweep.watching import KeptInMemory, Notes, run_cells
from tests.tasks.benches import FULL, MostAttended, cell_of

SCENES = Scenes(num_samples=2)
STEPS = 9
SETTINGS = AutopsySettings(num_samples=2, max_new_tokens=STEPS + 1)


@dataclass(frozen=True)
class Nothing(BatchTask):
    """A quality task that costs nothing."""

    protocol: ClassVar[str] = "nothing_v1"

    def measure(self, bench: Bench, part: Part) -> Payload:
        return {"number": part.number}

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        return TaskResult()


@dataclass(frozen=True, kw_only=True)
class OnceOnly(MostAttended):
    """Works in the measured pass and fails when it is looked at."""

    used: ClassVar[list[int]] = []

    def plan(self, view: View) -> Plan | None:
        self.used.append(view.layer)
        if self.used.count(view.layer) > 1:
            raise SystemExit(3)
        return super().plan(view)


def looked_at(setting: CacheSetting, name: str, tasks: Any = None, settings: AutopsySettings = SETTINGS) -> Cell:
    cell = cell_of(tasks or {"nothing": Nothing()}, setting=setting, dataset=SCENES, name=name)
    return replace(cell, autopsy=settings)


def settings_of() -> dict[str, CacheSetting]:
    policies = {path.stem: instantiate(OmegaConf.load(path), _convert_="object") for path in YAMLS}
    return {
        name: CacheSetting(policy=policy, budget=Budget(fraction=0.2), positions=policy.native_positions)
        for name, policy in policies.items()
        if Needs.REPEATED not in needs_of(policy)  # prompts with pictures are not read twice
    }


REPLAYED = one_in(5, settings_of())


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The autopsy of every yaml in conf/policy that a test looks at, taken together as a sweep takes them."""
    folder = tmp_path_factory.mktemp("autopsies")
    settings = settings_of()
    taken = {"full", "h2o", "elastic"} | {one.values[0] for one in REPLAYED if covering.exhaustive or not one.marks}
    cells = {name: looked_at(settings[name], name) for name in settings if name in taken}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefact, "artefact_of", learnt_artefact)
        run_cells(list(cells.values()), folder)
    return {name: read_autopsy(autopsy_path(folder, cell.key), cell.key) for name, cell in cells.items()}


@torch.no_grad()
def replayed(loaded: LoadedModel, setting: CacheSetting, index: int, pieces: list[str]) -> list[Any]:
    """Held positions [step][layer][head] of the sample alone, prefilled without sharing, fed its stored answer."""
    batch = prompt_batch(loaded, [SCENES.examples()[index]])
    asked = batch.find_question_tokens
    cache = PolicyCache(loaded.model, setting.policy, setting.budget, positions=setting.positions,
                        prompt_kind=batch.kind, row_seeds=batch.row_seeds,
                        question_tokens=None if asked is None else asked())  # fmt: skip
    out = loaded.model(
        **batch.tensors, position_ids=batch.position_ids, **cache_argument(loaded.model, cache), use_cache=True
    )
    held = [held_positions(cache)]
    position = batch.last_position_ids.clone()
    for _ in pieces:
        position += 1
        token = out.logits[:, -1:].argmax(dim=-1)
        out = loaded.model(
            input_ids=token, position_ids=position, **cache_argument(loaded.model, cache), use_cache=True
        )
        held.append(held_positions(cache))
    return [[[tuple(head) for head in layer[0]] for layer in step] for step in held]


@pytest.mark.few(3)
@pytest.mark.parametrize("name", REPLAYED)
def test_what_is_stored_is_what_a_replay_of_the_sample_alone_holds(
    bundled: LoadedModel, bodies: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    setting = settings_of()[name]
    in_process(monkeypatch, setting.policy)
    assert [sample["id"] for sample in bodies[name]["samples"]] == [example.id for example in SCENES.examples()]
    sample = bodies[name]["samples"][1]
    prompt, steps = sample["prompt_tokens"], sample["steps"]
    assert 1 <= steps <= STEPS
    freed = unpack(sample["freed"]["patterns"])[np.array(sample["freed"]["of"])]
    assert freed.shape == (bodies[name]["num_layers"], bodies[name]["num_heads"], prompt + steps)
    held = replayed(bundled, setting, 1, sample["tokens"][prompt:])
    for step in range(steps + 1):
        said = [[tuple(np.nonzero(row[: prompt + step] > step)[0]) for row in layer] for layer in freed]
        assert said == held[step]
    assert_statistics(sample, held, freed)


def assert_statistics(sample: dict[str, Any], held: list[Any], freed: Any) -> None:
    """Entries, image share and age again, in plain Python from what was held."""
    prompt, kinds = sample["prompt_tokens"], unpack(sample["kinds"])
    images = [p for p in range(prompt) if kinds[p] == 1]
    numbers = {name: unpack(value) for name, value in sample["statistics"].items()}
    assert sample["checkpoints"][0] == 0
    assert sample["checkpoints"][-1] == sample["steps"]
    for index, step in enumerate(sample["checkpoints"]):
        for layer, heads in enumerate(held[step]):
            for head, positions in enumerate(heads):
                at = (index, layer, head)
                assert numbers["entries"][at] == len(positions)
                share = 1000 * len(set(images) & set(positions)) / len(images)
                assert abs(numbers["image_kept_permille"][at] - share) <= 0.51
                age = sum(prompt + step - 1 - p for p in positions) / len(positions)
                assert abs(numbers["mean_age_tokens"][at] - age) <= 0.51
                attention = numbers["attention_permille"][at]
                assert attention <= 1000
                assert attention == 1000 or bool((freed[layer, head, :prompt] <= step).any()), "all of it is held"


def test_attention_held_is_the_full_caches_attention_to_what_is_kept(
    bundled: LoadedModel, bodies: dict[str, dict[str, Any]]
) -> None:
    """Against the stock attention probabilities of a forward over prompt and full answer."""
    full, cut = bodies["full"]["samples"][0], bodies["h2o"]["samples"][0]
    batch = prompt_batch(bundled, [SCENES.examples()[0]])
    tokens = batch.tensors["input_ids"]
    prompt = tokens.shape[1]
    with torch.no_grad():
        answer: list[int] = []
        for _ in range(STEPS):
            ids = torch.cat((tokens, torch.tensor([answer], dtype=tokens.dtype)), dim=1)
            answer.append(
                int(bundled.model(input_ids=ids, pixel_values=batch.tensors["pixel_values"]).logits[0, -1].argmax())
            )
        masses = stock_attention(bundled, torch.cat((tokens, torch.tensor([answer])), dim=1), batch.tensors)
    assert full["tokens"][prompt:] == token_pieces(bundled, answer)
    freed = unpack(cut["freed"]["patterns"])[np.array(cut["freed"]["of"])][..., :prompt]
    mass = masses[:, :, prompt:, :prompt].sum(dim=2).numpy()
    share = 1000 * (mass * (freed > 0)).sum(-1) / mass.sum(-1)
    assert np.abs(unpack(cut["statistics"]["attention_permille"])[0] - share).max() < 1.0
    levels = mass.mean(axis=1)
    assert np.abs(unpack(cut["attention"]) - 255 * levels / levels.max(-1, keepdims=True)).max() < 1.0


def stock_attention(loaded: LoadedModel, tokens: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """(L, H, N, N) probabilities, mean over the query heads of a KV head, by the model's own eager attention."""
    import copy

    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation("eager")
    out = model(input_ids=tokens, pixel_values=tensors["pixel_values"], output_attentions=True)
    heads = model.config.get_text_config().num_key_value_heads
    return torch.stack([a[0].reshape(heads, -1, *a.shape[2:]).mean(dim=1) for a in out.attentions])


@pytest.mark.long
def test_a_row_that_ends_early_is_looked_at_as_if_it_were_alone(bundled: LoadedModel) -> None:
    examples = Scenes(num_samples=1, ask="follow_up", num_follow_ups=3).examples()
    limits: dict[str, Any] = {"end_token_ids": bundled.end_token_ids, "max_new_tokens": 24}
    setting, policies = settings_of()["h2o"], [MostAttended(), Watching()]
    together = Prompts(bundled, examples, 3, share=[setting.policy, *policies]).part(0)
    masses, rows = full_attention(together, **limits), replay(together, setting, **limits)
    assert len({row.steps for row in rows}) > 1, "they end at different times"
    for index, example in enumerate(examples):
        alone = Prompts(bundled, [example], 1, share=[setting.policy, *policies]).part(0)
        (mass,), (row,) = full_attention(alone, **limits), replay(alone, setting, **limits)
        tokens = alone.batch.prompt_tokens[0]
        np.testing.assert_allclose(masses[index][..., :tokens], mass[..., :tokens], rtol=1e-3, atol=1e-5)
        assert row.answer == rows[index].answer
        assert row.steps == rows[index].steps
        assert np.array_equal(rows[index].freed[..., : tokens + row.steps], row.freed[..., : tokens + row.steps])


def test_merged_entries_name_the_entry_that_holds_them(bodies: dict[str, dict[str, Any]]) -> None:
    sample = bodies["elastic"]["samples"][0]
    prompt = sample["prompt_tokens"]
    freed = unpack(sample["freed"]["patterns"])[np.array(sample["freed"]["of"])][..., :prompt]
    merged = unpack(sample["merged"]["patterns"])[np.array(sample["merged"]["of"])]
    assert ((merged != NEVER) == (freed == 0)).all(), "every entry that the prompt's cut takes is merged"
    kept = np.take_along_axis(freed, np.where(merged == NEVER, 0, merged).astype(np.int64), axis=-1)
    assert (kept[merged != NEVER] > 0).all()
    assert bodies["h2o"]["samples"][0]["merged"] is None


def test_words_picture_and_places_are_those_of_the_prompt(
    bundled: LoadedModel, bodies: dict[str, dict[str, Any]]
) -> None:
    sample = bodies["h2o"]["samples"][0]
    assert "".join(sample["tokens"][: sample["prompt_tokens"]]).startswith("<s>USER:")
    assert "Describe every object in the picture. ASSISTANT:" in "".join(sample["tokens"])
    picture = sample["picture"]
    places = unpack(picture["places"])
    assert [tuple(place) for place in places[:25]] == [(0, c) for c in range(24)] + [(1, 0)]
    assert len(places) == 576
    stored = Image.open(io.BytesIO(base64.b64decode(picture["data"]))).convert("RGB")
    original = SCENES.examples()[0].load_image
    assert original is not None
    difference = np.abs(np.asarray(stored, dtype=int) - np.asarray(original(), dtype=int))
    assert stored.size == (144, 144)
    assert difference.mean() < 12


def test_a_file_is_small(bodies: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    from kvbench.results.record import write_autopsy

    for body in bodies.values():
        write_autopsy(tmp_path / "autopsy.json", body)
        assert (tmp_path / "autopsy.json").stat().st_size < 40_000


@pytest.mark.long
def test_records_are_the_same_with_and_without(tmp_path: Path, shelf: ModelShelf) -> None:
    tasks = {"generation": Generation(max_new_tokens=8)}
    setting = settings_of()["h2o"]
    without = looked_at(setting, "h2o", tasks, AutopsySettings())
    with_it = looked_at(setting, "h2o", tasks, AutopsySettings(num_samples=1))
    assert without.key == with_it.key
    first = run_cells([without], tmp_path / "a", shelf=shelf).bodies[without.key]
    second = run_cells([with_it], tmp_path / "b", shelf=shelf).bodies[with_it.key]
    assert not autopsy_path(tmp_path / "a", without.key).exists()
    body = read_autopsy(autopsy_path(tmp_path / "b", with_it.key))
    for name in ("measurements", "samples", "curves", "status", "cell"):
        assert first[name] == second[name]
    sample = next(row for row in second["samples"] if row["id"] == body["samples"][0]["id"])
    assert sample["text"] == body["samples"][0]["answer"]


def test_what_fails_while_looking_costs_the_file_only(
    tmp_path: Path, shelf: ModelShelf, caplog: pytest.LogCaptureFixture
) -> None:
    OnceOnly.used.clear()
    bad = looked_at(CacheSetting(policy=OnceOnly(), budget=Budget(fraction=0.2), positions="original"), "bad",
                    {"generation": Generation(max_new_tokens=3)})  # fmt: skip
    bad = replace(bad, dataset=Scenes(num_samples=1))
    good = replace(looked_at(FULL, "good"), dataset=Scenes(num_samples=1))
    with caplog.at_level(logging.WARNING):
        notes = run_cells([bad, good], tmp_path, shelf=shelf)
    assert [body["status"] for body in notes.bodies.values()] == ["ok", "ok"]
    assert not autopsy_path(tmp_path, bad.key).exists()
    assert autopsy_path(tmp_path, good.key).exists()
    assert "no autopsy of p at -: SystemExit: 3" in caplog.text


@dataclass(frozen=True)
class Alone:
    """A task of time that costs nothing."""

    protocol: ClassVar[str] = "alone_v1"

    def run(self, bench: Bench) -> TaskResult:
        return TaskResult()


def looked_at_with(
    fault: BaseException, tasks: Any, folder: Path, shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[list[str]]]:
    """Run two cells whose autopsies raise; return the cells that were told, and those told before each autopsy."""
    notes, before = Notes(), list[list[str]]()
    cells = [replace(looked_at(FULL, name, tasks), dataset=Scenes(num_samples=1)) for name in "ab"]
    names = {cell.key: str(cell.settings["name"]) for cell in cells}

    def raises(*arguments: Any, **options: Any) -> list[Any]:
        before.append([names[key] for key in notes.bodies])
        raise fault

    monkeypatch.setattr(autopsy, "replay", raises)
    plan = GroupPlan(results=folder, sweep="s", share_prompts=True, batches_of=lambda key: KeptInMemory())
    run_group(cells, plan, shelf=shelf, watcher=notes)
    assert {body["status"] for body in notes.bodies.values()} == {"ok"}
    return [names[key] for key in notes.bodies], before


def test_a_cell_is_looked_at_after_its_record_is_told(
    tmp_path: Path, shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (KeyboardInterrupt(), {"nothing": Nothing()}, tmp_path, shelf, monkeypatch)
    assert looked_at_with(*given) == (["a", "b"], [["a", "b"]] * 2), "batches are measured for all before"
    given = (ValueError("no"), {"nothing": Nothing(), "alone": Alone()}, tmp_path, shelf, monkeypatch)
    assert looked_at_with(*given) == (["a", "b"], [["a"], ["a", "b"]])


@pytest.mark.parametrize(("tasks", "prefills"), [({}, 1), ({"alone": Alone()}, 3)], ids=["batches", "timed"])
def test_one_prefill_serves_the_autopsies_of_cells_that_time_nothing(
    tmp_path: Path, shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch, tasks: Any, prefills: int
) -> None:
    """Beside timed tasks no prompt may stay alive, so each is looked at by a prefill of its own."""
    seen: list[int] = []
    record = Part._record
    monkeypatch.setattr(Part, "_record", lambda part: [record(part), seen.append(1)][0])
    cells = [
        replace(looked_at(FULL, name, {"nothing": Nothing(), **tasks}), dataset=Scenes(num_samples=1)) for name in "abc"
    ]
    run_cells(cells, tmp_path, shelf=shelf)
    assert all(autopsy_path(tmp_path, cell.key).exists() for cell in cells)
    assert len(seen) == prefills


def test_a_device_that_breaks_while_a_cell_is_looked_at_leaves_the_others_to_a_fresh_process(
    tmp_path: Path, shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, tasks = RuntimeError("CUDA error: misaligned address"), {"nothing": Nothing(), "alone": Alone()}
    assert looked_at_with(broken, tasks, tmp_path, shelf, monkeypatch) == (["a"], [["a"]])


def test_a_long_prompt_is_left_out_and_the_file_says_so(tmp_path: Path, shelf: ModelShelf) -> None:
    cell = looked_at(FULL, "short", settings=AutopsySettings(num_samples=1, max_prompt_tokens=20))
    run_cells([cell], tmp_path, shelf=shelf)
    body = read_autopsy(autopsy_path(tmp_path, cell.key))
    assert body["samples"] == []
    assert body["left_out"] == [{"id": SCENES.examples()[0].id, "reason": "its prompt has 590 tokens, more than 20"}]


@pytest.mark.long
def test_a_hidden_question_is_part_of_the_story(tmp_path: Path, shelf: ModelShelf, bundled: LoadedModel) -> None:
    cell = replace(looked_at(settings_of()["h2o"], "hidden"), query_visible=False)
    run_cells([cell], tmp_path, shelf=shelf)
    sample = read_autopsy(autopsy_path(tmp_path, cell.key))["samples"][0]
    held = unpack(sample["statistics"]["entries"])
    assert (held[0] == int(0.2 * sample["prompt_tokens"])).all()
    assert "Describe" in "".join(sample["tokens"][: sample["prompt_tokens"]])


@pytest.mark.parametrize("wrong", [{"num_samples": -1}, {"max_new_tokens": 0}, {"max_prompt_tokens": 10**6}])
def test_wrong_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"autopsy.{next(iter(wrong))} is"):
        AutopsySettings(**wrong)


def test_items_are_chosen_by_their_place_alone() -> None:
    assert AutopsySettings(num_samples=2).chosen(range(32)) == [0, 16]
    assert AutopsySettings(num_samples=3).chosen(range(2)) == [0, 1]
    assert AutopsySettings().chosen(range(5)) == []


def test_large_models_store_fewer_layers_first_and_last_among_them() -> None:
    freed = np.random.default_rng(0).choice(np.array([0, NEVER], dtype=np.uint16), size=(32, 32, 700))
    layers = stored_layers(freed)
    assert layers[0] == 0
    assert layers[-1] == 31
    assert 2 <= len(layers) < 32
    assert stored_layers(np.zeros((32, 32, 700), dtype=np.uint16)) == list(range(32))


def test_departures_may_be_stored_at_a_few_moments_where_they_are_right() -> None:
    freed = np.random.default_rng(0).integers(0, 41, (2, 2, 50)).astype(np.uint16)
    freed[..., ::3] = NEVER
    moments = [0, 10, 20, 40]
    coarse = coarsened(freed, moments)
    assert set(np.unique(coarse)) <= {*moments, NEVER}
    for step in moments:
        assert np.array_equal(held_at(coarse, step, 30), held_at(freed, step, 30))


def test_a_photograph_becomes_a_small_thumbnail() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8))
    media, data = thumbnail_file(noise)
    assert media == "image/webp"
    assert len(data) <= 40_000
    assert thumbnail_file(Image.new("RGB", (336, 336), "red"))[0] == "image/png"


def test_pieces_of_a_text_make_the_text(bundled: LoadedModel) -> None:
    for text in ("There is a small  striped ring.\n\nIn row two", "Grüße, 漢字!", ""):
        tokens = bundled.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert "".join(token_pieces(bundled, tokens)) == bundled.tokenizer.decode(tokens)


def test_the_divergent_token_is_found_in_both_texts(bundled: LoadedModel) -> None:
    def ids(text: str) -> list[int]:
        return list(bundled.tokenizer(text, add_special_tokens=False)["input_ids"])

    answer, full = ids("How many stars are there?"), ids("How many circles are there?")
    found = divergence(bundled, answer, full)
    start, token = found["divergence_starts_at"], found["first_divergence_tokens"]
    assert answer[:token] == full[:token] != []
    assert "How many stars are there?"[start : found["divergence_ends_at"]].strip() == "stars"
    assert "How many circles are there?"[start : found["full_divergence_ends_at"]].strip() == "circles"
    assert divergence(bundled, full, full) == {"first_divergence_tokens": None}
    ended: dict[str, Any] = divergence(bundled, full[:2], full)
    assert ended["divergence_starts_at"] == ended["divergence_ends_at"] < ended["full_divergence_ends_at"]


def test_a_secret_that_is_split_into_tokens_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_API_KEY", "canary-5d41402a")
    body = without_secrets({"id": "a", "tokens": ["can", "ary-5d4", "1402a", "!"], "answer": "canary-5d41402a!"})
    assert body == {"id": "a", "tokens": ["***"] * 4, "answer": "***!"}
    harmless: dict[str, Any] = {"id": "a", "tokens": ["b", "c"], "answer": "bc"}
    assert without_secrets(dict(harmless)) == harmless


def test_text_prompts_have_no_picture(bundled: LoadedModel) -> None:
    example = replace(SCENES.examples()[0], load_image=None)
    assert seen_picture(bundled, example, prompt_batch(bundled, [example])) is None


def test_what_is_no_record_leaves_the_autopsy_of_the_measured_one(tmp_path: Path, shelf: ModelShelf) -> None:
    """A forced run whose result no record can hold fails, so nothing of it takes the place of what was measured."""

    @dataclass(frozen=True)
    class Wrong(Alone):
        value: Any = None

        def run(self, bench: Bench) -> TaskResult:
            return TaskResult(measurements={"ppl": {"value": self.value}})

    good, *wrong = (
        replace(looked_at(FULL, "a", {"nothing": Nothing(), "alone": Wrong(value)}), dataset=Scenes(num_samples=1))
        for value in (1.0, "many", float("nan"), {1})
    )
    run_cells([good], tmp_path, shelf=shelf)
    before = autopsy_path(tmp_path, good.key).read_bytes()
    autopsy_path(tmp_path, good.key).write_bytes(before + b" ")
    for cell in wrong:
        body = run_cells([cell], tmp_path, shelf=shelf).bodies[cell.key]
        assert (body["key"], body["status"], body["phase"]) == (good.key, "crash", "report")
        assert body["error"]["type"] == "RecordError"
    assert autopsy_path(tmp_path, good.key).read_bytes() == before + b" "
