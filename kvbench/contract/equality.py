"""Rules of what a model computes: as with the stock cache, as attention over what is held, alone as in a batch.

`visible_logits` is a plain float64 forward of the tiny Llamas: every query is told what it sees, layer by layer and
head by head. Written from the definition of the model and not from the harness: no cache, no mask, no batching.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from kvbench.cache import UNLIMITED, Budget, Needs, Policy, PolicyCache, ScorePolicy, View, When, cache_argument
from kvbench.cache.policy import is_divided, merge_at_decode, needs_of, total_of
from kvbench.cache.released import Departures, departures_of
from kvbench.contract.driving import (
    TINY_MODELS,
    Trace,
    drive,
    held_positions,
    left_padded,
    random_tokens,
    repeat_where_asked,
    tiny_model,
)
from kvbench.contract.terms import (
    BUDGETS,
    CLOSE,
    POSITIONS,
    PROMPT,
    ROUNDED,
    STEPS,
    advised,
    allowed,
    block,
    budget_named,
    cells,
    demand,
    merges,
    planned,
    rule,
    same,
)

Sees = list[list[list[tuple[int, ...]]]]
"""Positions in sight: [query][layer][KV head]."""


def visible_entries(held: list[list[list[tuple[int, ...]]]], prompt: int) -> Sees:
    """Return what each query sees if `held[step][layer][head]` was held after the prompt and after each step."""
    layers, heads = len(held[0]), len(held[0][0])
    causal = [[[tuple(range(at + 1))] * heads] * layers for at in range(prompt)]
    steps = [[[(*head, prompt + step) for head in layer] for layer in before] for step, before in enumerate(held[:-1])]
    return causal + steps


def visible_logits(model: Any, tokens: Tensor, sees: Sees, *, positions: str) -> Tensor:
    """Return logits (T, V) of tokens (T,), as `visible_pass` does."""
    return visible_pass(model, tokens, sees, positions=positions)[0]


@torch.no_grad()
def visible_pass(model: Any, tokens: Tensor, sees: Sees, *, positions: str) -> tuple[Tensor, Tensor]:
    """Return logits (T, V) and attention rows (L, H, G, T, T): what each query gave to each token it saw, else 0.

    in_cache: what a query sees stands at 0, 1, 2.. by age, and the query last. released: a token stands,
    for good, at the number of others that its first layer sees.
    """
    places = torch.arange(len(sees))
    if positions == "released":
        places = torch.tensor([max(len(head) for head in query[0]) - 1 for query in sees])
    hidden = _weight(model.model.embed_tokens)[tokens]
    all_rows = []
    for index, layer in enumerate(model.model.layers):
        normed = _normed(layer.input_layernorm, hidden)
        mixed, rows = _attention(model, layer.self_attn, normed, [query[index] for query in sees], places, positions)
        hidden = hidden + mixed
        all_rows.append(rows)
        normed = _normed(layer.post_attention_layernorm, hidden)
        gate, up = normed @ _weight(layer.mlp.gate_proj).T, normed @ _weight(layer.mlp.up_proj).T
        hidden = hidden + (functional.silu(gate) * up) @ _weight(layer.mlp.down_proj).T
    return _normed(model.model.norm, hidden) @ _weight(model.lm_head).T, torch.stack(all_rows)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.double()


def _normed(norm: Any, hidden: Tensor) -> Tensor:
    scale: Tensor = (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return hidden / scale * _weight(norm)


def rotated(states: Tensor, position: Tensor, frequencies: Tensor) -> Tensor:
    """Return states (N, D) at `position` (N,): pairs (i, i + D / 2) turned, as complex numbers."""
    half = states.shape[-1] // 2
    turn = torch.polar(torch.ones(1, dtype=torch.float64), position.double()[:, None] * frequencies.double())
    pairs = torch.complex(states[:, :half].double(), states[:, half:].double()) * turn
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def _attention(
    model: Any, attn: Any, normed: Tensor, sees: list[list[tuple[int, ...]]], places: Tensor, positions: str
) -> tuple[Tensor, Tensor]:
    width, frequencies = attn.head_dim, model.model.rotary_emb.inv_freq
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    query, key, value = ((normed @ _weight(projection).T).unflatten(-1, (-1, width)) for projection in projections)
    group = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    all_rows = torch.zeros(key.shape[1], group, len(sees), len(sees), dtype=torch.float64)
    for at, heads in enumerate(sees):
        for head, visible in enumerate(heads):
            seen = torch.tensor(sorted(visible))
            assert int(seen[-1]) == at
            place = torch.arange(len(seen)) if positions == "in_cache" else places[seen]
            keys = rotated(key[seen, head], place, frequencies)
            mine = slice(head * group, (head + 1) * group)
            queries = rotated(query[at, mine], place[-1:].expand(group), frequencies)
            rows = (queries @ keys.T / width**0.5).softmax(dim=-1)
            output[at, mine] = rows @ value[seen, head]
            all_rows[head][:, at][:, seen] = rows
    return output.flatten(1) @ _weight(attn.o_proj).T, all_rows


STEPS_OF_ROWS = 8  # of a fraction two more entries are allowed in them, and in all others one goes
_ATTENTION = (1e-4, 1e-5)  # float32 sums of at most 38 rows


@cache
def _stock(name: str) -> tuple[Trace, list[list[int]]]:
    """Two rows through transformers' own cache, and its answers to two of different length, once for all."""
    model = tiny_model(name, attached=False)
    trace = drive(model, DynamicCache(), random_tokens(1, 2, PROMPT + STEPS), PROMPT)
    prompt, mask = left_padded([random_tokens(2, 11), random_tokens(3, 17)])
    answer = model.generate(prompt, attention_mask=mask, max_new_tokens=STEPS, do_sample=False)
    return trace, answer.tolist()


@rule(
    "an unlimited budget gives the logits and the answers of the stock cache",
    "then nothing of kvbench changes what a model says",
    model=TINY_MODELS,
    positions=POSITIONS,
)
def equals_the_stock_cache(policy: Policy, *, model: str, positions: Any) -> None:
    """Raise BrokenRuleError where logits, or answers of `generate`, differ from transformers' DynamicCache."""
    tiny, tokens = tiny_model(model), random_tokens(1, 2, PROMPT + STEPS)
    ours = drive(tiny, PolicyCache(tiny, policy, UNLIMITED, positions=positions), tokens, PROMPT)
    theirs, answers = _stock(model)
    same(ours.prompt_logits, theirs.prompt_logits, CLOSE, "logits of the prompt")
    same(torch.stack(ours.logits), torch.stack(theirs.logits), CLOSE, "logits of the answer")
    if model in ("llama_gqa", "llama_mha"):
        prompt, mask = left_padded([random_tokens(2, 11), random_tokens(3, 17)])
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
        answer = tiny.generate(
            prompt, **cache_argument(tiny, PolicyCache(tiny, policy, positions=positions)), **options
        )
        demand(answer.tolist() == answers, "generate gives other tokens than with the stock cache")


@rule(
    "sequences whose steps alternate do not touch each other",
    "state lies in the cache, not in the policy",
    positions=POSITIONS,
)
def keeps_sequences_apart(policy: Policy, *, positions: Any) -> None:
    """Raise BrokenRuleError where a sequence has other logits while another one is run in between."""
    model, prompts = tiny_model("llama_gqa"), (random_tokens(11, 1, 20), random_tokens(12, 1, 30))
    caches = [PolicyCache(model, policy, Budget(fraction=0.3), positions=positions) for _ in prompts]
    spans = [(0, 14), (14, 15), (15, 16), (16, 20)]
    steps: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for start, end in spans:
            for logits, tokens, one in zip(steps, prompts, caches, strict=True):
                logits.append(model(tokens[:, start:end], **cache_argument(model, one)).logits)
                repeat_where_asked(model, one, tokens[:, :end])
        for logits, tokens in zip(steps, prompts, strict=True):
            own = PolicyCache(model, policy, Budget(fraction=0.3), positions=positions)
            for (start, end), interleaved in zip(spans, logits, strict=True):
                alone = model(tokens[:, start:end], **cache_argument(model, own)).logits
                repeat_where_asked(model, own, tokens[:, :end])
                demand(
                    torch.equal(alone, interleaved),
                    f"tokens {start} to {end} have other logits beside another sequence",
                )


@cache
def _half() -> Any:
    return copy.deepcopy(tiny_model("llama_gqa")).bfloat16()


@rule(
    "a model in bfloat16 stores bfloat16 under the budget",
    "bytes are those of the model's numbers",
    positions=POSITIONS,
)
def takes_half_precision(policy: Policy, *, positions: Any) -> None:
    """Raise BrokenRuleError where keys are stored wider, or logits are no numbers."""
    model = _half()
    limited = PolicyCache(model, policy, Budget(tokens=9), positions=positions)
    trace = drive(model, limited, random_tokens(4, 1, 38), PROMPT)
    whole = drive(model, PolicyCache(model, policy, UNLIMITED), random_tokens(4, 1, 38)[:, :PROMPT], PROMPT)
    keys = trace.cache.policy_layers[0].keys
    assert keys is not None
    demand(keys.dtype == torch.bfloat16, f"keys are stored as {keys.dtype}")
    demand(
        torch.equal(trace.prompt_logits, whole.prompt_logits), "the prompt's own logits differ from the full cache's"
    )
    demand(all(bool(torch.isfinite(step).all()) for step in trace.logits), "the model's logits are NaN or infinite")


@rule(
    "a row alone is the same row in a left-padded batch",
    "pads hold nothing: view.valid says where, and sums over all of T count them",
    budget=BUDGETS,
    model=("llama_gqa", "llama_mha"),
    positions=POSITIONS,
)
def sees_no_pads(policy: Policy, *, budget: str, model: str, positions: Any) -> None:
    """Raise BrokenRuleError where a row keeps other entries, or has other logits, beside longer ones."""
    tiny, given = tiny_model(model, double=True), budget_named(budget, policy)
    lengths = (9, PROMPT, 16)
    rows = [random_tokens(20 + index, length + STEPS_OF_ROWS) for index, length in enumerate(lengths)]
    tokens, mask = left_padded(rows)
    batch = drive(tiny, PolicyCache(tiny, policy, given, positions=positions), tokens, max(lengths), mask)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = drive(tiny, PolicyCache(tiny, policy, given, positions=positions), row[None], length)
        beside = [[layer[index] for layer in held] for held in batch.held]
        by_itself = [[layer[0] for layer in held] for held in alone.held]
        step = next((step for step, (a, b) in enumerate(zip(beside, by_itself, strict=True)) if a != b), None)
        pads = max(lengths) - length
        demand(step is None, f"a row with {pads} pads on its left keeps other entries than alone, from step {step} on")
        same(
            torch.stack([one[index] for one in batch.logits]),
            torch.stack(alone.logits)[:, 0],
            CLOSE,
            "logits of a padded row",
        )
        same(batch.prompt_logits[index, -length:], alone.prompt_logits[0], CLOSE, "prompt logits of a padded row")


def merging_at_decode(policy: Policy) -> str | None:
    """Spare policies whose evicted entries are seen in others."""
    return "what it evicts is seen in what it merged it into" if merge_at_decode(policy) is not None else None


@rule(
    "eviction equals attention that cannot see what was evicted",
    "plain attention over all tokens, in float64, with exactly what was held in sight of each query",
    budget=("one", "smallest", "tokens", "third_of_seen"),
    model=("llama_gqa_8_2", "llama_mha"),
    positions=POSITIONS,
    spares=merging_at_decode,
)
def equals_masked_attention(policy: Policy, *, budget: str, model: str, positions: Any) -> None:
    """Raise BrokenRuleError where logits differ from the reference's."""
    tiny, given, prompt = tiny_model(model, double=True), budget_named(budget, policy), PROMPT
    if merges(policy):
        given, prompt = Budget(tokens=9), 9  # nothing to merge: only decode evicts
    tokens = random_tokens(30, 1, prompt + STEPS)
    trace = drive(tiny, PolicyCache(tiny, policy, given, positions=positions), tokens, prompt)
    visible = visible_entries([[layer[0] for layer in held] for held in trace.held], prompt)
    expected = visible_logits(tiny, tokens[0], visible, positions=positions)
    same(trace.prompt_logits[0].double(), expected[:prompt], CLOSE, "logits of the prompt")
    same(torch.stack(trace.logits)[:, 0].double(), expected[prompt:], ROUNDED, "logits of the answer")


@rule(
    "a second turn keeps the budget and sees what was held",
    "conversations go on in one compressed cache",
    budget=("smallest", "tokens", "third_of_seen", "most_of_prompt", "unlimited"),
    positions=POSITIONS,
)
def goes_on_with_a_second_turn(policy: Policy, *, budget: str, positions: Any) -> None:
    """Raise BrokenRuleError after chunks of 24, 1, 1, 1, 7 and 1, 1 tokens on one cache.

    Of most of a prompt a layer may be given more than it still holds, and others have to hold it.
    """
    model, given = tiny_model("llama_gqa", double=True), budget_named(budget, policy)
    turns = (PROMPT, 1, 1, 1, 7, 1, 1)
    tokens = random_tokens(31, 1, sum(turns))
    cache = PolicyCache(model, policy, given, positions=positions)
    logits, sees, start = [], [], 0
    for turn in turns:
        before: list[Any] = [layer[0] for layer in held_positions(cache)] if start else [[()] * 2] * 2
        with torch.no_grad():
            logits.append(model(tokens[:, start : start + turn], **cache_argument(model, cache)).logits[0])
            repeat_where_asked(model, cache, tokens[:, : start + turn])
        sees += [
            [[(*head, *range(start, at + 1)) for head in layer] for layer in before]
            for at in range(start, start + turn)
        ]
        start += turn
        demand(
            cache.get_seq_length() == start, f"the cache says it has seen {cache.get_seq_length()} tokens of {start}"
        )
        sizes = [len(head) for head in cells(held_positions(cache))]
        if turn > 1 and total_of(policy) == "exact" and When.PREFILL in policy.when and isinstance(policy, ScorePolicy):
            uncut = sum(len(head) + turn for layer in before for head in layer)
            total = min(uncut, planned(policy, given, PROMPT, start) * len(sizes))
            told = f"after a turn of {turn} tokens, {start} in all, the heads hold {sizes} entries"
            demand(sum(sizes) == total, f"{told}; together {total} are due")
        if When.DECODE in policy.when and When.PREFILL in policy.when:
            most = allowed(policy, given, PROMPT, start, 0) + block(policy, 1)
            told = f"after {start} tokens in several turns the heads hold {sizes} entries; allowed are {most}"
            demand(sum(sizes) <= most * len(sizes) and (is_divided(policy) or max(sizes) <= most), told)
    if not merges(policy):
        expected = visible_logits(model, tokens[0], sees, positions=positions)
        same(torch.cat(logits).double(), expected, ROUNDED, "logits of several turns")


@rule(
    "a second turn in a left-padded batch is that of the row alone",
    "pads stand before the first turn only",
    budget=("tokens", "third_of_seen"),
    positions=POSITIONS,
)
def goes_on_beside_longer_rows(policy: Policy, *, budget: str, positions: Any) -> None:
    """Raise BrokenRuleError where a padded row has another second turn than alone."""
    model, given, lengths = tiny_model("llama_mha", double=True), budget_named(budget, policy), (13, PROMPT)
    rows = [random_tokens(40 + index, length + 8) for index, length in enumerate(lengths)]
    tokens, mask = left_padded(rows)
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [PolicyCache(model, policy, given, positions=positions) for _ in range(3)]
    for start, end in [(0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 6), (PROMPT + 6, PROMPT + 7)]:
        told = {"attention_mask": mask[:, :end], "position_ids": place[:, start:end]}
        with torch.no_grad():
            together = model(tokens[:, start:end], **cache_argument(model, caches[2]), **told).logits
            repeat_where_asked(model, caches[2], tokens[:, :end], mask[:, :end])
            for index, length in enumerate(lengths):
                first = max(0, start - PROMPT + length)
                own = rows[index][None, first : end - PROMPT + length]
                alone = model(own, **cache_argument(model, caches[index])).logits
                repeat_where_asked(model, caches[index], rows[index][None, : end - PROMPT + length])
                same(together[index, -alone.shape[1] :], alone[0], CLOSE, f"logits of tokens {first} to {end}")
                beside = [layer[index] for layer in held_positions(caches[2])]
                by_itself = [layer[0] for layer in held_positions(caches[index])]
                demand(beside == by_itself, f"after {end} tokens a padded row keeps other entries than alone")


def reading_nothing(policy: Policy) -> str | None:
    """Spare policies that read no attention, or on purpose another than was given."""
    if not needs_of(policy) & (Needs.MASS | Needs.WINDOW | Needs.PROBS | Needs.HEAD_ROWS):
        return "it reads no attention"
    released = departures_of(policy) != Departures() or "released" in type(policy).__module__.split(".")
    return "released code keeps other books, on purpose" if released else None


@rule(
    "the attention it reads is the attention that was given",
    "rows and sums are counted again from a model in float64 that sees exactly what was held",
    budget=("tokens", "third_of_seen"),
    model=("llama_gqa_8_2", "llama_mha"),
    spares=reading_nothing,
)
def reads_the_attention_given(policy: Policy, *, budget: str, model: str) -> None:
    """Raise BrokenRuleError where mass, or rows of the last queries, differ from a reference's."""
    given, tiny = budget_named(budget, policy), tiny_model(model, double=True)
    views: list[View] = []

    def noted(view: View, ask: Callable[[], Any]) -> Any:
        shown = {field.name: getattr(view, field.name) for field in dataclasses.fields(view)}
        copies: Any = {name: one.clone() if isinstance(one, Tensor) else one for name, one in shown.items()}
        views.append(View(**copies))  # later steps go on in the same tensors
        return ask()

    tokens = random_tokens(30, 1, PROMPT + STEPS)
    with advised(plan=noted, victim=noted):
        trace = drive(tiny, PolicyCache(tiny, policy, given), tokens, PROMPT)
    sees = visible_entries([[layer[0] for layer in held] for held in trace.held], PROMPT)
    rows = visible_pass(tiny, tokens[0], sees, positions="original")[1]
    reduced = {"mean": rows.mean(2), "sum": rows.sum(2), "max": rows.amax(2)}[policy.reduction]  # (L, H, T, T)
    for view in views:
        if not view.prefill and merges(policy):
            continue  # what was merged takes part as what it became
        seen, where = int(view.seen[0]), f"in layer {view.layer} after {int(view.seen[0])} tokens"
        at, head_rows = view.position[0].clamp(min=0), rows[view.layer][..., :seen, :]
        expected = {"mass": reduced[view.layer, :, :seen].sum(dim=1).gather(-1, at)}
        if view.window_or_none is not None:
            last = reduced[view.layer, :, seen - view.window.shape[2] : seen]
            expected["window"] = last.gather(-1, at[:, None].expand(-1, last.shape[1], -1))
        if view.probs_or_none is not None:
            expected["probs"] = reduced[view.layer, :, seen - 1].gather(-1, at)
        if view.head_rows_or_none is not None:
            last = head_rows[:, :, seen - view.head_rows.shape[3] :]
            expected["head_rows"] = last.gather(-1, at[:, None, None].expand(*last.shape[:3], -1))
        for name, numbers in expected.items():
            found = getattr(view, f"{name}_or_none")
            if found is not None:
                valid = (
                    view.valid[0]
                    if numbers.ndim == 2
                    else view.valid[0].reshape(len(at), *[1] * (numbers.ndim - 2), -1)
                )
                told = f"view.{name} {where}"
                same(found[0].double() * valid, numbers * valid, _ATTENTION, told)
