"""Running text: so many of the model's own tokens given, the next ones scored, nothing added."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from kvbench.datasets.base import Example, Window
from kvbench.errors import ConfigError, DataError
from kvbench.models.inputs import answer_tokens, prompt_batch, reference_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.sweep.cell import check_fit
from kvbench.tasks.generation import Generation
from kvbench.tasks.perplexity import Along, Fidelity, Perplexity
from kvbench.tasks.task import Prompts
from tests.models.checkpoints import save_checkpoint
from tests.tasks.benches import FULL, bench_of, cut

TEXT = "There are four objects. What is it? A small red dot in row one, column two. " * 3


def window(name: str, start: int, prompt: int = 20, scored: int = 9) -> Example:
    sizes = Window(prompt_tokens=prompt, scored_tokens=scored)
    return Example(id=name, cluster=name, question=TEXT[start:], reference="", window=sizes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(ModelSpec(checkpoint=str(save_checkpoint("llama", tmp_path_factory.mktemp("llama")))), "cpu")


def test_a_window_is_the_texts_own_tokens(llama: LoadedModel) -> None:
    example = window("a", 0)
    tokens = llama.tokenizer(TEXT)["input_ids"]
    batch = prompt_batch(llama, [example, window("b", 0)])
    assert batch.tensors["input_ids"].tolist() == [tokens[:20]] * 2
    assert batch.prompt_tokens == [20, 20]
    assert answer_tokens(llama, example) == tokens[20:29]
    assert reference_text(llama, example) == llama.tokenizer.decode(tokens[20:29]).strip()


@torch.no_grad()
def test_a_windows_perplexity_is_that_of_one_plain_forward(llama: LoadedModel, tmp_path: Path) -> None:
    bench = replace(bench_of(llama, tmp_path, FULL), examples=[window("a", 0), window("b", 7)])
    result = Perplexity().run(bench)
    for example in bench.examples:
        ids = torch.tensor([llama.tokenizer(example.question)["input_ids"][:29]])
        logits = llama.model(ids, use_cache=False).logits[0, 19:28]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 20:], reduction="sum")
        assert result.samples[example.id]["nll_sum"] == pytest.approx(float(loss), rel=1e-4)
        assert result.samples[example.id]["num_scored_tokens"] == 9


def test_windows_are_generated_from_too(llama: LoadedModel, tmp_path: Path) -> None:
    bench = replace(bench_of(llama, tmp_path, cut()), examples=[window("a", 0)])
    row = Generation(max_new_tokens=5).run(bench).samples["a"]
    assert row["reference"] == reference_text(llama, bench.examples[0])
    assert 0.0 <= row["rougeL_vs_reference"] <= 1.0


def test_a_passage_with_too_few_tokens_is_refused(llama: LoadedModel) -> None:
    count = len(llama.tokenizer(TEXT)["input_ids"])
    with pytest.raises(
        DataError, match=f"a has {count} tokens, and a window takes 5009; raise dataset.chars_per_token"
    ):
        prompt_batch(llama, [window("a", 0, prompt=5000)])


def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    bare = load_model(ModelSpec(checkpoint=str(save_checkpoint("qwen3", tmp_path))), "cpu")
    with pytest.raises(DataError, match="the prompt of x has no token"):
        prompt_batch(bare, [Example(id="x", cluster="x", question="", reference="a")])


def test_fidelity_along_a_text_compares_after_each_of_its_tokens(llama: LoadedModel, tmp_path: Path) -> None:
    examples = [window("a", 0), window("b", 7)]
    bench = replace(bench_of(llama, tmp_path, cut()), examples=examples)
    along = Fidelity(max_new_tokens=9, check_tokens=3, along="text")
    result, full = along.run(bench), along.run(replace(bench, setting=FULL))
    assert not list(tmp_path.glob("full_answers/*"))  # nothing was generated
    for example in examples:
        row, same = result.samples[example.id], full.samples[example.id]
        assert row["num_compared_tokens"] == same["num_compared_tokens"] == 9
        assert same["kl_sum"] == 0.0
        assert same["first_disagreement_tokens"] is None
        first = row["first_disagreement_tokens"]
        assert (first is None) == (row["num_agreeing_tokens"] == 9)
        if first is not None:
            assert 1 <= first <= row["num_agreeing_tokens"] + 1
    assert result.measurements["kl_to_full"]["value"] > 0.0
    assert full.measurements["first_disagreement_tokens"]["value"] is None
    shorter = Fidelity(max_new_tokens=4, check_tokens=3, along="text").run(bench)
    assert {row["num_compared_tokens"] for row in shorter.samples.values()} == {4}


def test_a_text_to_go_along_is_asked_for_before_a_model_is_loaded() -> None:
    bare = Example(id="bare", cluster="bare", question="What?", reference="")
    along = {name: Fidelity(along=name) for name in ("answer", "text")}  # type: ignore[arg-type]
    model, (answer, text) = ModelSpec(checkpoint="bundled"), along.values()

    class Bare:
        fingerprint = "bare"

        def examples(self) -> list[Example]:
            return [bare]

        def facts_in(self, text: str) -> frozenset[object]:
            return frozenset()

    check_fit(Bare(), model, {"fidelity": answer}, query_visible=True)
    with pytest.raises(DataError, match=r"task\.fidelity scores reference answers, and bare has none"):
        check_fit(Bare(), model, {"fidelity": text}, query_visible=True)
    with pytest.raises(ConfigError, match=r"task\.fidelity\.along"):
        Fidelity(along="texts")  # type: ignore[arg-type]


def test_what_is_kept_of_the_full_cache_along_its_answer_is_not_taken_for_that_along_a_text(
    llama: LoadedModel, tmp_path: Path
) -> None:
    examples = [window("a", 0), window("b", 7)]
    alone = replace(bench_of(llama, tmp_path, cut()), examples=examples)
    shared = replace(alone, shared_prompts=Prompts(llama, examples, 2, share=[alone.setting.policy, FULL.policy]))
    tasks = [Fidelity(max_new_tokens=9, check_tokens=3, along=along) for along in get_args(Along)]
    together = [task.run(shared).measurements for task in tasks]
    assert together == [task.run(alone).measurements for task in tasks]
    assert together[0]["kl_to_full"] != together[1]["kl_to_full"]
