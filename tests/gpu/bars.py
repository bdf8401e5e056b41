"""Measure every bar of the GPU engine in one call, or in one for each model or part, and print a table.

    python -m tests.gpu.bars --out FOLDER [--models 7b 13b 8b] [--parts decode peer ...] [--batches 1 8]
                             [--kvpress-python PYTHON]

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
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from kvbench.cache import UNLIMITED, Budget, Policy, PolicyCache, artefact
from kvbench.contract.driving import learnt_artefact
from kvbench.datasets.text import Synthetic
from kvbench.models.inputs import prompt_batch
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.elastic import Elastic
from kvbench.policies.full import Full
from kvbench.policies.h2o import H2O
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.stats.intervals import launch_interval, ratio_interval
from kvbench.sweep.cell import environment
from kvbench.tasks.decode import CacheSetting, Engine
from kvbench.tasks.memory import Memory, free_memory
from kvbench.tasks.speed import Arm, Launch, Speed, deciding_ms, launch, reads_of, repeated
from kvbench.tasks.task import Bench, FullAnswers, TaskResult
from tests.covering import YAMLS
from tests.gpu.peers import FixedCache, GrowingCache, KvpressProcess, ReleasedH2O, other_attention, stock_twin, timed

CONF = Path(__file__).parents[2] / "conf"
WARM = "compiling kernels excluded: launches before it did that"
FIFTH = Budget(fraction=0.2)
POLICIES: dict[str, Policy] = {"h2o": H2O(), "elastic": Elastic(), "snapkv": SnapKV(), "streaming_llm": StreamingLLM()}
# model: batch, tokens of a prompt, and what a policy's time to the first token may be, over full's
FIRST_TOKENS: dict[str, tuple[int, int, dict[str, float]]] = {
    "7b": (16, 1024, dict.fromkeys(POLICIES, 1.05)),
    "8b": (1, 32_768, {"h2o": 1.08, "elastic": 1.12, "snapkv": 1.02, "streaming_llm": 1.02}),
}
SHARES = {"7b": 0.85, "13b": 0.88, "8b": 0.85}  # of the roof, of the full cache's step
_LONG_TOKENS = 8192
LESS = 0.02  # that a policy's share of its own roof may be lower
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
    long_new_tokens: int = 128
    batches: tuple[int, ...] = (1, 8, 16)
    new_tokens: int = 48
    peer_tokens: int = 24
    num_blocks: int = 1
    compiler: str = "inductor"
    kvpress_python: str | None = None
    paper: list[tuple[str, int, int, int]] = field(default_factory=lambda: list(PAPER))
    first: dict[str, tuple[int, int, dict[str, float]]] = field(default_factory=lambda: dict(FIRST_TOKENS))
    spec: Callable[[str], ModelSpec] = field(default_factory=lambda: published_spec)

    def setting(self, policy: Policy, budget: Budget = FIFTH, positions: Any = "original") -> CacheSetting:
        """Return a setting of this scale's engine."""
        return CacheSetting(policy=policy, budget=budget, positions=positions, engine=self.engine)


def published_spec(name: str) -> ModelSpec:
    """Return the full-size architecture with random weights in bfloat16."""
    yaml_name = {"7b": "llava-1.5-7b", "13b": "llava-1.5-13b", "8b": "llama-3.1-8b"}[name]
    content = yaml.safe_load((CONF / "model" / f"{yaml_name}.yaml").read_text(encoding="utf-8"))
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
        note = f"{tpot_ms:.2f} ms, roof {value(done, 'full_roof_ms'):.2f}"
        yield _share_row(f"full, {name} B{size}", share, SHARES[name], note)
        note = f"{value(done, 'tpot_ms'):.2f} ms, roof {value(done, 'roof_ms'):.2f}"
        yield _share_row(f"h2o, {name} B{size}", value(done, "roof_share_fraction"), None, note)
        warm_s = value(done, "prepare_ms") / 1e3
        yield Row(figure=f"graph warm-up, {name} B{size}", bar="<= 3 s", value=warm_s, met=warm_s <= 3, note=WARM)


def _share_row(of: str, share: float, bar: float | None, note: str) -> Row:
    told, met = ("measured", None) if bar is None else (f">= {bar:.2f}", share >= bar)
    return Row(figure=f"roof share, {of}", bar=told, value=share, met=met, note=note)


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
        yield Row(figure=figure, bar="<= 1.01", value=ratio, met=ratio <= 1.01, note=f"{peak:.2f} GiB")


def long_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """Exact H2O on a prompt that an n x n matrix would not let run, and all others, beside the full cache.

    A launch each, of half a minute; kernels are compiled by a shorter prompt.
    """
    arms = {"full": scale.setting(Full(), UNLIMITED)}
    arms |= {label: scale.setting(one, positions=one.native_positions) for label, one in POLICIES.items()}
    for length in (min(_LONG_TOKENS, scale.long_prompt_tokens), scale.long_prompt_tokens):
        prompt = bench(loaded, scale, arms["full"], length)
        batch = prompt_batch(loaded, prompt.examples)
        done = {label: launch(loaded, batch, setting, scale.long_new_tokens) for label, setting in arms.items()}
    where = f"{name}, {scale.long_prompt_tokens} tokens"
    finite = math.isfinite(done["h2o"].tpot_ms)
    note = f"TTFT {done['h2o'].ttft_ms / 1e3:.1f} s, TPOT {done['h2o'].tpot_ms:.2f} ms"
    yield Row(figure=f"h2o, {where}", bar="runs", value=1.0, met=finite, note=note)
    full = done.pop("full")
    for label, one in done.items():
        ratio = one.ttft_ms / full.ttft_ms
        note = f"{one.ttft_ms / 1e3:.2f} beside {full.ttft_ms / 1e3:.2f} s, a launch each"
        told, met = ("<= 1.15", ratio <= 1.15) if label == "h2o" else ("measured", None)
        yield Row(figure=f"TTFT of {label} over full, {where}", bar=told, value=ratio, met=met, note=note)
    for label, one in done.items():
        note = f"{one.tpot_ms:.3f} beside {full.tpot_ms:.3f} ms, {scale.long_new_tokens} tokens, a launch each"
        ratio = one.tpot_ms / full.tpot_ms
        yield Row(figure=f"TPOT of {label} over full, {where}", bar="measured", value=ratio, met=None, note=note)


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


def deciding_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """What naming victims takes of a step, for every policy that times can be taken of, the way a step does it.

    A plan that is made every so many steps is shared out among them.
    """
    from hydra.utils import instantiate

    artefact.artefact_of = learnt_artefact  # what a policy learns offline it learns here
    size = scale.batches[-1]
    batch = prompt_batch(
        loaded, repeated(bench(loaded, scale, scale.setting(Full()), scale.prompt_tokens).examples, size)
    )
    for path in YAMLS:  # not the oracle, which only a task that knows its tokens can run
        figure = f"deciding, {path.stem}, {name} B{size}"
        try:
            policy = instantiate(yaml.safe_load(path.read_text(encoding="utf-8")), _convert_="object")
            setting = scale.setting(policy, positions=policy.native_positions)
            run = partial(launch, loaded, batch, setting, scale.peer_tokens)
            seen: list[Any] = []
            run(observe=seen.append)
            deciding = deciding_ms(seen[-1], policy)
            seen.clear()
            tpot_ms = statistics.median(run().tpot_ms for _ in range(2))
        except Exception as error:  # a policy that a graph does not take must not cost the others
            yield _failed(figure, error)
            continue
        share = (deciding.value or 0.0) / tpot_ms
        note = f"{deciding.value:.3f} of {tpot_ms:.2f} ms; {deciding.method}"
        yield Row(figure=figure, bar="<= 0.03", value=share, met=share <= 0.03, note=note)


@dataclass(kw_only=True)
class Entrant:
    """One of those that are timed in turn: what makes a launch of it, and those it made."""

    name: str
    run: Callable[[], Launch]
    first_s: float = 0.0
    launches: list[Launch] = field(default_factory=list)


def peer_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """Times of ours over those of each peer (`tests/gpu/peers.py`), launches in turn, there and back."""
    spec = scale.spec(name)
    stock = stock_twin(loaded, spec, "sdpa")
    eager = other_attention(stock, "eager")
    free_memory()
    kvpress = None
    try:
        if scale.kvpress_python is not None:
            press = {"class": "SnapKVPress", "compression_ratio": 0.8}
            kvpress = KvpressProcess(scale.kvpress_python, spec, scale.device, press)
    except RuntimeError as error:
        yield _failed(f"kvpress, {name}", error)
    for size in scale.batches:
        yield from _beside_peers(loaded, f"{name} B{size}", scale, size, (stock, eager), kvpress)
        free_memory()
    if kvpress is not None:
        kvpress.close()


def _beside_peers(
    loaded: LoadedModel, where: str, scale: Scale, size: int, models: tuple[Any, Any], kvpress: KvpressProcess | None
) -> Iterator[Row]:
    length, tokens, h2o_tokens = scale.prompt_tokens, scale.peer_tokens, 2 * max(4, scale.prompt_tokens // 10)
    examples = bench(loaded, scale, scale.setting(Full()), length).examples
    batch = prompt_batch(loaded, repeated(examples, size))

    def ours(policy: Policy, budget: Budget = UNLIMITED) -> Callable[[], Launch]:
        return partial(launch, loaded, batch, scale.setting(policy, budget), tokens)

    def theirs(peer: Any) -> Callable[[], Launch]:
        return lambda: timed(peer, batch.tensors["input_ids"], tokens)[0]

    full = Entrant(name="full", run=ours(Full()))
    h2o = Entrant(name="h2o", run=ours(H2O(), Budget(tokens=h2o_tokens)))
    fixed = theirs(FixedCache(model=models[0], backend=scale.compiler))
    compiled = Entrant(name="StaticCache + compile", run=fixed)
    pairs = [
        (full, Entrant(name="DynamicCache", run=theirs(GrowingCache(model=models[0])))),
        (full, compiled),
        (h2o, Entrant(name="H2O of the releases", run=theirs(ReleasedH2O(model=models[1], budget_tokens=h2o_tokens)))),
    ]
    if kvpress is not None:
        snapkv = Entrant(name="snapkv", run=ours(SnapKV(), FIFTH))
        pairs.append((snapkv, Entrant(name="kvpress", run=partial(kvpress.launch, size, length, tokens))))
    entrants = list({id(one): one for pair in pairs for one in pair}.values())
    yield from _in_turn(entrants, where, scale)
    for mine, peer in pairs:
        if mine.launches and peer.launches:
            yield from _ratio_rows(mine, peer, where)
    if compiled.launches:
        note = "seconds; the whole first launch, in no other number"
        figure = f"warm-up of {compiled.name}, {where}"
        yield Row(figure=figure, bar="measured", value=compiled.first_s, met=None, note=note)


def _in_turn(
    entrants: Sequence[Entrant], where: str, scale: Scale, *, num_launches: int = 6, num_warmups: int = 2
) -> Iterator[Row]:
    """Make launches of all, there and back, after the first of each; one that fails is a row and takes no part."""
    running = list(entrants)
    for one in entrants:
        try:
            for _ in range(num_warmups):
                start_s = time.monotonic()
                one.run()
                one.first_s = one.first_s or time.monotonic() - start_s
        except Exception as error:  # most likely out of memory
            running.remove(one)
            yield _failed(f"{one.name}, {where}", error)
            free_memory()
    for number in range(num_launches * scale.num_blocks):
        for one in running[:: 1 if number % 2 == 0 else -1]:
            one.launches.append(one.run())


def first_token_rows(loaded: LoadedModel, name: str, scale: Scale) -> Iterator[Row]:
    """Policies at a fifth of the tokens beside the full cache: time to the first token, and shares of their roofs."""
    size, length, bars = scale.first[name]
    batch = prompt_batch(loaded, repeated(bench(loaded, scale, scale.setting(Full()), length).examples, size))
    reads, arms = [reads_of(loaded.model, device) for device in loaded.devices], dict[str, Arm]()

    def entrant(label: str, policy: Policy, positions: Any) -> Entrant:
        arm = arms[label] = Arm(setting=scale.setting(policy, positions=positions))

        def observe(cache: PolicyCache) -> None:
            arm.valid_bytes.append({device: cache.occupancy(device).valid_bytes for device in cache.devices})

        return Entrant(name=label, run=partial(launch, loaded, batch, arm.setting, scale.peer_tokens, observe=observe))

    full = entrant("full", Full(), "original")
    others = {label: entrant(label, POLICIES[label], POLICIES[label].native_positions) for label in bars}
    apart = entrant("streaming_llm at original positions", StreamingLLM(), "original")
    where = f"{name} B{size} {length}"
    fewer = {"num_launches": 4, "num_warmups": 1} if length > _LONG_TOKENS else {}  # seconds each
    yield from _in_turn([full, *others.values(), apart], where, scale, **fewer)
    for one in (full, *others.values(), apart):
        arms[one.name].launches = one.launches
    ran = {label: arm for label, arm in arms.items() if arm.launches}
    tpots_ms = {label: statistics.median(one.tpot_ms for one in arm.launches) for label, arm in ran.items()}
    shares = {label: sum(arms[label].roofs_ms(reads)) / tpot_ms for label, tpot_ms in tpots_ms.items()}
    for label, share in shares.items():
        of_policy = shares.get("full", SHARES[name]) - LESS if length > _LONG_TOKENS else None
        yield _share_row(
            f"{label}, {where}", share, SHARES[name] if label == "full" else of_policy, f"{tpots_ms[label]:.2f} ms"
        )
    if "streaming_llm" in tpots_ms and apart.name in tpots_ms:
        turned = tpots_ms["streaming_llm"] / tpots_ms[apart.name]
        figure = f"TPOT of streaming_llm in_cache over original, {where}"
        yield Row(
            figure=figure, bar="<= 1.02", value=turned, met=turned <= 1.02, note="keys are turned on their way in"
        )
    for label, one in others.items():
        if not one.launches or not full.launches:
            continue
        both = [[done.ttft_ms for done in arm.launches] for arm in (one, full)]
        ratio = ratio_interval(*both)
        assert ratio.value is not None
        settle_ms = statistics.median(done.settle_ms for done in one.launches)
        note = f"{_told(launch_interval(both[0]))} beside {_told(launch_interval(both[1]))} ms, of it settling "
        note += f"{settle_ms:.1f} beside {statistics.median(done.settle_ms for done in full.launches):.1f}"
        met, figure = ratio.value <= bars[label], f"TTFT of {label} over full, {where}"
        yield Row(figure=figure, bar=f"<= {bars[label]}", value=ratio.value, met=met, note=note)


def _ratio_rows(mine: Entrant, peer: Entrant, where: str) -> Iterator[Row]:
    for kind, bar in (("tpot_ms", "< 1"), ("ttft_ms", "measured")):
        both = [[getattr(one, kind) for one in arm.launches] for arm in (mine, peer)]
        ratio = ratio_interval(*both)
        assert ratio.value is not None
        note = f"{_told(launch_interval(both[0]))} beside {_told(launch_interval(both[1]))} ms; ratio {_told(ratio)}"
        met = ratio.high is not None and ratio.high < 1 if bar == "< 1" else None
        figure = f"{kind[:4].upper()} of {mine.name} over {peer.name}, {where}"
        yield Row(figure=figure, bar=bar, value=ratio.value, met=met, note=note)


def _told(interval: Any) -> str:
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


Part = Callable[[LoadedModel, str, Scale], Iterator[Row]]
PARTS: dict[str, tuple[Part, ...]] = {
    "7b": (
        decode_rows,
        policy_rows,
        deciding_rows,
        prefill_rows,
        first_token_rows,
        memory_rows,
        peer_rows,
        paper_rows,
    ),
    "13b": (decode_rows, paper_rows),
    "8b": (first_token_rows, long_rows),
}
PART_NAMES = sorted({part.__name__.removesuffix("_rows") for parts in PARTS.values() for part in parts})


def measure(
    scale: Scale, models: Sequence[str] = tuple(PARTS), part_names: Sequence[str] = tuple(PART_NAMES)
) -> Iterator[Row]:
    """Yield every row of those parts of `models`, each loaded once; an error becomes a row."""
    for name in models:
        wanted = [part for part in PARTS[name] if part.__name__.removesuffix("_rows") in part_names]
        if not wanted:
            continue
        try:
            loaded = load_model(scale.spec(name), scale.device)
        except Exception as error:  # one model or bar that fails must not cost the others
            yield _failed(f"load, {name}", error)
            continue
        for part in wanted:
            try:
                yield from part(loaded, name, scale)
            except Exception as error:
                yield _failed(f"{part.__name__}, {name}", error)
            free_memory()
        del loaded
        free_memory()


def _failed(figure: str, error: Exception) -> Row:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return Row(figure=figure, bar="-", value=None, met=False, note=text)


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
    parser.add_argument("--parts", nargs="+", choices=PART_NAMES, default=PART_NAMES, help="what to measure of them")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="batch sizes, instead of 1 8 16")
    parser.add_argument("--kvpress-python", metavar="PYTHON", help="one that has kvpress, to be timed beside snapkv")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    scale, rows = Scale(), []
    scale.kvpress_python = arguments.kvpress_python
    scale.batches = tuple(arguments.batches or scale.batches)
    where = environment(scale.device)
    start_s = time.monotonic()
    for row in measure(scale, arguments.models, arguments.parts):
        rows.append(row)
        print(f"{time.monotonic() - start_s:6.1f} s  {row.figure}: {row.value}  {row.note}", flush=True)
        content = {"environment": where, "rows": [vars(row) for row in rows]}
        (out / "bars.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "bars.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
