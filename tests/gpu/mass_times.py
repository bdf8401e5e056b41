"""The kernel that adds up attention mass, timed: tile sizes beside one another, and beside another version of it.

    python -m tests.gpu.mass_times [--out FOLDER] [--old FILE]

FILE is kvbench/kernels/prefill.py of another commit: `git show COMMIT:kvbench/kernels/prefill.py > FILE`. Everything
runs in turn, there and back, beside the fused forward of the same prompt, of whose products the mass needs half. The
tiles that kernels use are constants (`mass_tiles_for`); this says which they should be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kvbench.kernels import forward, prefill
from kvbench.kernels.dispatch import Chunk
from kvbench.kernels.prefill import Tiles
from kvbench.report.tables import markdown_table
from kvbench.sweep.cell import environment
from kvbench.tasks.speed import repeated_ms

# batch, KV heads, query heads per KV head, head size, tokens
SHAPES = {
    "8B B1 32768": (1, 8, 4, 128, 32_768),
    "8B B1 8192": (1, 8, 4, 128, 8_192),
    "7B B16 1024": (16, 32, 1, 128, 1_024),
    "7B B8 900": (8, 32, 1, 128, 900),
}
TILES = {
    f"{block_k}x{block_q}, {warps} warps, {stages} stages{', described' if described else ''}": Tiles(
        block_q=block_q, block_k=block_k, num_warps=warps, num_stages=stages, described=described
    )
    for block_k, block_q, warps, stages in (
        (64, 64, 4, 3),
        (64, 64, 4, 4),
        (64, 128, 4, 3),
        (64, 128, 4, 4),
        (128, 64, 4, 2),
        (128, 64, 4, 3),
        (128, 128, 4, 2),
        (256, 64, 8, 3),
    )
    for described in (False, True)
}
HEADER = ("shape", "what", "median", "least to most", "over the forward", "TFLOP/s", "largest difference")


@dataclass(kw_only=True)
class Arm:
    """What is timed: a call, its times, and by how much its mass differs from that of the kernel as it stands."""

    name: str
    call: Callable[[], Any]
    times_ms: list[float] = field(default_factory=list)
    difference: float | None = None
    error: str = ""


def plain_chunk(shape: Sequence[int], device: str) -> Chunk:
    """Return a prompt without pads; states lie as models make them."""
    batch, heads, group, width, tokens = shape
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    query, keys, values = (
        torch.randn(batch, tokens, count, width, device=device, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads * group, heads, heads)
    )
    position = torch.arange(tokens, device=device).expand(batch, tokens)
    return Chunk(
        query=query,
        keys=keys,
        values=values,
        query_position=position,
        key_position=position[:, None].expand(batch, heads, tokens),
        scaling=width**-0.5,
        plain=True,
    )


def other_version(path: Path) -> ModuleType:
    """Return the kernels of the file."""
    spec = importlib.util.spec_from_file_location("prefill_of_another_commit", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; give kvbench/kernels/prefill.py of another commit")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # triton looks for the module of a kernel
    spec.loader.exec_module(module)
    return module


def with_tiles(chunk: Chunk, lse: Tensor, tiles: Tiles) -> Callable[[], Tensor]:
    """Return a call of the kernel with these tiles."""

    def call() -> Tensor:
        with patch.object(prefill, "mass_tiles_for", lambda *arguments: tiles):
            return prefill.column_mass(chunk, "mean", lse)

    return call


def measured(chunk: Chunk, tiles: dict[str, Tiles], old: ModuleType | None, *, rounds: int, repeats: int) -> list[Arm]:
    """Return all arms, timed in turn, there and back; one that fails says so."""
    states = (chunk.query, chunk.keys, chunk.values, chunk.scaling)
    arms = []
    if chunk.query.is_cuda:
        lse = forward.causal_forward(*states)[1]
        arms.append(Arm(name="fused forward", call=lambda: forward.causal_forward(*states)))
    else:
        lse = prefill.row_lse(chunk)
    as_it_is = prefill.column_mass(chunk, "mean", lse)
    arms.append(Arm(name="mass as it stands", call=lambda: prefill.column_mass(chunk, "mean", lse)))
    if old is not None:
        arms.append(Arm(name="mass of the other version", call=lambda: old.column_mass(chunk, "mean", lse)))
    arms += [Arm(name=name, call=with_tiles(chunk, lse, one)) for name, one in tiles.items()]
    for arm in arms:
        try:
            made = arm.call()
            if isinstance(made, Tensor):
                arm.difference = float(((made - as_it_is).abs().max() / as_it_is.max()).cpu())
        except Exception as error:  # tiles that the chip has no room for
            arm.error = " ".join(f"{type(error).__name__}: {error}".split())[:100]
    running = [arm for arm in arms if not arm.error]
    for number in range(rounds):
        for arm in running[:: 1 if number % 2 == 0 else -1]:
            arm.times_ms.append(statistics.median(repeated_ms(arm.call, repeats, chunk.query.device)))
    return arms


def rows_of(name: str, shape: Sequence[int], arms: Sequence[Arm]) -> list[list[str]]:
    """Return the rows of one shape; the rate counts the products below the diagonal, of the forward twice."""
    batch, heads, group, width, tokens = shape
    flop = batch * heads * group * tokens * tokens * width
    forward = next((arm for arm in arms if arm.name == "fused forward"), None)
    rows = []
    for arm in arms:
        if arm.error:
            rows.append([name, arm.name, "-", "-", "-", "-", arm.error])
            continue
        median = statistics.median(arm.times_ms)
        over = "-" if forward is None else f"{median / statistics.median(forward.times_ms):.3f}"
        rate = flop * (2 if arm is forward else 1) / median / 1e9
        spread = f"{min(arm.times_ms):.3f} to {max(arm.times_ms):.3f}"
        difference = "-" if arm.difference is None else f"{arm.difference:.1e}"
        rows.append([name, arm.name, f"{median:.3f} ms", spread, over, f"{rate:.0f}", difference])
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every shape, print a table, and say which tiles were fastest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for mass_times.json and .md")
    parser.add_argument("--old", type=Path, metavar="FILE", help="prefill.py of another commit")
    asked = parser.parse_args(arguments)
    old = None if asked.old is None else other_version(asked.old)
    rows, content, fastest = [], [], []
    for name, shape in SHAPES.items():
        arms = measured(plain_chunk(shape, "cuda:0"), TILES, old, rounds=6, repeats=3 if shape[-1] > 10_000 else 15)
        rows += rows_of(name, shape, arms)
        content += [{"shape": name, "what": arm.name, "times_ms": arm.times_ms, "error": arm.error} for arm in arms]
        tried = [arm for arm in arms if arm.name in TILES and not arm.error]
        fastest.append(f"{name}: {min(tried, key=lambda arm: statistics.median(arm.times_ms)).name}")
        torch.cuda.empty_cache()
    text = "\n".join([*markdown_table(HEADER, rows), "", "fastest: " + "; ".join(fastest), ""])
    print(text)
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / "mass_times.md").write_text(text, encoding="utf-8")
        made = {"environment": environment("cuda:0"), "arms": content}
        (asked.out / "mass_times.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
