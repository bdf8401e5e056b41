"""query_visible=false: picture or context is compressed first, the question follows into what is left."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Budget, Needs, Policy, ScorePolicy, View
from kvbench.cache.released import departures_of
from kvbench.datasets.base import Example, Window
from kvbench.datasets.retrieval import Recall
from kvbench.errors import DataError, ModelSupportError
from kvbench.models.inputs import by_question_length, num_question_tokens, prompt_batch, prompt_ids, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.generation import Generation
from kvbench.tasks.perplexity import Fidelity, Perplexity
from kvbench.tasks.task import Bench, Task
from tests.contract import is_outcome
from tests.covering import share_of
from tests.models.checkpoints import save_checkpoint
from tests.tasks.benches import FULL, SCENES, bench_of, cut

SHORT: dict[str, Task] = {
    "perplexity": Perplexity(),
    "generation": Generation(max_new_tokens=6),
    "fidelity": Fidelity(max_new_tokens=6, check_tokens=2),
}


@dataclass(frozen=True, kw_only=True)
class Spy(ScorePolicy):
    """Keeps the newest, and notes what it saw at each cut of several tokens."""

    needs = Needs.MASS
    cuts: list[tuple[int, int, int]] = field(default_factory=list)

    def score(self, view: View) -> Tensor:
        if view.prefill and view.layer == 0:
            self.cuts.append((view.new_tokens, int(view.seen[0]), int(view.valid[0, 0].sum())))
        return view.position.float()


def hidden(bench: Bench) -> Bench:
    return replace(bench, query_visible=False)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A random Llama whose template writes the begin token and the message."""
    folder = save_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return load_model(ModelSpec(checkpoint=str(folder)), "cpu")


def test_the_full_cache_does_not_care(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = bench_of(bundled, tmp_path, FULL)
    seen, unseen = Perplexity().run(bench), Perplexity().run(hidden(bench))
    for name, row in seen.samples.items():
        assert unseen.samples[name]["nll_sum"] == pytest.approx(row["nll_sum"], abs=1e-4)
        assert unseen.samples[name]["num_scored_tokens"] == row["num_scored_tokens"]
    assert unseen.measurements["ppl"]["value"] == pytest.approx(seen.measurements["ppl"]["value"], rel=1e-5)


def test_where_the_question_stands_is_known_seen_or_hidden(text_model: LoadedModel) -> None:
    some = [
        Example(id="a", cluster="a", context="It is red. ", question="What is it?", reference="Red."),
        Example(id="b", cluster="b", question="What?", reference="Red."),
    ]
    seen = prompt_batch(text_model, some)
    assert seen.find_question_tokens is not None
    for row, number in enumerate(seen.find_question_tokens()):
        told = text_model.tokenizer.decode(seen.tensors["input_ids"][row, -number:])
        assert told.lstrip() == f"{some[row].question} [/INST]"
    hidden = prompt_batch(text_model, some[:1], num_question_tokens=num_question_tokens(text_model, some[0]))
    assert hidden.find_question_tokens is not None
    assert hidden.find_question_tokens() == (0,)


def test_running_text_has_no_question_to_be_found(text_model: LoadedModel) -> None:
    window = Window(prompt_tokens=3, scored_tokens=1)
    text = Example(id="a", cluster="a", question="What is it? A small red dot.", reference="", window=window)
    with pytest.raises(DataError, match="a is text to go on with and has no question"):
        num_question_tokens(text_model, text, hidden=False)


def test_a_policy_sees_the_picture_without_the_question(bundled: LoadedModel, tmp_path: Path) -> None:
    spy = Spy()
    bench = hidden(replace(bench_of(bundled, tmp_path, cut(policy=spy), batch_size=1), examples=SCENES.examples()[:1]))
    Perplexity().run(bench)
    question = num_question_tokens(bundled, bench.examples[0])
    (visible,) = prompt_batch(bundled, bench.examples).prompt_tokens
    first = visible - question
    assert spy.cuts == [(first, first, first), (question, visible, first // 5 + question)]


def test_a_cut_cache_answers_differently_when_the_question_is_hidden(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = bench_of(bundled, tmp_path, cut(Budget(fraction=0.02)))
    seen, unseen = Perplexity().run(bench), Perplexity().run(hidden(bench))
    assert abs(seen.measurements["ppl"]["value"] - unseen.measurements["ppl"]["value"]) > 1e-3


def test_of_a_text_to_complete_the_last_sentence_can_be_hidden(text_model: LoadedModel, tmp_path: Path) -> None:
    data = Recall(num_samples=2, num_keys=2, filler_words=0)
    full, spy = bench_of(text_model, tmp_path, FULL, batch_size=1), Spy()
    benches = [replace(bench, dataset=data, examples=data.examples()) for bench in (full, hidden(full))]
    seen, unseen = (Perplexity().run(bench).measurements["ppl"] for bench in benches)
    assert unseen["value"] == pytest.approx(seen["value"], rel=1e-5)
    row = Generation(max_new_tokens=3).run(benches[1]).samples[data.examples()[0].id]
    assert row["needles_recalled_fraction"] in (0.0, 1.0)
    example = data.examples()[0]
    Perplexity().run(replace(benches[1], setting=cut(policy=spy), examples=[example]))
    question = num_question_tokens(text_model, example)
    assert text_model.tokenizer.decode(prompt_ids(text_model, example)[-question:]).strip() == example.question
    assert [new for new, *_ in spy.cuts] == [len(prompt_ids(text_model, example)) - question, question]


@pytest.mark.long
@pytest.mark.parametrize("name", ["generation", "fidelity"])
def test_the_full_cache_still_equals_itself(bundled: LoadedModel, tmp_path: Path, name: str) -> None:
    result = SHORT[name].run(hidden(bench_of(bundled, tmp_path, FULL)))
    exact = {"generation": ("rougeL_vs_full", 1.0), "fidelity": ("kl_to_full", 0.0)}[name]
    assert result.measurements[exact[0]]["value"] == exact[1]
    assert set(result.samples) == {example.id for example in SCENES.examples()}


def test_only_questions_of_one_length_share_a_batch(bundled: LoadedModel, tmp_path: Path) -> None:
    bench = hidden(bench_of(bundled, tmp_path, FULL, batch_size=8))
    parts = [bench.prompts.part(number) for number in range(len(bench.prompts))]
    assert sorted(e.id for part in parts for e in part.examples) == sorted(e.id for e in bench.examples)
    for part in parts:
        assert part.batch.question_ids is not None
        lengths = {num_question_tokens(bundled, example) for example in part.examples}
        assert lengths == {part.batch.question_ids.shape[1]}
        for example, ids in zip(part.examples, part.batch.question_ids, strict=True):
            assert bundled.tokenizer.decode(ids) == f"{example.question} ASSISTANT:"


def test_both_chunks_together_are_the_prompt(bundled: LoadedModel) -> None:
    ((length, examples), *_) = by_question_length(bundled, SCENES.examples()).items()
    whole, split = prompt_batch(bundled, examples), prompt_batch(bundled, examples, num_question_tokens=length)
    assert split.question_ids is not None
    ids = split.tensors["input_ids"].shape[1]
    assert whole.tensors["input_ids"][:, :ids].equal(split.tensors["input_ids"])
    assert whole.tensors["input_ids"][:, ids:].equal(split.question_ids)
    assert whole.kind[:, :ids].equal(split.kind)
    assert split.tensors["attention_mask"].shape == split.kind.shape
    assert whole.tensors["pixel_values"].equal(split.tensors["pixel_values"])


@settings(max_examples=share_of(60), deadline=None)
@given(context=st.text("abc .\n", min_size=1, max_size=30), question=st.text("abc .\n?", min_size=1, max_size=20))
def test_nothing_of_the_question_is_in_the_first_part(text_model: LoadedModel, context: str, question: str) -> None:
    example = Example(id="x", cluster="x", context=context, question=question, reference="a")
    length = num_question_tokens(text_model, example)
    whole = text_model.tokenizer(prompt_text(text_model, example), add_special_tokens=False)["input_ids"]
    before = prompt_text(text_model, example).removesuffix(f"{question} [/INST]")
    assert 0 < length < len(whole)
    assert before.startswith(text_model.tokenizer.decode(whole[:-length]))


def test_text_contexts_are_hidden_in_the_same_way(text_model: LoadedModel, tmp_path: Path) -> None:
    examples = [
        Example(id=f"{n}", cluster=f"{n}", context="There are four objects. " * 4, question=q, reference="A small dot.")
        for n, q in enumerate(("What is it?", "What is small? What is red?"))
    ]
    bench = replace(bench_of(text_model, tmp_path, FULL), examples=examples)
    seen, unseen = Perplexity().run(bench), Perplexity().run(hidden(bench))
    assert unseen.measurements["ppl"]["value"] == pytest.approx(seen.measurements["ppl"]["value"], rel=1e-5)


@torch.inference_mode()
def test_every_policy_takes_a_question_after_its_cut(text_model: LoadedModel, policy: Policy, positions: Any) -> None:
    """The chunk is cut with what is left, and decoding goes on."""
    context = "There are four objects. " * 6
    example = Example(id="x", cluster="x", context=context, question="What is it?", reference="A dot.")
    batch = prompt_batch(text_model, [example], num_question_tokens=num_question_tokens(text_model, example))
    assert batch.question_ids is not None
    setting = CacheSetting(policy=policy, budget=Budget(fraction=0.4), positions=positions)
    decoding = setting.decoding(text_model, batch, 4)
    seen = batch.tensors["input_ids"].shape[1] + batch.question_ids.shape[1]
    held = decoding.cache.occupancy()
    assert held.seen_tokens == seen
    rounded_up = departures_of(policy).counts_as_released  # some released code rounds its target up
    assert not policy.bounded or is_outcome(policy) or held.entries_mean <= 0.4 * seen + rounded_up
    for number in range(1, 4):
        assert bool(decoding.step(torch.tensor([5])).isfinite().all())
        assert decoding.cache.occupancy().seen_tokens == seen + number


def test_an_example_with_nothing_before_its_question_is_refused(bundled: LoadedModel) -> None:
    with pytest.raises(DataError, match="bare has neither a picture nor a context"):
        num_question_tokens(bundled, Example(id="bare", cluster="bare", question="Why?", reference="So."))


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        (
            "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text | upper }}{% endif %}{% endfor %}",
            "changes",
        ),
        (
            "{% for p in messages[0].content | reverse %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}",
            "after",
        ),
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", "nothing before"),
    ],
)
def test_a_template_that_hides_the_place_is_refused(bundled: LoadedModel, template: str, fragment: str) -> None:
    odd = replace(bundled, processor=SimpleNamespace(chat_template=template))
    example = SCENES.examples()[0]
    with pytest.raises(ModelSupportError, match=fragment):
        num_question_tokens(odd, example)
