"""kvpress timed by itself, in the python that has it: reads a line of JSON, answers with one. No kvbench in here.

The first line builds the model: {"config", "dtype", "device", "press": {"class", settings...}}, and is answered with
versions; each further one is a launch: {"batch_size", "prompt_tokens", "new_tokens"}, answered with its times.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from itertools import pairwise
from typing import Any

import kvpress  # type: ignore[import-not-found]
import torch
import transformers


def main() -> None:
    """Answer until the input ends."""
    asked = json.loads(sys.stdin.readline())
    fields = dict(asked["config"])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    settings = dict(asked["press"])
    press = getattr(kvpress, settings.pop("class"))(**settings)
    device = torch.device(asked["device"])
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked["dtype"])).eval()
    _answer({"torch": torch.__version__, "transformers": transformers.__version__, "kvpress": _version()})
    for line in sys.stdin:
        _answer(launch(model, press, device, **json.loads(line)))


@torch.no_grad()
def launch(
    model: Any, press: Any, device: torch.device, batch_size: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """Return the times of a prompt, compressed while it is taken, and of each decode step, in ms."""
    ids = torch.randint(3, model.config.vocab_size, (batch_size, prompt_tokens), device=device)
    cache = transformers.DynamicCache()
    marks = [_now(device)]
    with press(model):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    marks.append(_now(device))
    token = output.logits[:, -1:].argmax(dim=-1)
    for number in range(new_tokens - 1):
        where = torch.full((batch_size, 1), prompt_tokens + number, device=device)
        output = model(input_ids=token, position_ids=where, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(dim=-1)
        marks.append(_now(device, wait=False))
    _now(device)
    times = [_between(before, after) for before, after in pairwise(marks)]
    return {"ttft_ms": times[0], "steps_ms": times[1:]}


def _now(device: torch.device, *, wait: bool = True) -> Any:
    """Return a point in the device's work, which is done first if `wait`."""
    if device.type != "cuda":
        return time.perf_counter() * 1e3
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    if wait:
        torch.cuda.synchronize(device)
    return event


def _between(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else float(before.elapsed_time(after))


def _version() -> str:
    try:
        return metadata.version("kvpress")
    except metadata.PackageNotFoundError:
        return "unknown"


def _answer(content: dict[str, Any]) -> None:
    print("answer " + json.dumps(content), flush=True)


if __name__ == "__main__":
    main()
