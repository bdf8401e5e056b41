"""kvbench's side of the comparison with kvpress; how to run both is written in `theirs.py`.

Presses cut the prompt alone, so policies that would cut at decode too are taken as they are but for that. Where a press
protects something else than the paper, settings say the same here: `tova` keeps the newest token, `lagkv` has 4 sinks,
`chunkkv` chunks of 16, which end where the observation window begins, `streaming_llm` true positions, `criticalkv`
mean pooling and a first half that counts the window in. What is left is
compared as it is: both take the mean over a group of query heads, and ties fall to the newer entry here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvbench.cache import Budget, Policy, When
from kvbench.contract.driving import held_positions
from kvbench.datasets.text import TextWindows
from kvbench.models.inputs import window_tokens
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import ModelSpec
from kvbench.policies.chunkkv import ChunkKV
from kvbench.policies.criticalkv import CriticalKV
from kvbench.policies.expected_attention import ExpectedAttention
from kvbench.policies.full import Full
from kvbench.policies.h2o_mean import H2OMean
from kvbench.policies.key_norm import KeyNorm
from kvbench.policies.keydiff import KeyDiff
from kvbench.policies.lagkv import LagKV
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.streaming_llm import StreamingLLM
from kvbench.policies.tova import TOVA
from kvbench.tasks.decode import CacheSetting
from kvbench.tasks.perplexity import Perplexity
from kvbench.tasks.task import Bench, FullAnswers, Prompts
from tests.parity.theirs import ENTRIES, GIVEN, LAYERS, SCORED, WINDOWS, bits

HERE = Path(__file__).parent
FIXTURE = HERE / "kvpress.json"
DATASET = TextWindows(path="bundled", prompt_tokens=GIVEN, scored_tokens=SCORED, num_samples=WINDOWS)
POLICIES: dict[str, Policy] = {
    "full": Full(),
    "snapkv": SnapKV(pooling="avg"),
    "snapkv_released": SnapKV(pooling="avg", kernel_tokens=5),
    "key_norm": KeyNorm(),
    "keydiff": KeyDiff(),
    "tova": TOVA(num_recent=1),
    "h2o_mean": H2OMean(),
    "streaming_llm": StreamingLLM(),
    "lagkv": LagKV(num_sinks=4),
    "chunkkv": ChunkKV(chunk_tokens=16),
    "expected_attention": ExpectedAttention(),
    "criticalkv": CriticalKV(pooling="avg"),
}
FIRST_SHARE = {512: 224 / 480, 204: 70 / 172}  # of what is not in the window, where kvpress has the half of all


def prompt_only(policy: Policy) -> Policy:
    """Return `policy` with its cuts at decode left out."""
    kind = type(policy)
    changed = type(kind.__name__, (kind,), {"when": When.PREFILL})
    return changed(**{field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)})


def settings_of(methods: Sequence[str]) -> list[tuple[str, int, CacheSetting]]:
    """Return every method with each number of entries, and its setting."""
    policies = {name: prompt_only(POLICIES[name]) for name in methods}
    return [
        (
            name,
            count,
            CacheSetting(policy=_for_entries(policies[name], count), budget=Budget(tokens=count), positions="original"),
        )
        for name in methods
        for count in ENTRIES[name]
    ]


def _for_entries(policy: Policy, count: int) -> Policy:
    return dataclasses.replace(policy, first_share=FIRST_SHARE[count]) if isinstance(policy, CriticalKV) else policy


def smollm2(device: str = "cpu") -> LoadedModel:
    """Load the model that `kvbench fetch smollm2-135m` fetched."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    spec: ModelSpec = instantiate(OmegaConf.load(HERE.parents[1] / "conf" / "model" / "smollm2-135m.yaml"))
    return load_model(spec, device)


def token_windows(loaded: LoadedModel) -> list[list[int]]:
    """Return the token ids of every window, given ones and scored ones."""
    pairs = [window_tokens(loaded, example) for example in DATASET.examples()]
    return [given + scored for given, scored in pairs]


def digest(windows: list[list[int]]) -> str:
    """Return what `theirs.py` calls tokens_sha256."""
    return hashlib.sha256(json.dumps(windows).encode()).hexdigest()


def scored(loaded: LoadedModel, methods: Sequence[str], windows: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each method and number of entries, scored by the perplexity task on the first `windows`."""
    examples, settings = DATASET.examples()[:windows], settings_of(methods)
    prompts = Prompts(loaded, examples, batch_size, share=[setting.policy for _, _, setting in settings])
    rows = [{"method": name, "entries": count, "nll": [], "kept": {}} for name, count, _ in settings]
    for number in range(len(prompts)):
        part = prompts.part(number)
        for row, (_, _, setting) in zip(rows, settings, strict=True):
            bench = Bench(
                loaded=loaded,
                dataset=DATASET,
                examples=examples,
                setting=setting,
                full_policy=Full(),
                answers=FullAnswers(folder=HERE, settings={}),
                batch_size=batch_size,
                advance=lambda share: None,
                shared_prompts=prompts,
            )
            payload = Perplexity().measure(bench, part)
            row["nll"] += [payload[example.id]["nll_sum"] for example in part.examples]
            if number == 0 and row["method"] != "full":
                held = held_positions(part.decoding(setting, 0).cache)
                row["kept"] = {str(layer): [bits(set(head)) for head in held[layer][0]] for layer in LAYERS}
    yield from rows


def main(command: str, folder: Path, methods: list[str]) -> None:
    """Write what `theirs.py` reads, kvbench's side, or the fixture out of both sides."""
    if command == "join":
        return _join(folder)
    loaded = smollm2("cuda" if torch.cuda.is_available() and command == "score" else "cpu")
    windows = token_windows(loaded)
    if command == "prepare":
        loaded.model.save_pretrained(folder / "checkpoint")
        return _write(folder / "windows.json", windows)
    rows = list(scored(loaded, methods, WINDOWS, batch_size=16))
    version = importlib.metadata.version("transformers")
    made = {"transformers": version, "device": loaded.device.type, "tokens_sha256": digest(windows), "rows": rows}
    return _write(folder / "ours.json", made)


def _join(folder: Path) -> None:
    ours, theirs = (json.loads((folder / name).read_text()) for name in ("ours.json", "theirs.json"))
    for field in ("tokens_sha256", "device"):
        assert ours[field] == theirs[field], field
    versions = {**theirs["versions"], "kvbench's transformers": ours["transformers"]}
    versions["device"] = f"{ours['device']}, float32"
    rows = [
        {"method": one["method"], "entries": one["entries"], "ours": _side(one), "theirs": _side(other)}
        for one, other in zip(ours["rows"], theirs["rows"], strict=True)
    ]
    made = {(row["method"], row["entries"]): row for row in rows}
    if FIXTURE.exists():
        stored = json.loads(FIXTURE.read_text())
        assert stored["versions"] == versions
        assert stored["tokens_sha256"] == ours["tokens_sha256"]
        made = {(row["method"], row["entries"]): row for row in stored["rows"]} | made
    rows = [made[name, count] for name, sizes in ENTRIES.items() for count in sizes]
    _write(FIXTURE, {"versions": versions, "tokens_sha256": ours["tokens_sha256"], "rows": rows})


def _side(row: dict[str, Any]) -> dict[str, Any]:
    return {"nll": [round(number, 5) for number in row["nll"]], "kept": row["kept"]}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or list(ENTRIES))
