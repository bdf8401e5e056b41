"""Compile every kernel for an H100 without having one: run as a program, outside the interpreter.

Prints one line per kernel, `name shared_bytes`; an error of the compiler ends it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvbench.kernels import decode_attention, decode_step, ordering, prefill, products, settling, slot_writes

HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {"length": "*i64", "seen": "*i64", "position": "*i64", "free": "*i64", "budget": "*i64", "sinks": "*i64"}
_TYPES |= {"epsilon": "fp32", "begin": "i32", "end": "i32", "part": "i32"}
_TYPES |= {"head_start": "*i64", "spread": "*i64"}
_TYPES |= {"faults": "*i32", "recent_from": "*i64", "victim": "*i64", "rank": "*i32", "kind": "*i8", "scaling": "fp32"}
_TYPES |= {"in_place": "*i32"}
_FLOATS = ("cosines", "sines", "partial", "peaks", "sums", "logits", "mass", "probs", "score")
_TYPES |= dict.fromkeys(_FLOATS, "*fp32")
_COUNTS = ("heads", "width", "query_row", "query_head", "key_row", "key_head", "value_row", "value_head", "size")
_TYPES |= dict.fromkeys(
    (*_COUNTS, "capacity", "parts", "pairs", "rows", "n0", "n1", "n2", "score_row", "score_head"), "i32"
)
_STRIDES = tuple(f"{name}_{axis}" for name in ("query", "keys", "position", "states") for axis in "bht")
_TYPES |= dict.fromkeys((*_STRIDES, "queries", "entries"), "i32")
_TYPES |= {"lse": "*fp32", "normaliser": "*fp32", "query_position": "*i64", "key_position": "*i64", "scale": "fp32"}
_OF_INPUT = ("x", "w0", "w1", "w2", "b0", "b1", "b2", "o0", "o1", "o2", "gate", "up", "out", "gain", "before")
_ROTATED = ("query_heads", "key_heads", "half", "table_row")
_INPUTS = (
    *(torch.empty(rows, 1, 4096, dtype=torch.bfloat16) for rows in (1, 16, 32, 64)),
    *(torch.empty(rows, 1, 4096) for rows in (1, 16, 64)),
    *(torch.empty(16, 1, 576, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)),
)


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str] | None = None, **options: int) -> None:
    """Compile one kernel; pointers, and counts that models make multiples of 16, are declared as such."""
    names = kernel.arg_names
    known = {**dict.fromkeys(names, "*bf16"), **_TYPES, **(types or {})}
    signature = {name: "constexpr" if name in constants else known[name] for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in (*_COUNTS, *_STRIDES, "part")]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=HOPPER, options=options)
    print(kernel.__name__, compiled.metadata.shared)


def main() -> None:
    """Compile all, with the constants that the launchers use on that GPU."""
    products.num_processors = lambda device: 132
    part = {"GROUP": 4, "BLOCK_G": 16, "BLOCK_D": 128, "UPCAST": False, "WANT_LOGITS": True}
    part |= {"PRODUCT": decode_attention._PRODUCT, "BLOCK_S": decode_attention._GIVEN_SLOTS, "REDUCTION": "mean"}
    part |= {"ADD_MASS": True, "WANT_PROBS": True}
    few, many, floats = decode_attention._FEW, decode_attention._MANY, decode_attention._NARROW_FLOATS
    for turn, whole, tile in ((False, False, few), (False, True, many), (True, True, many), (True, False, few)):
        constants = {**part, "BLOCK_C": tile.slots, "TURN": turn, "RAGGED": turn, "WHOLE": whole}
        compile_kernel(decode_attention.attend_part, constants, num_warps=tile.warps, num_stages=tile.stages)
    narrow = {**part, "BLOCK_C": floats.slots, "BLOCK_D": 64, "TURN": True, "RAGGED": False, "WHOLE": False}
    types = dict.fromkeys(("query", "keys", "values", "output"), "*fp32")
    compile_kernel(decode_attention.attend_part, narrow, types, num_warps=floats.warps, num_stages=floats.stages)
    join = {"PARTS": 4, "GROUP": 4, "BLOCK_D": 128}
    compile_kernel(decode_attention.join_parts, join, num_warps=4)
    join |= {"BLOCK_C": decode_attention._HAND_OUT_SLOTS, "ADD_MASS": True, "WANT_PROBS": True, "RAGGED": True}
    del join["BLOCK_D"]
    compile_kernel(decode_attention.hand_out, {**join, "REDUCTION": "mean"}, num_warps=4)
    write = {"BLOCK_D": 128, "BLOCK_HALF": 64, "HAS_MASS": True, "HAS_RANK": True, "ADVANCE": False, "RAGGED": True}
    types = {**dict.fromkeys(_ROTATED, "i32"), "queries": "*bf16", "cosines": "*bf16", "sines": "*bf16"}
    for turn in (False, True):
        compile_kernel(slot_writes.write_token, {**write, "TURN": turn}, types, num_warps=1)
    for given, block in ((False, 256), (False, slot_writes._MOST_SLOTS), (True, 256)):
        victim = {"BLOCK_C": block, "GIVEN": given, "HAS_RANK": True, "APPLY": not given, "RAGGED": given}
        compile_kernel(slot_writes.free_victim, victim, num_warps=block // 128)
    for x in _INPUTS:
        types = {} if x.dtype == torch.bfloat16 else dict.fromkeys(_OF_INPUT, "*fp32")
        is_one = {"NORM": x.shape[0] == 1}
        for sizes in ((4096,), (5120,), (32_000,), (6144, 6144), (4096, 1024, 1024)):
            block = {**products._blocks(x, sizes, in_parts=len(sizes) == 1), "UPCAST": False}
            warps, parts = block.pop("num_warps"), block["PARTS"]
            given = {**block, **is_one, "MATRICES": 3, "HAS_BIAS": True, "ADD": parts == 1}
            outputs = types | (dict.fromkeys(("o0", "o1", "o2"), "*fp32") if parts > 1 else {})
            compile_kernel(products.project, given, outputs, num_warps=warps)
            if len(sizes) == 2:
                del block["PARTS"]
                for together in (False, True):
                    compile_kernel(products.gate_up, {**block, **is_one, "TOGETHER": together}, types, num_warps=warps)
    for add in (0, 1, 4):
        parts = {"delta": "*fp32"} if add > 1 else {}
        compile_kernel(decode_step.norm_row, {"BLOCK": 4096, "ADD": add}, parts, num_warps=16)
    angles = {"position": "*i64", "frequencies": "*fp32", "position_row": "i32", "half": "i32"}
    compile_kernel(decode_step.angles_of_row, {"BLOCK": 64, "INTERPRETED": False}, angles, num_warps=1)
    types = {**dict.fromkeys(_ROTATED, "i32"), "queries": "*bf16", "cosines": "*bf16", "sines": "*bf16"}
    compile_kernel(decode_step.rotate_head, {"BLOCK": 64}, types, num_warps=1)
    for one in (False, True):
        block = slot_writes._ONE_WARP if one else slot_writes._MOST_IN_REGISTERS
        search = {"BLOCK_C": block, "IN_ONE": one, "FROM_NEWEST": one}
        types = {"rank": "*i64", "slot": "*i64", "newer": "i32", "sinks": "i32"}
        compile_kernel(slot_writes.find_rank, search, types, num_warps=1 if one else block // 512)
    _compile_prefill()
    _compile_ordering()


def _compile_ordering() -> None:
    """Compile the choice of the best and the ranks, for a short and for a long prompt."""
    types = {"score": "*fp32", "keep": "*u8", "budget": "*i64", "budget_b": "i32", "budget_h": "i32"}
    for block, warps in ((1024, 4), (ordering._BLOCK, 8)):
        compile_kernel(ordering._keep_top, {"BLOCK": block}, types, num_warps=warps)
    for order in (False, True):
        compile_kernel(ordering._age_rank, {"ORDER": order, "BLOCK": ordering._RANKED}, {"made": "*i64"}, num_warps=4)
    for entries in (1024, 32_768):
        walk = ordering.walk_along(entries)
        warps = walk.pop("num_warps")
        lines = {"anchor": "*u8", "member": "*u8", "line": "*i32", "nearest": "*i64"}
        lines |= {**dict.fromkeys(("bounds", "members", "start", "end"), "*i32"), "into": "*i64", "order": "*i64"}
        lines |= {"keep": "*u8", "kept_position": "*i64", "kept_kind": "*i8", "kept_mass": "*fp32", "noted": "*fp32"}
        lines |= {"in_one": "*u8", "chunks": "i32"}
        lines |= {"kept_noted": "*fp32", "kind_b": "i32", "kind_h": "i32"}
        lines |= {"counts": "*i64", "amiss": "*u8", "first": "*i64", "last": "*i64", "found": "*u8"}
        look = {"HAS_INTO": True, "EXACT": True, "BLOCK": walk["BLOCK"]}
        compile_kernel(ordering._look, look, lines, num_warps=warps)
        columns = {"HAS_KEEP": True, "HAS_MASS": True, "HAS_NOTED": True}
        compile_kernel(ordering._nearest_anchor, walk, lines, num_warps=warps)
        compile_kernel(settling._compact, {**walk, **columns}, lines, num_warps=warps)
        compile_kernel(settling._bucket, {**walk, "CHUNK": settling._CHUNK}, lines, num_warps=warps)
    compile_kernel(ordering._outside, {"BLOCK": 1024}, lines, num_warps=4)
    shield = {**lines, "shielded": "*fp32", "score_b": "i32", "score_h": "i32"}
    compile_kernel(ordering._shield, {"BLOCK": 1024}, shield, num_warps=4)
    compile_kernel(ordering._has_nan, {"BLOCK": 1024}, {**lines, "numbers": "*fp32", "each": "i32"}, num_warps=4)
    for rows in (1, 16):
        bounds = {"num_sinks": "i32", "num_recent": "i32"}
        compile_kernel(ordering._range, {"FRACTION": 0.29, "BLOCK": rows}, bounds, num_warps=1, enable_fp_fusion=False)


def _compile_prefill() -> None:
    """Compile the statistics of a prompt, with and without positions, and the merging."""
    size = prefill._HALF[128]
    block = {"GROUP": 4, "WIDTH": 128, "BLOCK_D": 128, "BLOCK_Q": size.block_q, "BLOCK_K": size.block_k}
    launch = {"num_warps": size.num_warps, "num_stages": size.num_stages}
    for plain in (False, True):
        constants = {**block, "PLAIN": plain, "UPCAST": False}
        compile_kernel(prefill._row_lse, constants, **launch)
        for reduction in ("mean", "max"):
            for entries in (900, 32_768):
                _compile_mass({**constants, "REDUCTION": reduction}, entries)
        compile_kernel(prefill._window_rows, {**constants, "REDUCTION": "max"}, {"rows": "*fp32"}, **launch)
    bucket = {**dict.fromkeys(("members", "start", "end"), "*i32"), "order": "*i64", "sums": "*fp32"}
    bucket |= {"in_one": "*u8", "chunks": "i32"}
    tile = dict(settling._MANY_NUMBERS)
    warps = tile.pop("num_warps")
    width = {"WIDTH": 128, "BLOCK_D": 128, "CHUNK": settling._CHUNK}
    compile_kernel(settling._segment_mean, {"ADD_UP": False, **width, **tile}, bucket, num_warps=warps)
    compile_kernel(settling._chunk_sum, width, bucket, num_warps=4)


def _compile_mass(constants: dict[str, Any], entries: int) -> None:
    """Compile the walk over queries with the tiles it has for so many entries."""
    query = torch.empty(1, 1, 1, constants["WIDTH"], dtype=torch.bfloat16)
    tiles = prefill.mass_tiles_for(query, entries, constants["REDUCTION"])
    sizes = {"BLOCK_Q": tiles.block_q, "BLOCK_K": tiles.block_k, "LANES": prefill._LANES, "STAGES": tiles.num_stages}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    fetched = f"tensordesc<bf16[1, 1, {tiles.block_q}, {constants['BLOCK_D']}]>"
    for described in {False, tiles.described}:
        types = {"query": fetched} if described else {}
        compile_kernel(prefill._column_mass, {**constants, **sizes, "DESCRIBED": described}, types, **options)


if __name__ == "__main__":
    main()
