"""What an answer becomes with its evidence kept, on a tiny text model: against plain attention and another replay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvbench.autopsy.counterfactual import Asked, Counterfactual, counterfactual
from kvbench.autopsy.replay import replay
from kvbench.cache import Budget, Policy
from kvbench.cache.policy import Pin, pinned
from kvbench.contract.driving import held_positions
from kvbench.datasets.retrieval import Recall
from kvbench.errors import ConfigError, MeasureError
from kvbench.models.inputs import prompt_ids
from kvbench.models.loader import load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.elastic import Elastic
from kvbench.policies.h2o import H2O
from kvbench.policies.merge.voronoi import Voronoi
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.generation import Generation
from kvbench.tasks.task import Prompts
from tests.models.checkpoints import save_checkpoint
from tests.tasks.benches import KeepAll, bench_of

DATA, STEPS = Recall(num_samples=6, num_keys=3, filler_words=4), 7
TASK = Generation(max_new_tokens=STEPS)
POLICIES: dict[str, Policy] = {"h2o": H2O(), "snapkv": SnapKV(num_recent=4), "streaming_llm": StreamingLLM()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One sample as it was measured, and where its model lies."""

    asked: Asked
    row: dict[str, Any]
    folder: Path

    def explained(self, **how: Any) -> Counterfactual:
        return counterfactual(self.asked, self.row, where="by torch 0 on a toaster", **how)


CaseOf = Callable[..., Case]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """Return the sample whose answer differs latest, or with a hidden question first, and its row; made once."""
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    loaded, answers = load_model(ModelSpec(checkpoint=str(folder)), "cpu"), tmp_path_factory.mktemp("answers")

    @functools.cache
    def made(policy: Policy, *, query_visible: bool = True) -> Case:
        setting = CacheSetting(policy=policy, budget=Budget(fraction=0.25), positions="original")
        bench = bench_of(loaded, answers / str(query_visible), setting, batch_size=1)
        own = {"dataset": DATA, "query_visible": query_visible, "full_policy": KeepAll()}
        rows = TASK.run(replace(bench, examples=DATA.examples(), **own)).samples
        differing = [one for one in DATA.examples() if rows[one.id]["first_divergence_tokens"] is not None]
        latest = sorted(differing, key=lambda one: int(rows[one.id]["first_divergence_tokens"]), reverse=query_visible)
        example = latest[0]
        asked = Asked(loaded=loaded, example=example, setting=setting, task=TASK, **own)
        return Case(asked=asked, row=rows[example.id], folder=folder)

    return made


def freed_of(one: Case, policy: Policy) -> Any:
    prompts = Prompts(one.asked.loaded, [one.asked.example], 1, query_visible=one.asked.query_visible)
    setting = replace(one.asked.setting, policy=policy)
    ends = one.asked.loaded.end_token_ids
    (found,) = replay(prompts.part(0), setting, end_token_ids=ends, max_new_tokens=STEPS)
    return found


def gone_before(one: Case, answer: list[int]) -> Any:
    """(L, H, N) bool: what the policy does not hold any more when it attends with the last token before its next."""
    part = Prompts(one.asked.loaded, [one.asked.example], 1, query_visible=one.asked.query_visible).part(0)
    batch = part.batch if answer else replace(part.batch, question_ids=None)
    decoding = one.asked.setting.decoding(one.asked.loaded, batch, STEPS)
    with torch.inference_mode():
        for token in answer[:-1]:
            decoding.step(torch.tensor([token]))
    known = decoding.cache.policy_layers[0].ledger.seen[0]
    whole = len(prompt_ids(one.asked.loaded, one.asked.example)) + len(answer)
    return np.array([
        [[place < known and place not in head for place in range(whole)] for head in layer[0]]
        for layer in held_positions(decoding.cache)
    ])  # fmt: skip


def plain_attention(one: Case, answer: list[int]) -> Any:
    """(L, H, N): the last row of attention that transformers' own model gives, mean over the heads of a group."""
    plain = AutoModelForCausalLM.from_pretrained(one.folder, attn_implementation="eager").eval()
    tokens = torch.tensor([[*prompt_ids(one.asked.loaded, one.asked.example), *answer]])
    with torch.inference_mode():
        rows = plain(tokens, output_attentions=True).attentions
    return torch.stack([row[0, :, -1].unflatten(0, (2, -1)).mean(dim=1) for row in rows]).numpy()


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "query_visible"), [*((name, True) for name in POLICIES), ("h2o", False)])
def test_the_evidence_is_what_plain_attention_says_of_what_had_gone(
    case: CaseOf, name: str, query_visible: bool
) -> None:
    one = case(POLICIES[name], query_visible=query_visible)
    found = one.explained(num_evidence=2, num_controls=1)
    replayed = freed_of(one, POLICIES[name])
    assert found.at == one.row["first_divergence_tokens"]
    assert found.at is not None
    assert (found.at > 0) == query_visible
    common, freed = replayed.answer[: found.at], replayed.freed
    attention = plain_attention(one, common)
    missing = gone_before(one, common)
    assert found.num_missing == missing.any(axis=(0, 1)).sum()
    gone = np.where(missing, attention, 0.0)[..., 1:]
    best = gone.max(axis=(0, 1))
    assert [one.position for one in found.evidence] == (np.argsort(-best)[:2] + 1).tolist()
    for evidence in found.evidence:
        layer, head = evidence.layer, evidence.head
        assert evidence.attention_fraction == pytest.approx(attention[layer, head, evidence.position], abs=1e-5)
        assert evidence.left_at == freed[layer, head, evidence.position]
        assert evidence.rank is not None
        assert evidence.num_kept is not None
        assert evidence.rank > evidence.num_kept, "it is not among those that stay"
        assert evidence.num_kept < (evidence.num_ranked or 0)
        assert evidence.missing_fraction == (gone[..., evidence.position - 1] > 0).mean()


@pytest.mark.few(1)
@pytest.mark.parametrize("name", POLICIES)
def test_the_kept_entry_is_held_and_the_answer_is_that_of_a_replay_with_it(case: CaseOf, name: str) -> None:
    one = case(POLICIES[name])
    found = one.explained(num_controls=2)
    (evidence,) = found.evidence
    alone, everywhere = found.runs
    assert alone.pins == (Pin(position=evidence.position, layer=evidence.layer, head=evidence.head),)
    assert everywhere.pins == (Pin(position=evidence.position),)
    assert found.policy.text == one.row["text"]
    assert found.full.text == one.row["full_text"]
    base = freed_of(one, POLICIES[name])
    for run in (alone, everywhere, *found.controls):
        kept = freed_of(one, pinned(POLICIES[name], run.pins))
        (pin,) = run.pins
        where = (slice(None), slice(None)) if pin.layer is None else (pin.layer, pin.head)
        assert (kept.freed[(*where, pin.position)] < 0).all()
        assert run.is_held
        assert run.text == one.asked.loaded.tokenizer.decode(kept.answer, skip_special_tokens=True).strip()
        held, before = ((other.freed != 0).sum(axis=-1) for other in (kept, base))
        assert (held == before).all(), "the prompt's cut leaves as many in every layer and head"
    assert not {run.pins[0].position for run in found.controls} & {0, evidence.position}


def test_the_probability_is_of_the_full_caches_token_where_the_answers_part(case: CaseOf) -> None:
    one = case(H2O())
    found = one.explained(num_controls=0)
    assert found.full.probability is not None
    assert found.policy.probability is not None
    assert found.full.probability > found.policy.probability
    assert found.full.brings_back
    assert not found.policy.brings_back
    assert found.full.token != found.policy.token
    for run in found.runs:
        assert run.brings_back == (run.token == found.full.token)


def changed(row: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    yield row | {"text": "a red dot"}, "the policy answers .* where the record has 'a red dot'"
    yield row | {"full_text": "a red dot"}, "the full cache answers .* where the record has 'a red dot'"
    yield row | {"first_divergence_tokens": 0}, "part at token .*, in the record at 0"


def test_a_record_that_is_not_given_again_is_refused_in_one_line(case: CaseOf) -> None:
    one = case(H2O())
    for row, match in changed(one.row):
        with pytest.raises(MeasureError, match=match) as caught:
            replace(one, row=row).explained()
        assert "\n" not in str(caught.value)
        assert "by torch 0 on a toaster" in str(caught.value)


def test_a_policy_without_a_score_is_refused_by_name(case: CaseOf) -> None:
    with pytest.raises(ConfigError, match="Elastic does not choose by a score alone"):
        case(Elastic()).explained()


def test_what_was_merged_says_into_which_entry(case: CaseOf) -> None:
    found = case(H2O(merge=Voronoi())).explained(num_controls=0)
    assert all((one.joined is not None) == (one.left_at == 0) for one in found.evidence)
    assert all(run.is_held for run in found.runs)


def test_equal_answers_are_not_looked_into(case: CaseOf) -> None:
    one = case(H2O())
    whole = replace(one.asked, setting=replace(one.asked.setting, budget=Budget(fraction=1.0)))
    row = one.row | {"text": one.row["full_text"], "first_divergence_tokens": None}
    found = counterfactual(whole, row)
    assert (found.at, found.evidence, found.runs) == (None, (), ())


def test_where_the_window_takes_the_whole_budget_it_is_said_that_nothing_could_be_held(case: CaseOf) -> None:
    found = case(StreamingLLM(num_recent=1000)).explained(num_controls=0)
    assert found.runs
    assert not any(run.is_held for run in found.runs)
    assert {run.text for run in found.runs} == {found.policy.text}
