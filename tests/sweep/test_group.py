"""Cells of one model and data set: what they share, and the batch that is chosen, on which no number depends."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvbench.cache import Budget, Needs, Policy
from kvbench.cache.policy import needs_of
from kvbench.contract.driving import Held, held_positions, left_padded
from kvbench.datasets.scenes import Scenes
from kvbench.errors import RecordError
from kvbench.kernels.dispatch import MAX_ROWS
from kvbench.models.inputs import PromptBatch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.key_norm import KeyNorm
from kvbench.policies.random import Random
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.stats.intervals import mean_interval
from kvbench.sweep import group
from kvbench.sweep import group as batch
from kvbench.sweep.cell import Cell
from kvbench.sweep.group import GroupPlan, ModelShelf, auto_batch_size
from kvbench.tasks.decode import CacheSetting, Decoding, forced
from kvbench.tasks.generation import Generation
from kvbench.tasks.perplexity import Fidelity, Perplexity
from kvbench.tasks.task import BatchTask, Bench, Part, Payload, TaskResult, joined
from tests.models.checkpoints import save_checkpoint
from tests.sweep.watching import KeptInMemory, Notes, run_cells
from tests.tasks.benches import FULL, KeepAll, NanAtDecode, NotANumber, bench_of, cell_of, cut
from tests.tasks.test_windows import window
from tests.tiny_models import random_tokens, tiny_model

SHORT_ANSWERS = Scenes(num_samples=1, ask="follow_up", num_follow_ups=3)
QUALITY = {
    "perplexity": Perplexity(),
    "generation": Generation(max_new_tokens=8),
    "fidelity": Fidelity(max_new_tokens=8, check_tokens=2),
}


@dataclass(frozen=True)
class Scores(BatchTask):
    """One number per batch, how often it was asked, and perhaps a failure."""

    protocol: ClassVar[str] = "scores_v1"
    asked: ClassVar[list[int]] = []
    fails_at: int | None = None
    error: BaseException = ValueError("on purpose")  # noqa: RUF009

    def measure(self, bench: Bench, part: Part) -> Payload:
        self.asked.append(part.number)
        if part.number == self.fails_at:
            raise self.error
        return {"number": part.number}

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        result = TaskResult()
        result.measure("ppl", mean_interval([float(payload["number"]) for payload in payloads]))
        return result


@dataclass(frozen=True)
class Timed:
    """A task that says nothing of what may run beside it."""

    protocol: ClassVar[str] = "timed_v1"

    def run(self, bench: Bench) -> TaskResult:
        return TaskResult()


@dataclass(frozen=True)
class Talk(Timed):
    """A task of its own pass that is not timed."""

    is_timed: ClassVar[bool] = False


@pytest.fixture(autouse=True)
def _nothing_asked() -> None:
    Scores.asked.clear()


def settings() -> list[CacheSetting]:
    policies: list[Policy] = [H2O(), StreamingLLM(), Elastic(), Random()]
    budget = Budget(fraction=0.2)
    return [FULL, *(CacheSetting(policy=p, budget=budget, positions=p.native_positions) for p in policies)]


def told(body: dict[str, Any]) -> dict[str, Any]:
    own = ("attempt", "started_utc", "duration_s")
    return {name: value for name, value in body.items() if name not in own}


@pytest.mark.parametrize("num_settings", [2, pytest.param(5, marks=pytest.mark.long)])
def test_shared_prompts_give_the_same_records_with_one_prefill_for_all(
    shelf: ModelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_settings: int
) -> None:
    prefills: list[int] = []
    begin = Decoding.__init__

    def counted(self: Decoding, *given: Any, prompt_logits: Tensor | None = None) -> None:
        if prompt_logits is None:
            prefills.append(1)
        begin(self, *given, prompt_logits=prompt_logits)

    monkeypatch.setattr(Decoding, "__init__", counted)
    chosen = settings()[:num_settings]
    cells = [cell_of(QUALITY, dataset=SHORT_ANSWERS, setting=setting, number=n) for n, setting in enumerate(chosen)]
    shared = run_cells(cells, tmp_path / "shared", shelf=shelf)
    num_shared = len(prefills)
    alone = run_cells(cells, tmp_path / "alone", shelf=shelf, share=False)
    assert [told(shared.bodies[cell.key]) for cell in cells] == [told(alone.bodies[cell.key]) for cell in cells]
    assert {body["status"] for body in shared.bodies.values()} == {"ok"}
    assert num_shared == 2, "two batches for all cells, and for the full cache's own answers"
    assert len(prefills) - num_shared > num_settings * 2 * 4
    assert shared.tasks == {cell.key: pytest.approx(3.0) for cell in cells}
    assert shared.num_beats > num_settings * 4


def test_the_full_cache_is_built_once_per_batch_for_the_fidelity_of_all_cells(
    shelf: ModelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[bool] = []
    decoding = Part.decoding

    def counted(self: Part, setting: CacheSetting, *arguments: Any, **options: Any) -> Decoding:
        built.append(isinstance(setting.policy, KeepAll))
        return decoding(self, setting, *arguments, **options)

    tasks = {"fidelity": Fidelity(max_new_tokens=4, check_tokens=2)}
    cells = [cell_of(tasks, dataset=SHORT_ANSWERS, setting=cut(), number=n) for n in range(3)]
    monkeypatch.setattr(Part, "decoding", counted)
    run_cells(cells, tmp_path, shelf=shelf)
    num_answers, num_check, num_batches = 2, 2, 2
    assert built.count(True) == num_answers + num_check + num_batches
    assert built.count(False) == len(cells) * num_batches


def test_cells_run_batch_by_batch_and_commit_each(shelf: ModelShelf, tmp_path: Path) -> None:
    cells = [cell_of({"scores": Scores()}, number=n) for n in range(2)]
    kept: dict[str, KeptInMemory] = {}
    run_cells(cells, tmp_path, shelf=shelf, batches=kept)
    assert Scores.asked == [0, 0, 1, 1]
    assert [kept[cell.key].kept for cell in cells] == [{n: {"scores": {"number": n}} for n in (0, 1)}] * 2


def test_a_cell_is_told_of_as_soon_as_its_last_batch_is_done(
    shelf: ModelShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_before: dict[str, list[int]] = {}
    done = Notes.done

    def noted(self: Notes, body: dict[str, Any]) -> None:
        asked_before[body["key"]] = list(Scores.asked)
        done(self, body)

    monkeypatch.setattr(Notes, "done", noted)
    kept, first, second, timed = (
        cell_of({"scores": Scores(), **({"timed": Timed()} if n == 3 else {})}, number=n) for n in range(4)
    )
    batches = {kept.key: kept_of({n: {"scores": {"number": n}} for n in (0, 1)})}
    notes = run_cells([timed, kept, first, second], tmp_path, shelf=shelf, batches=batches)
    assert asked_before == {
        kept.key: [0],  # all that it needs was there
        first.key: [0, 0, 0, 1, 1],
        second.key: [0, 0, 0, 1, 1, 1],
        timed.key: [0, 0, 0, 1, 1, 1],
    }
    assert list(notes.bodies)[-1] == timed.key, "what is timed comes when nothing is shared any more"
    assert [told for told in notes.batches_told if told[0] in (kept.key, first.key)] == [
        (kept.key, 2, 2),
        (first.key, 0, 2),
        (first.key, 1, 2),
        (first.key, 2, 2),
    ]


def test_a_kill_in_the_last_batch_leaves_the_cells_that_were_done(shelf: ModelShelf, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class Kills(KeptInMemory):
        def commit(self, number: int, payload: Payload) -> None:
            super().commit(number, payload)
            if number == 1:
                raise Killed

    cells = [cell_of({"scores": Scores()}, number=n) for n in range(3)]
    batches: dict[str, KeptInMemory] = {cells[1].key: Kills()}
    plan = GroupPlan(
        results=tmp_path, sweep="s", share_prompts=True, batches_of=lambda key: batches.setdefault(key, KeptInMemory())
    )
    notes = Notes()
    with pytest.raises(Killed):
        group.run_group(cells, plan, shelf=shelf, watcher=notes)
    assert list(notes.bodies) == [cells[0].key]
    Scores.asked.clear()
    batches[cells[1].key] = kept_of(batches[cells[1].key].kept)
    run_cells(cells[1:], tmp_path, shelf=shelf, batches=batches)
    assert Scores.asked == [1], "one batch of the third cell is all that is left"


def test_only_what_is_timed_waits_until_nothing_works_beside_it(shelf: ModelShelf, tmp_path: Path) -> None:
    tasks = {"scores": Scores(), "conversation": Talk(), "memory": Timed(), "speed": Timed()}
    cells = [cell_of(tasks, number=n) for n in range(2)]
    notes = run_cells(cells, tmp_path, shelf=shelf)
    assert notes.timed == ["memory", "speed"] * 2


def test_committed_batches_are_not_measured_again(shelf: ModelShelf, tmp_path: Path) -> None:
    cells = [cell_of(QUALITY, dataset=SHORT_ANSWERS, setting=cut(), number=n) for n in range(2)]
    kept: dict[str, KeptInMemory] = {}
    whole = run_cells(cells, tmp_path, shelf=shelf, batches=kept)
    del kept[cells[0].key].kept[0]
    kept[cells[1].key].kept.clear()
    again = run_cells(cells, tmp_path, shelf=shelf, batches=kept)
    assert [told(again.bodies[c.key]) for c in cells] == [told(whole.bodies[c.key]) for c in cells]
    scored = cell_of({"scores": Scores()})
    run_cells([scored], tmp_path, shelf=shelf, batches={scored.key: kept_of({1: {"scores": {"number": 1}}})})
    assert Scores.asked == [0]
    run_cells([scored], tmp_path, shelf=shelf, batches={scored.key: kept_of({1: {"another task": {}}})})
    assert Scores.asked == [0, 0, 1], "batches of other tasks do not count"


def kept_of(payloads: dict[int, Payload]) -> KeptInMemory:
    kept = KeptInMemory()
    kept.kept = payloads
    return kept


@pytest.mark.cover("one")
@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("no"), "crash"), (SystemExit(0), "crash"), (MemoryError("no"), "oom"), (KeyboardInterrupt(), "crash")],
)
def test_a_failing_cell_is_left_out_and_the_others_go_on(
    shelf: ModelShelf, tmp_path: Path, error: BaseException, status: str
) -> None:
    good, bad, last = (cell_of({"scores": Scores(*how)}, number=n) for n, how in enumerate([(), (0, error), ()]))
    notes = run_cells([good, bad, last], tmp_path, shelf=shelf)
    assert [notes.bodies[cell.key]["status"] for cell in (good, bad, last)] == ["ok", status, "ok"]
    assert notes.bodies[bad.key]["phase"] == "scores"
    assert notes.bodies[bad.key]["error"]["type"] == type(error).__name__
    assert notes.bodies[good.key]["measurements"]["ppl"]["value"] == 0.5
    assert next(iter(notes.bodies)) == bad.key, "it is told at once"
    assert Scores.asked == [0, 0, 0, 1, 1]


@pytest.mark.long
def test_nan_in_one_cell_does_not_reach_the_others(shelf: ModelShelf, tmp_path: Path) -> None:
    poison = CacheSetting(policy=NotANumber(), budget=Budget(fraction=0.2), positions="original")
    undecided = replace(poison, policy=NanAtDecode())
    cells = [
        cell_of(QUALITY, dataset=SHORT_ANSWERS, setting=s, number=n)
        for n, s in enumerate([cut(), poison, undecided, FULL])
    ]
    notes = run_cells(cells, tmp_path / "together", shelf=shelf)
    assert [notes.bodies[cell.key]["status"] for cell in cells] == ["ok", "nonfinite", "nonfinite", "ok"]
    alone = run_cells([cells[0]], tmp_path / "alone", shelf=shelf, share=False)
    assert told(alone.bodies[cells[0].key]) == told(notes.bodies[cells[0].key])


def test_a_model_that_cannot_be_loaded_is_tried_once_and_told_for_every_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(*arguments: object) -> Any:
        calls.append(1)
        raise OSError("no such weights")

    monkeypatch.setattr(group, "load_model", broken)
    cells = [cell_of({"scores": Scores()}, number=n) for n in range(3)]
    bodies = run_cells(cells, tmp_path).bodies
    assert len(calls) == 1
    assert [(bodies[c.key]["status"], bodies[c.key]["phase"]) for c in cells] == [("crash", "load")] * 3
    assert all("no such weights" in body["error"]["message"] for body in bodies.values())


def test_a_disk_that_takes_no_batch_costs_no_cell(
    shelf: ModelShelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(KeptInMemory):
        def commit(self, number: int, payload: Payload) -> None:
            raise RecordError("no space left")

    cell = cell_of({"scores": Scores()})
    assert run_cells([cell], tmp_path, shelf=shelf, batches={cell.key: Full()}).bodies[cell.key]["status"] == "ok"
    assert "no space left" in caplog.text


def test_nothing_shared_is_alive_when_time_and_memory_are_measured(shelf: ModelShelf, tmp_path: Path) -> None:
    alive: list[bool] = []

    @dataclass(frozen=True)
    class Looks:
        protocol: ClassVar[str] = "looks_v1"

        def run(self, bench: Bench) -> TaskResult:
            alive.append(bench.prompts._part is not None)
            return TaskResult()

    cells = [
        cell_of({"looks": Looks(), "perplexity": Perplexity()}, dataset=SHORT_ANSWERS, setting=cut(), number=n)
        for n in range(2)
    ]
    notes = run_cells(cells, tmp_path, shelf=shelf)
    assert alive == [False, False]
    assert [name for _, name in notes.phases].index("looks") > 2
    assert all("ppl" in body["measurements"] for body in notes.bodies.values())


def test_the_shelf_keeps_the_model_it_was_asked_for_last() -> None:
    shelf, spec = ModelShelf(), ModelSpec(checkpoint="bundled")
    first = shelf.get(spec, "cpu")
    assert shelf.get(ModelSpec(checkpoint="bundled"), "cpu") is first
    assert shelf.get(ModelSpec(checkpoint="bundled", dtype="bfloat16"), "cpu") is not first
    assert shelf.get(spec, "cpu") is not first


def test_a_model_that_refers_to_itself_is_gone_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []

    class Loaded:
        def __init__(self) -> None:
            self.itself = self

    def load(spec: ModelSpec, device: str) -> Any:
        assert [ref() for ref in alive] == [None] * len(alive)
        loaded = Loaded()
        alive.append(weakref.ref(loaded))
        return loaded

    monkeypatch.setattr(group, "load_model", load)
    shelf = ModelShelf()
    for dtype in ("float32", "bfloat16", "float32"):
        shelf.get(ModelSpec(checkpoint="bundled", dtype=dtype), "cpu")
    assert len(alive) == 3


SIZES = (1, 4, 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelSpec(checkpoint=str(save_checkpoint("llama", tmp_path_factory.mktemp("llama")))), "cpu")


def under(policy: Policy, *, engine: Any = "eager") -> CacheSetting:
    return CacheSetting(policy=policy, budget=Budget(fraction=0.4), positions=policy.native_positions, engine=engine)


def cells(*policies: Policy, engine: Any = "eager", tasks: Any = None) -> list[Cell]:
    return [cell_of(tasks or {"ppl": Perplexity()}, setting=under(policy, engine=engine)) for policy in policies]


def size(loaded: LoadedModel, some: list[Cell], *, prompts: int = 1000, free_bytes: int = 2**40) -> int:
    return auto_batch_size(loaded, some, [512] * prompts, free_bytes=free_bytes)


def test_as_many_prompts_as_fit_and_at_least_one(llama: LoadedModel) -> None:
    found = [size(llama, cells(H2O()), free_bytes=free) for free in (0, 2**31, 2**31 + 2**24, 2**31 + 2**26, 2**40)]
    assert found == sorted(found)
    assert found[0] == found[1] == 1
    assert found[2] < found[-1] == 32


def test_a_gpu_gets_as_many_rows_as_the_kernels_of_a_step_take() -> None:
    assert batch._MOST_ON_GPU == MAX_ROWS


def test_few_prompts_are_one_batch_and_more_are_spread_evenly(llama: LoadedModel) -> None:
    sizes = {count: size(llama, cells(H2O()), prompts=count) for count in (0, 1, 8, 20, 32, 33, 48, 100)}
    assert sizes == {0: 1, 1: 1, 8: 8, 20: 20, 32: 32, 33: 17, 48: 24, 100: 25}


def test_batches_are_larger_where_every_answer_goes_in_chunks(llama: LoadedModel) -> None:
    generated = {"ppl": Perplexity(), "generation": Generation()}
    assert size(llama, cells(SnapKV())) > size(llama, cells(SnapKV(), H2O())) == size(llama, cells(H2O()))
    assert size(llama, cells(SnapKV(), tasks=generated)) == size(llama, cells(H2O()))


def test_the_larger_of_two_caches_decides_and_not_their_number(llama: LoadedModel) -> None:
    few, many = cells(H2O()), cells(*[H2O(num_sinks=number) for number in range(40)])
    frees = [2**31 + number * 2**21 for number in range(1, 40)]
    sizes, same, tight = (
        [size(llama, some, free_bytes=free) for free in frees]
        for some in (few, many, [replace(few[0], setting=under(Full()))])
    )
    assert same == sizes
    assert tight < sizes
    assert all(fits <= other for fits, other in zip(tight, sizes, strict=True))


@dataclass(frozen=True)
class Together(BatchTask):
    """Says of each example how many there were in its batch."""

    protocol: ClassVar[str] = "together_v1"

    def measure(self, bench: Bench, part: Part) -> Payload:
        return {example.id: {"together": len(part.examples)} for example in part.examples}

    def summarise(self, bench: Bench, payloads: Sequence[Payload]) -> TaskResult:
        return TaskResult(samples=joined(payloads))


def test_a_record_says_how_many_prompts_were_decoded_together(tmp_path: Path, shelf: ModelShelf) -> None:
    (cell,) = cells(H2O(), tasks={"together": Together()})
    (body,) = run_cells([replace(cell, batch_size=None)], tmp_path, shelf=shelf).bodies.values()
    assert body["prompts"]["batch_size"] == 3
    assert [row["together"] for row in body["samples"]] == [3, 3, 3]


def test_kept_batches_of_another_size_are_measured_anew(
    tmp_path: Path, shelf: ModelShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, KeptInMemory] = {}
    for size, together in ((1, [1, 1, 1]), (2, [2, 2, 1]), (3, [3, 3, 3])):
        monkeypatch.setattr(group, "auto_batch_size", lambda *given, size=size: size)
        (cell,) = cells(H2O(), tasks={"together": Together()})
        (body,) = run_cells([replace(cell, batch_size=None)], tmp_path, shelf=shelf, batches=kept).bodies.values()
        assert [row["together"] for row in body["samples"]] == together


@pytest.mark.cover("one")
def test_the_likelihood_does_not_depend_on_the_batch(llama: LoadedModel, tmp_path: Path, policy: Policy) -> None:
    if Needs.QUESTION in needs_of(policy):
        pytest.skip("it reads the question, and a window of text asks none")
    if isinstance(policy, KeyNorm):
        pytest.skip("keys of a word are equally long in the first layer wherever it stands, so rounding breaks ties")
    examples = [window(f"w{number}", 2 * number, 20 + 3 * (number % 4), 5 + number % 3) for number in range(16)]
    means = []
    for batch_size in SIZES:
        bench = replace(bench_of(llama, tmp_path, under(policy), batch_size=batch_size), examples=examples)
        rows = Perplexity().run(bench).samples.values()
        means.append(sum(row["nll_sum"] for row in rows) / sum(row["num_scored_tokens"] for row in rows))
    assert means == pytest.approx([means[0]] * 3, abs=1e-4)


@torch.inference_mode()
def kept_sets(policy: Policy, num_rows: int, batch_size: int) -> list[list[Held]]:
    """What each of `num_rows` holds after its prompt and after three more tokens, [row][moment]; in double precision.

    So that only scores that are equal in truth tie, and ties are broken by age.
    """
    model = tiny_model("llama_gqa", double=True)
    loaded = LoadedModel(model=model, processor=None, tokenizer=None, device=torch.device("cpu"), image_token_id=None)
    prompts, answers = [random_tokens(number, 17 + number % 5) for number in range(num_rows)], random_tokens(99, 16, 3)
    found: list[list[Held]] = []
    for start in range(0, num_rows, batch_size):
        rows = range(start, start + batch_size)
        tokens, mask = left_padded([prompts[row] for row in rows])
        prompt = PromptBatch(
            tensors={"input_ids": tokens, "attention_mask": mask},
            kind=torch.zeros_like(tokens, dtype=torch.int8),
            row_seeds=tuple(rows),
        )
        decoding = under(policy).decoding(loaded, prompt, 8)
        moments = [held_positions(decoding.cache)]
        given: Tensor = answers[start : start + batch_size]
        for _ in forced(decoding, given, [3] * batch_size):
            pass
        moments.append(held_positions(decoding.cache))
        found += [[[[layer[row]] for layer in held] for held in moments] for row in range(batch_size)]
    return found


@pytest.mark.few(8)
@pytest.mark.cover("mechanisms")
@pytest.mark.parametrize("sizes", [(1, 2, 6), pytest.param(SIZES, marks=pytest.mark.long)], ids=str)
def test_the_kept_entries_do_not_depend_on_the_batch(policy: Policy, sizes: tuple[int, ...]) -> None:
    alone, some, together = (kept_sets(policy, max(sizes), batch_size) for batch_size in sizes)
    assert alone == some == together
