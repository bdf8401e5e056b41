"""What kvpress makes of the same windows: run in an environment of its own, never by the tests.

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 "kvpress==0.5.4"   # it takes transformers below 5.3
    python -m tests.parity.ours prepare FOLDER        # kvbench's environment: checkpoint and token ids
    ENV/bin/python -m tests.parity.theirs FOLDER      # writes FOLDER/theirs.json
    python -m tests.parity.ours score FOLDER          # writes FOLDER/ours.json
    python -m tests.parity.ours join FOLDER           # writes kvpress.json beside this file
    ENV/bin/python -m tests.parity.theirs FOLDER --times snapkv   # prints how long a method takes, and scores nothing

Both take names of methods after FOLDER, of which rows are then made anew; `join` leaves the others as they are stored.

Each window is given to the model once, in eager attention; a hook on every layer then lets each press cut what that
layer holds, by kvpress's own `compress`, and the scored tokens follow in one forward at their true positions. That is
what a press does as a context manager, which is run as well, for the first window of each method, and must agree.
A press keeps int(T x (1 - ratio)) of T tokens; ratios here are such that this is the number of entries in `ENTRIES`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

GIVEN, SCORED, WINDOWS = 1024, 256, 48
LAYERS = (0, 15, 29)  # whose kept entries are compared, in the first window
ENTRIES: dict[str, tuple[int, ...]] = {
    "full": (1024,),
    "snapkv": (512, 204, 102),
    "snapkv_released": (204,),
    "key_norm": (512, 204),
    "keydiff": (512, 204),
    "tova": (512, 204),
    "h2o_mean": (512, 204),
    "streaming_llm": (512, 204),
    "lagkv": (562, 376),  # sinks, tail and as many of each of six partitions, so that no tie decides
    "chunkkv": (512, 208),  # whole chunks of 16
    "expected_attention": (512, 204),
    "criticalkv": (512, 204),
}


def press_of(name: str, ratio: float) -> Any:
    """Return the press that the policy `name` of `ours.py` is compared with."""
    import kvpress

    makers = {
        "snapkv": lambda: kvpress.SnapKVPress(ratio, window_size=32, kernel_size=7),
        "snapkv_released": lambda: kvpress.SnapKVPress(ratio, window_size=32, kernel_size=5),
        "key_norm": lambda: kvpress.KnormPress(ratio),
        "keydiff": lambda: kvpress.KeyDiffPress(ratio),
        "tova": lambda: kvpress.TOVAPress(ratio),
        "h2o_mean": lambda: kvpress.ObservedAttentionPress(ratio),
        "streaming_llm": lambda: kvpress.StreamingLLMPress(ratio, n_sink=4),
        "lagkv": lambda: kvpress.LagKVPress(ratio, n_sink=4, lag_size=128),
        "chunkkv": lambda: kvpress.ChunkKVPress(
            kvpress.SnapKVPress(ratio, window_size=32, kernel_size=1), chunk_length=16
        ),
        "expected_attention": lambda: kvpress.ExpectedAttentionPress(ratio, n_future_positions=512, n_sink=4),
        "criticalkv": lambda: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio, window_size=32, kernel_size=7)),
    }
    return makers[name]()


def bits(kept: set[int]) -> str:
    """Return positions 0 to GIVEN - 1 as a hexadecimal number, the first the highest bit."""
    return f"{sum(1 << (GIVEN - 1 - position) for position in kept):0{GIVEN // 4}x}"


def loaded(folder: Path) -> tuple[Any, list[list[int]], str]:
    """Return the model in float32, the windows and the device."""
    import torch
    from transformers import LlamaForCausalLM

    windows = json.loads((folder / "windows.json").read_text())
    model = LlamaForCausalLM.from_pretrained(folder / "checkpoint", dtype=torch.float32, attn_implementation="eager")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), windows, device


def times(folder: Path, methods: list[str]) -> None:
    """Print the seconds that all windows take as kvpress's users run it: one by one, in SDPA, twice over."""
    import torch

    unknown = sorted(set(methods) - set(ENTRIES) | {"full"} & set(methods))
    if unknown or not methods:
        raise SystemExit(
            f"--times takes methods with a press, got {methods}; there are {sorted(set(ENTRIES) - {'full'})}"
        )
    model, windows, device = loaded(folder)
    for name in methods:
        row = {"method": name, "entries": ENTRIES[name][-1]}
        for repeat in range(3):  # the first warms up
            before_s = time.monotonic()
            for tokens in windows if repeat else windows[:2]:
                given, scored = (torch.tensor(part, device=device) for part in (tokens[:GIVEN], tokens[GIVEN:]))
                with torch.inference_mode():
                    _as_context(model, row, given[None], scored)  # ends with a number on the host
            if repeat:
                print(
                    json.dumps({f"kvpress {name} {row['entries']}": round(time.monotonic() - before_s, 3)}), flush=True
                )


def main(folder: Path, methods: list[str]) -> None:
    """Score every window under the presses of `methods` and write theirs.json."""
    import torch

    model, windows, device = loaded(folder)
    rows = [{"method": name, "entries": count, "nll": [], "kept": {}} for name in methods for count in ENTRIES[name]]
    for number, tokens in enumerate(windows):
        given, scored = (torch.tensor(part, device=device) for part in (tokens[:GIVEN], tokens[GIVEN:]))
        given = given[None]
        with torch.inference_mode():
            first, layers = _prefill(model, given)
            for row in rows:
                cut = [_cut(row["method"], row["entries"], layer) for layer in layers]
                row["nll"].append(_score(model, cut, first, scored))
                if number == 0 and row["method"] != "full":
                    row["kept"] = {str(at): _kept(layers[at], cut[at]) for at in LAYERS}
                    alone = _as_context(model, row, given, scored)
                    assert math.isclose(alone, row["nll"][0], rel_tol=1e-5), (row["method"], alone, row["nll"][0])
        print(number, {row["method"] + str(row["entries"]): round(row["nll"][-1] / SCORED, 4) for row in rows})
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    digest = hashlib.sha256(json.dumps(windows).encode()).hexdigest()
    (folder / "theirs.json").write_text(
        json.dumps({"versions": versions, "device": device, "tokens_sha256": digest, "rows": rows})
    )


def _prefill(model: Any, given: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Return the logits after the prompt and what every layer's hook was called with."""
    from transformers import DynamicCache

    cache, layers, hooks = DynamicCache(), [], []

    def note(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        held = cache.layers[module.layer_idx]
        layers.append(
            {
                "module": module,
                "hidden_states": kwargs["hidden_states"],
                "keys": held.keys,
                "values": held.values,
                "attentions": output[1],
                "kwargs": kwargs,
            }
        )

    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(note, with_kwargs=True))
    logits = model(given, past_key_values=cache).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return logits, layers


def _cut(name: str, entries: int, layer: dict[str, Any]) -> tuple[Any, Any]:
    if name == "full":
        return layer["keys"], layer["values"]
    attentions = layer["attentions"] if name == "h2o_mean" else None  # the others work out their own, as with SDPA
    keys, values = press_of(name, 1 - entries / GIVEN).compress(
        layer["module"], layer["hidden_states"], layer["keys"], layer["values"], attentions, layer["kwargs"]
    )
    assert keys.shape[2] == entries, (name, keys.shape, entries)
    return keys, values


def _score(model: Any, held: list[tuple[Any, Any]], first: Any, scored: Any) -> float:
    """Return the summed negative log-likelihood of `scored` after `held`; its first token follows `first`."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, (keys, values) in enumerate(held):
        cache.update(keys, values, layer)
    position = torch.arange(GIVEN, GIVEN + len(scored) - 1, device=scored.device)[None]
    after = model(scored[None, :-1], past_key_values=cache, position_ids=position).logits[0]
    logits = torch.cat((first[None], after)).float().log_softmax(dim=-1)
    return float(-logits.gather(-1, scored[:, None]).double().sum())


def _as_context(model: Any, row: dict[str, Any], given: Any, scored: Any) -> float:
    """Return the same with the press around the model, as its users run it."""
    from transformers import DynamicCache

    model.set_attn_implementation("eager" if row["method"] == "h2o_mean" else "sdpa")
    cache = DynamicCache()
    with press_of(row["method"], 1 - row["entries"] / GIVEN)(model):
        first = model(given, past_key_values=cache).logits[0, -1]
    found = _score(model, [(layer.keys, layer.values) for layer in cache.layers], first, scored)
    model.set_attn_implementation("eager")
    return found


def _kept(layer: dict[str, Any], cut: tuple[Any, Any]) -> list[str]:
    """Return `bits` of what each head kept, found by the keys, which no two positions have alike."""
    found = []
    for whole, left in zip(layer["keys"][0], cut[0][0], strict=True):
        position = (left[:, None] == whole[None]).all(dim=-1).float().argmax(dim=-1)
        found.append(bits(set(position.tolist())))
    return found


if __name__ == "__main__":
    if sys.argv[2:3] == ["--times"]:
        times(Path(sys.argv[1]), sys.argv[3:])
    else:
        main(Path(sys.argv[1]), sys.argv[2:] or list(ENTRIES))
