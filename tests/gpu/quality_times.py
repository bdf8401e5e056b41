"""Quality passes timed on a GPU, on the commit that is checked out or on another one: steps, cells, start and a sweep.

    python -m tests.gpu.quality_times --out FOLDER [--parts start steps cells sweep] [--limit-s 300]
    PYTHONPATH=OLD python tests/gpu/quality_times.py --out FOLDER      the code of another commit, in the folder OLD

OLD is made by `git archive COMMIT | tar -x -C OLD`, with OLD/policies and OLD/conf copied into OLD/kvbench, where they
lie when installed. Names nothing of kvbench that older commits lack. Needs `kvbench fetch smollm2-135m`. Each part
prints a line of JSON as soon as it is measured; a part that fails is a line too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

WORDS = ("model=smollm2-135m", "dataset=frankenstein_long")
POLICIES = ("full", "snapkv", "h2o", "streaming_llm")
SIXTEEN = ("policy=full,snapkv,h2o,streaming_llm,elastic,random", "budget.fraction=0.1,0.2,0.5")
BATCH, STEPS = 16, 96


def configured(*words: str) -> Any:
    """Return the cell of these words."""
    from kvbench.config.build import build_cell
    from kvbench.config.compose import compose_grid

    (composed,) = compose_grid([*WORDS, "task=perplexity", *words], multirun=False, config_dir=None)
    return build_cell(composed)


def start() -> dict[str, float]:
    """Time what a worker does for a Llama after torch and transformers: building its cell, and loading.

    import_s is a part of it: what transformers imports for a Llama, which is nobody's to shorten but its own.
    """
    import torch
    import transformers

    assert transformers.AutoModelForCausalLM  # imported when it is named
    torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    before_s = time.monotonic()
    assert transformers.LlamaForCausalLM
    import_s = time.monotonic() - before_s
    cell = configured()
    from kvbench.models.loader import load_model

    load_model(cell.model, cell.device)
    return {"start_s": round(time.monotonic() - before_s, 2), "import_s": round(import_s, 2)}


def steps() -> dict[str, float]:
    """Time a decode step in both dtypes, ms by dtype and policy; the median over steps, each waited for."""
    import torch

    from kvbench.models.inputs import prompt_batch
    from kvbench.models.loader import load_model

    found = {}
    for dtype in ("float32", "bfloat16"):
        cells = {policy: configured(f"policy={policy}", f"model.dtype={dtype}") for policy in POLICIES}
        first = next(iter(cells.values()))
        loaded = load_model(first.model, first.device)
        prompts = prompt_batch(loaded, first.dataset.examples()[:BATCH])
        for policy, cell in cells.items():
            with torch.inference_mode():
                decoding = cell.setting.decoding(loaded, prompts, STEPS + 8)
                decoding.prepare()
                tokens = decoding.logits.argmax(dim=-1)
                times_ms = [_waited_ms(decoding, tokens) for _ in range(STEPS)]
            found[f"{dtype} {policy}"] = round(median(times_ms[8:] or times_ms), 3)
    return found


def _waited_ms(decoding: Any, tokens: Any) -> float:
    before_s = time.perf_counter()
    decoding.step(tokens).sum().item()
    return (time.perf_counter() - before_s) * 1000


def cells(out: Path, limit_s: float) -> dict[str, Any]:
    """Time the cells of perplexity alone, s by policy; the first one's has the prompts' prefill in it."""
    words = (f"policy={','.join(POLICIES)}", "budget.fraction=0.2", "task=perplexity")
    return _sweep(out / "cells", limit_s, f"batch_size={BATCH}", *words)


def sweep(out: Path, limit_s: float) -> dict[str, Any]:
    """Time a sweep of sixteen cells of all quality tasks, as many windows at once as fit."""
    return _sweep(out / "sweep", limit_s, "batch_size=auto", *SIXTEEN, "task=quality")


def _sweep(results: Path, limit_s: float, *words: str) -> dict[str, Any]:
    """Run a sweep in a process of its own, of the code that this one has imported."""
    import kvbench

    folder = results.parent  # python -m takes the folder it runs in before PYTHONPATH, so not in a checkout
    folder.mkdir(parents=True, exist_ok=True)
    asked = [sys.executable, "-c", "import kvbench; print(kvbench.__file__)"]
    its_code = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    if its_code != kvbench.__file__:
        raise RuntimeError(f"a sweep would run {its_code}, and this process has {kvbench.__file__}")
    command = [sys.executable, "-m", "kvbench", "-m", *WORDS, "autopsy=off", *words]
    command += ["sink=console", f"results={results.absolute()}"]
    before_s = time.monotonic()
    try:
        subprocess.run(command, cwd=folder, check=True, timeout=limit_s, stdout=sys.stderr)
        ended = "done"
    except (subprocess.SubprocessError, OSError) as error:
        ended = type(error).__name__
    found: dict[str, Any] = {"wall_s": round(time.monotonic() - before_s, 1), "ended": ended}
    for path in sorted(results.glob("cells/*/record.json")):
        body = json.loads(path.read_text(encoding="utf-8"))["body"]
        name = f"{body['labels']['policy']} {body['labels']['budget']}"
        found[name] = [round(body["duration_s"], 2), body["status"], body["measurements"].get("ppl", {}).get("value")]
    return found


def measured(parts: Sequence[str], out: Path, limit_s: float) -> Iterator[tuple[str, Any]]:
    """Yield each part with what it gave, or with its error."""
    work: dict[str, Callable[[], Any]] = {
        "start": start,
        "steps": steps,
        "cells": lambda: cells(out, limit_s),
        "sweep": lambda: sweep(out, limit_s),
    }
    for part in parts:
        try:
            yield part, work[part]()
        except Exception as error:  # the other parts go on
            yield part, f"{type(error).__name__}: {error}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=("start", "steps", "cells", "sweep"), default=["start", "steps"])
    parser.add_argument("--limit-s", type=float, default=300.0)
    words = parser.parse_args()
    import kvbench

    print(json.dumps({"code": str(Path(kvbench.__file__).parent)}), flush=True)
    for part, found in measured(words.parts, words.out, words.limit_s):
        print(json.dumps({part: found}), flush=True)


if __name__ == "__main__":
    main()
