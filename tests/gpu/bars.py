"""Measure every bar of the GPU engine in one call of a few minutes, or in one for each model, and print a table.

    python -m tests.gpu.bars --out FOLDER [--models 7b 13b 8b]

Bars are ratios within this run, on one GPU of 80 GB. Models have random weights, so nothing is
downloaded. A part that fails, or runs out of memory, is a row with its status; the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvbench.cache import UNLIMITED, Budget, Policy
from kvbench.datasets.synthetic import Synthetic
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.sweep.cell import environment
from kvbench.tasks.decode import CacheSetting, Engine
from kvbench.tasks.memory import Memory, free_memory
from kvbench.tasks.speed import Speed, launch, repeated
from kvbench.tasks.task import Bench, FullAnswers, TaskResult

CONF = Path(__file__).parents[2] / "conf" / "model"
WARM = "compiling kernels excluded: launches before it did that"
FIFTH = Budget(fraction=0.2)
PAPER = [("13b", 8, 1024, 512), ("13b", 16, 624, 256), ("7b", 16, 1024, 512), ("7b", 48, 624, 256)]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured figure beside its bar; `value` is None where it could not be measured."""

    figure: str
    bar: str
    value: float | None
    met: bool | None
    note: str


@dataclass(kw_only=True)
class Scale:
    """How large everything is; the tests shrink it to run on a CPU."""

    device: str = "cuda:0"
    engine: Engine = "graph"
    prompt_tokens: int = 900
    long_prompt_tokens: int = 131_072
    batches: tuple[int, ...] = (1, 8, 16)
    new_tokens: int = 48
    num_blocks: int = 1
    paper: list[tuple[str, int, int, int]] = field(default_factory=lambda: list(PAPER))
    spec: Callable[[str], ModelSpec] = field(default_factory=lambda: published_spec)

    def setting(self, policy: Policy, budget: Budget = FIFTH, positions: Any = "original") -> CacheSetting:
        """Return a setting of this scale's engine."""
        return CacheSetting(policy=policy, budget=budget, positions=positions, engine=self.engine)


def published_spec(name: str) -> ModelSpec:
    """Return the full-size architecture with random weights in bfloat16."""
    yaml_name = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b", "8b": "llama-3.1-8b"}[name]
    content = yaml.safe_load((CONF / f"{yaml_name}.yaml").read_text(encoding="utf-8"))
    return ModelSpec(checkpoint=content["checkpoint"], dtype="bfloat16", weights="random", config=content["config"])


def bench(loaded: LoadedModel, scale: Scale, setting: CacheSetting, prompt_tokens: int) -> Bench:
    """Return what a task needs, with random prompts of text."""
    data = Synthetic(prompt_tokens=prompt_tokens, num_images=0)
    return Bench(
        loaded=loaded,
        dataset=data,
        examples=data.examples(),
        setting=setting,
        full_policy=Full(),
        answers=FullAnswers(folder=Path("unused"), settings={}),
        batch_size=1,
        advance=lambda share: None,
    )


def value(result: TaskResult, name: str) -> float:
    """Return one measured number."""
    return float(result.measurements[name]["value"])


def decode_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """Share of the roof of the full cache, and how long the graph takes to warm up."""
    for size in scale.batches:
        speed = Speed(new_tokens=scale.new_tokens, num_blocks=scale.num_blocks, num_warmups=2, batch_size=size)
        done = speed.run(bench(loaded, scale, scale.setting(H2O()), scale.prompt_tokens))
        share, tpot_ms = value(done, "full_roof_share_fraction"), value(done, "full_tpot_ms")
        note = f"{tpot_ms:.2f} ms, roof {value(done, 'full_roof_ms'):.2f}; h2o {value(done, 'tpot_ms'):.2f} ms"
        yield Row(figure=f"roof share, full, {name} B{size}", bar=">= 0.80", value=share, met=share >= 0.8, note=note)
        warm_s = value(done, "prepare_ms") / 1e3
        yield Row(figure=f"graph warm-up, {name} B{size}", bar="<= 3 s", value=warm_s, met=warm_s <= 3, note=WARM)


def policy_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """What scoring and choosing adds to a step: h2o beside streaming_llm with as many entries."""
    for size in scale.batches:
        budget = Budget(tokens=max(8, scale.prompt_tokens // 5))
        arms = [scale.setting(policy, budget) for policy in (H2O(), StreamingLLM())]
        tpots = interleaved(loaded, scale, arms, size, lambda done: done.tpot_ms)
        extra = tpots[0] / tpots[1] - 1
        note = f"{tpots[0]:.3f} beside {tpots[1]:.3f} ms"
        yield Row(figure=f"extra TPOT of h2o, {name} B{size}", bar="<= 0.03", value=extra, met=extra <= 0.03, note=note)


def prefill_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """What attention mass adds to a prompt: h2o that keeps everything beside the full cache."""
    size = scale.batches[-2] if len(scale.batches) > 1 else scale.batches[0]
    arms = [scale.setting(H2O(), UNLIMITED), scale.setting(Full(), UNLIMITED)]
    ttfts = interleaved(loaded, scale, arms, size, lambda done: done.ttft_ms)
    ratio = ttfts[0] / ttfts[1]
    note = f"{ttfts[0]:.1f} beside {ttfts[1]:.1f} ms"
    yield Row(figure=f"prefill with mass, {name} B{size}", bar="<= 1.05", value=ratio, met=ratio <= 1.05, note=note)


def memory_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """Peak memory over what must be held."""
    for policy in (StreamingLLM(), H2O(), Elastic(), SnapKV()):
        memory = Memory(new_tokens=16, batch_size=scale.batches[-1])
        done = memory.run(bench(loaded, scale, scale.setting(policy), scale.prompt_tokens))
        ratio, peak = value(done, "peak_over_bound_ratio"), value(done, "peak_memory_bytes") / 2**30
        figure = f"peak over bound, {type(policy).__name__}, {name} B{scale.batches[-1]}"
        yield Row(figure=figure, bar="<= 1.03", value=ratio, met=ratio <= 1.03, note=f"{peak:.2f} GiB")


def long_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """Exact H2O on a prompt that an n x n matrix would not let run."""
    prompt = bench(loaded, scale, scale.setting(H2O()), scale.long_prompt_tokens)
    start_s = time.monotonic()
    done = launch(loaded, prompt_batch(loaded, prompt.examples), prompt.setting, 8)
    note = f"TTFT {done.ttft_ms / 1e3:.1f} s, TPOT {done.tpot_ms:.2f} ms, {time.monotonic() - start_s:.0f} s in all"
    finite = math.isfinite(done.tpot_ms)
    yield Row(figure=f"h2o, {name}, {scale.long_prompt_tokens} tokens", bar="runs", value=1.0, met=finite, note=note)


def paper_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """Throughput of elastic at a fifth of the tokens over the full cache, beside what the roof allows at decode."""
    for model, size, prompt_tokens, new_tokens in scale.paper:
        if model != name:
            continue
        speed = Speed(new_tokens=new_tokens, num_blocks=1, num_warmups=1, batch_size=size)
        done = speed.run(bench(loaded, scale, scale.setting(Elastic()), prompt_tokens))
        bound = value(done, "full_roof_ms") / value(done, "roof_ms")
        note = f"TPOT ratio {value(done, 'tpot_ratio_to_full'):.3f}; the roof allows {1 / bound:.3f}"
        ratio = value(done, "throughput_ratio_to_full")
        figure = f"elastic over full, {name} B{size} {prompt_tokens}+{new_tokens}"
        yield Row(figure=figure, bar="measured", value=ratio, met=None, note=note)


def interleaved(
    loaded: LoadedModel, scale: Scale, arms: list[CacheSetting], size: int, number: Callable[[Any], float]
) -> list[float]:
    """Return the median over launches of each of two arms, in the order A B B A after two warm-ups of each."""
    prompts = bench(loaded, scale, arms[0], scale.prompt_tokens).examples
    batch = prompt_batch(loaded, repeated(prompts, size))
    order = [0, 1, 0, 1] + [0, 1, 1, 0] * (3 * scale.num_blocks)
    runs = [(arm, number(launch(loaded, batch, arms[arm], scale.new_tokens))) for arm in order][4:]
    return [statistics.median(ours for arm, ours in runs if arm == wanted) for wanted in (0, 1)]


PARTS: dict[str, tuple[Callable[[LoadedModel, str, Scale], Iterator[Row]], ...]] = {
    "7b": (decode_rows, policy_rows, prefill_rows, memory_rows, paper_rows),
    "13b": (decode_rows, paper_rows),
    "8b": (long_rows,),
}


def measure(scale: Scale, models: Sequence[str] = tuple(PARTS)) -> Iterator[Row]:
    """Yield every row of `models`, each loaded once; an error becomes a row."""
    for name in models:
        try:
            loaded = load_model(scale.spec(name), scale.device)
        except Exception as error:  # one model or bar that fails must not cost the others
            yield _failed("load", name, error)
            continue
        for part in PARTS[name]:
            try:
                yield from part(loaded, name, scale)
            except Exception as error:
                yield _failed(part.__name__, name, error)
            free_memory()
        del loaded
        free_memory()


def _failed(part: str, name: str, error: Exception) -> Row:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Row(figure=f"{part}, {name}", bar="-", value=None, met=False, note=text)


def markdown(rows: list[Row]) -> str:
    """Return the rows as a table."""
    lines = ["| figure | bar | measured | met | |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        number = "-" if row.value is None else f"{row.value:.3f}"
        met = {True: "yes", False: "no", None: "-"}[row.met]
        lines.append(f"| {row.figure} | {row.bar} | {number} | {met} | {row.note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure at full size and write bars.json and bars.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/published/gpu-bars"))
    parser.add_argument("--models", nargs="+", choices=PARTS, default=list(PARTS), help="in two calls: some in each")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    scale, rows = Scale(), []
    where = environment(scale.device)
    start_s = time.monotonic()
    for row in measure(scale, arguments.models):
        rows.append(row)
        print(f"{time.monotonic() - start_s:6.1f} s  {row.figure}: {row.value}  {row.note}", flush=True)
        content = {"environment": where, "rows": [vars(row) for row in rows]}
        (out / "bars.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "bars.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
