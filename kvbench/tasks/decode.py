"""Prefill and decode: the two things every task does, with true positions.

A `CacheSetting` prefills a batch and hands out its `Decoding`: the logits of the next token, and `step`. The same
loop serves every policy, the full cache included; `model.generate` with a `PolicyCache` gives the same tokens. A text
that is known already is fed in chunks where the policy frees nothing between two tokens (`forced`).

`engine: eager` runs a step operation by operation and is the reference. `engine: graph` captures it in a CUDA graph:
one launch a token, whatever the policy; batches of one shape under one setting use one graph and its buffers
(`CapturedSteps`). The graph holds the unmodified model's forward over the slot cache and, beside it, the policy's
choice of victims (`kvbench/cache/decisions.py`); every number that changes from step to step lives on the device. What
a step would do on the host, counting, is caught up with after each launch.

All captures of a device use one side stream: each further one would hold another workspace of the matrix library for
ever. An operation that waits for the device breaks a capture, and with it what the process does later, so work is
first run with waiting forbidden, and nothing is left behind where capturing fails.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import ref

import torch
from torch import Tensor

from kvbench.cache import Budget, Needs, Policy
from kvbench.cache.decisions import decisions_beside
from kvbench.cache.policy import needs_of
from kvbench.cache.positions import PositionMode
from kvbench.errors import ModelSupportError, NonFiniteError, PolicyError, ran_out_of_memory
from kvbench.models.devices import free_bytes
from kvbench.models.inputs import PromptBatch, repeat_instruction
from kvbench.models.loader import LoadedModel
from kvbench.models.spec import MOVING_ROTATIONS

if TYPE_CHECKING:
    from kvbench.cache import PolicyCache
    from kvbench.cache.cache import CacheState
    from kvbench.cache.counts import OnPlan, OnSettle


Engine = Literal["eager", "graph"]
ENGINES: tuple[str, ...] = get_args(Engine)
_WAITS = "synchronizing CUDA operation"  # in the text of the error that torch's debug mode raises
_KEPT_FRACTION = 0.25  # of the free memory, for captured steps that wait for their next batch
_MOST_LOGITS_BYTES = 2**28  # of one chunk of an answer, float32


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSetting:
    """What a cell puts in the cache's hands: policy, budget, resolved position mode and decode engine."""

    policy: Policy
    budget: Budget
    positions: PositionMode
    engine: Engine = "eager"

    def decoding(
        self,
        loaded: LoadedModel,
        batch: PromptBatch,
        reserve_tokens: int,
        *,
        on_settle: OnSettle = nullcontext,
        on_plan: OnPlan | None = None,
        future: Sequence[Tensor] | None = None,
        steps: CapturedSteps | None = None,
    ) -> Decoding:
        """Prefill `batch` into a fresh cache and return it ready for `reserve_tokens` decode steps."""
        cache = self.cache(loaded, batch, reserve_tokens, on_settle=on_settle, on_plan=on_plan, future=future)
        return self.decoding_with(loaded, batch, cache, steps=steps)

    def decoding_with(
        self,
        loaded: LoadedModel,
        batch: PromptBatch,
        cache: PolicyCache,
        *,
        prompt_logits: Tensor | None = None,
        steps: CapturedSteps | None = None,
    ) -> Decoding:
        """Return `batch` ready to be decoded with `cache`; prompt_logits where it has taken the prompt already.

        steps: those captured for other batches of `loaded`, which may serve this one.
        """
        if self.engine == "graph":
            return GraphDecoding(loaded, batch, cache, prompt_logits=prompt_logits, setting=self, steps=steps)
        return Decoding(loaded, batch, cache, prompt_logits=prompt_logits)

    def cache(
        self,
        loaded: LoadedModel,
        batch: PromptBatch,
        reserve_tokens: int,
        *,
        on_settle: OnSettle = nullcontext,
        on_plan: OnPlan | None = None,
        future: Sequence[Tensor] | None = None,
    ) -> PolicyCache:
        """Return an empty cache for `batch`, with room for `reserve_tokens` more."""
        from kvbench.cache import PolicyCache  # needs transformers

        return PolicyCache(
            loaded.model,
            self.policy,
            self.budget,
            positions=self.positions,
            reserve_tokens=reserve_tokens,
            prompt_kind=batch.kind,
            question_tokens=self._question_tokens(batch),
            row_seeds=batch.row_seeds,
            on_settle=on_settle,
            on_plan=on_plan,
            future=future,
        )

    def _question_tokens(self, batch: PromptBatch) -> tuple[int, ...] | None:
        """Return the tokens of each row's question where the policy reads them: finding them takes a while."""
        if batch.find_question_tokens is None or Needs.QUESTION not in needs_of(self.policy):
            return None
        return batch.find_question_tokens()


class Decoding:
    """One batch being decoded: `logits` (B, V) float32 are those of the next token. Every pass beats.

    prompt_logits: those after the prompt, where `cache` has taken the prompt already.
    """

    def __init__(
        self, loaded: LoadedModel, batch: PromptBatch, cache: Any, *, prompt_logits: Tensor | None = None
    ) -> None:
        from kvbench.cache.attention import cache_argument  # needs transformers

        self._model, self._beat = loaded.model, loaded.beat
        self.cache: PolicyCache = cache
        self._cache_argument = cache_argument(loaded.model, cache)
        self._tokens = torch.zeros_like(batch.tensors["input_ids"][:, -1:])
        self._position = batch.last_position_ids.clone()
        self._loaded, self._prompt = loaded, [batch.tensors["input_ids"]]
        self._padding, self._has_pictures = batch.tensors["attention_mask"], "pixel_values" in batch.tensors
        if prompt_logits is None:
            prompt_logits = self._pass(batch.position_ids, batch.tensors)[:, -1]
            self._beat()
        self.logits = prompt_logits
        self._read_again()
        if batch.question_ids is not None:
            self.extend(batch.question_ids)

    def extend(self, tokens: Tensor) -> Tensor:
        """Feed a chunk of tokens, (B, N), after everything so far; return the next logits (B, V) float32.

        The cache holds what its policy left; the chunk attends to that and to itself, and is cut with it, as
        part of the prompt even if it is a single token.
        """
        self.cache.expect_prompt(tokens.shape[1])
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        self.logits = self._pass(self._position + steps, {"input_ids": tokens})[:, -1]
        self._position += tokens.shape[1]
        self._beat()
        self._prompt.append(tokens)
        self._read_again()
        return self.logits

    def _read_again(self) -> None:
        """Repeat all that was given so far, where the policy asks for that before it cuts.

        Raises: ModelSupportError for a prompt with pictures, which nobody can repeat word by word.
        """
        if not getattr(self.cache, "awaits_second_pass", False):
            return
        from kvbench.cache.second_pass import read_again

        if self._has_pictures:
            kind = type(self.cache.policy_layers[0].setup.policy).__name__
            raise ModelSupportError(f"{kind} has the prompt repeated as text, and it shows pictures; choose text data")
        tokens = torch.cat(self._prompt, dim=-1)
        more = torch.ones_like(tokens[:, self._padding.shape[1] :])
        read_again(
            self._loaded.model,
            self.cache,
            tokens,
            torch.cat((self._padding, more), dim=-1),
            last_position=self._position,
            instruction=repeat_instruction(self._loaded),
            beat=self._beat,
        )

    def prepare(self) -> None:
        """Do ahead of time what the first step would do once; nothing in the eager engine."""

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row, (B,), at its true position; return the next logits (B, V) float32."""
        self._tokens.copy_(tokens[:, None])
        self.logits = self._forward()
        self._beat()
        return self.logits

    def feed(self, tokens: Tensor) -> Tensor:
        """Feed tokens of an answer, (B, N), in one pass; return the logits (B, N, V) float32 after each of them.

        The cache is then as N steps leave it. Raises: ValueError unless it `takes_answers_whole`.
        """
        num_tokens = tokens.shape[1]
        self.cache.expect_answer(num_tokens)
        steps = torch.arange(1, num_tokens + 1, device=tokens.device)
        logits = self._pass(self._position + steps, {"input_ids": tokens}, num_tokens)
        self._position += num_tokens
        self._beat()
        self.logits = logits[:, -1]
        return logits

    @property
    def tokens_per_pass(self) -> int:
        """How many tokens of a known answer are fed together: 1 where an entry may go between two of them."""
        return max(1, _MOST_LOGITS_BYTES // self.logits.nbytes) if self.cache.takes_answers_whole else 1

    def _forward(self) -> Tensor:
        """One decode step; it reads and changes tensors in place only, so that it can be captured."""
        self._position += 1
        return self._pass(self._position, {"input_ids": self._tokens})[:, -1]

    def _pass(self, position_ids: Tensor, inputs: Mapping[str, Tensor], num_logits: int = 1) -> Tensor:
        """Run the model over new tokens; return the logits (B, N, V) float32 after the last `num_logits` of them."""
        output = self._model(
            **inputs, position_ids=position_ids, **self._cache_argument, use_cache=True, logits_to_keep=num_logits
        )
        logits: Tensor = output.logits[:, -num_logits:].float()
        return logits


@torch.inference_mode()
def greedy(
    decoding: Decoding,
    *,
    end_token_ids: Collection[int],
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor] | None = None,
    on_step: Callable[[PolicyCache, list[bool]], None] | None = None,
) -> list[list[int]]:
    """Return the greedy answer of each row from where `decoding` stands, without its end token, any of `end_token_ids`.

    choose takes the logits (B, V) and gives the tokens (B,), where they are not the likeliest. on_step gets the cache
    and which rows are still being answered, after each step. Raises: NonFiniteError for logits whose largest is NaN or
    infinite, and for victims that were chosen by NaN, in a row that is still being answered.
    """
    answers: list[list[int]] = [[] for _ in range(decoding.logits.shape[0])]
    going = [True] * len(answers)
    for number in range(max_new_tokens):
        largest = decoding.logits.amax(dim=-1)
        if not bool((largest.isfinite() | ~torch.tensor(going, device=largest.device)).all()):
            raise NonFiniteError(f"the logits of new token {number} are not finite")
        tokens = decoding.logits.argmax(dim=-1) if choose is None else choose(decoding.logits)
        num_going = sum(going)
        for row, token in enumerate(tokens.tolist()):
            going[row] = going[row] and token not in end_token_ids
            if going[row]:
                answers[row].append(token)
        if not any(going) or number == max_new_tokens - 1:
            break
        if sum(going) < num_going:
            decoding.cache.end_rows([not goes for goes in going])
        decoding.step(tokens)
        if on_step is not None:
            on_step(decoding.cache, going)
    decoding.cache.check()
    return answers


def forced(decoding: Decoding, tokens: Tensor, lengths: Sequence[int], *, one_by_one: bool = False) -> Iterator[Tensor]:
    """Feed `tokens` (B, N), padded right; yield the logits (B, V) float32 after each.

    They go in chunks of `Decoding.tokens_per_pass`, or one after the other: what each sees is the same.
    lengths: the tokens of each row that count; what is wrong in a row after them is nobody's fault.
    """
    if decoding.tokens_per_pass > 1 and not one_by_one:
        for start in range(0, tokens.shape[1], decoding.tokens_per_pass):
            chunk = tokens[:, start : start + decoding.tokens_per_pass]
            yield from decoding.feed(chunk).unbind(dim=1)
        return
    before = [False] * len(lengths)
    for number in range(tokens.shape[1]):
        ended = [length <= number for length in lengths]
        if ended != before:
            decoding.cache.end_rows(ended)
        before = ended
        yield decoding.step(tokens[:, number])


def padded_targets(answers: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return answers as (B, N) int64 padded right, and (B, N) bool, True at real tokens."""
    longest = max(len(answer) for answer in answers)
    rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
    real = [[True] * len(answer) + [False] * (longest - len(answer)) for answer in answers]
    return torch.tensor(rows, device=device), torch.tensor(real, device=device)


class GraphDecoding(Decoding):
    """A `Decoding` that replays its step. `logits` are overwritten by the next step.

    The graph is captured by `prepare`, or by the first step, and once more after each `extend`; or it is one of
    `steps`, in whose buffers the cache then goes on. After the steps that were announced (`reserve_tokens`) buffers
    would have to grow, so further steps run one by one.
    """

    _graph: CapturedStep | None = None
    _replays_left = 0

    def __init__(
        self,
        loaded: LoadedModel,
        *arguments: Any,
        setting: CacheSetting,
        steps: CapturedSteps | None = None,
        **options: Any,
    ) -> None:
        """Take the prompt as `Decoding` does. Raises: ModelSupportError for a model whose step cannot be captured."""
        check_rotary(loaded.model)
        self._setting, self._steps = setting, steps
        super().__init__(loaded, *arguments, **options)
        self.cache.cut_blocks(by_itself=False)  # which waits for the device, so it is done between captured steps

    def extend(self, tokens: Tensor) -> Tensor:
        """Feed a chunk as `Decoding` does; the next step is captured anew, over the buffers that the cut laid out."""
        self._graph = None
        return super().extend(tokens)

    def feed(self, tokens: Tensor) -> Tensor:
        """Feed an answer as `Decoding` does; the next step is captured anew, as buffers may have grown."""
        self._graph = None
        return super().feed(tokens)

    def prepare(self) -> None:
        """Capture the step. Steps are run for warm-up and undone, so nothing is seen of them afterwards.

        Raises: PolicyError if a step waits for the device.
        """
        if self._graph is not None or self.cache.steps_announced < 1:
            return
        self._replays_left = self.cache.steps_announced
        if self._steps is not None and (found := self._steps.take(self._setting, self)) is not None:
            self._graph, self._tokens, self._position = found, found.tokens, found.position
            return
        counts = self._warmed_up()
        self._beat()
        self._graph = CapturedStep(self)
        self._beat()
        self.cache.restore(counts)
        if self._steps is not None:
            self._steps.keep(self._setting, self._graph)

    def _warmed_up(self) -> CacheState:
        """Return the counts on the host as they were; copies of tensors are let go, so that no graph is held up."""
        before = self.cache.snapshot()
        state = [self._tokens.clone(), self._position.clone()]

        def undo() -> None:
            self.cache.restore(before)
            for tensor, old in zip((self._tokens, self._position), state, strict=True):
                tensor.copy_(old)
            self._beat()

        warm_up(self._forward, self._tokens.device, undo=undo)
        return replace(before, tensors=[], values=[])

    def step(self, tokens: Tensor) -> Tensor:
        """Feed one token per row, (B,); return the next logits (B, V) float32, valid until the next step."""
        self.prepare()
        if self._graph is None or self._replays_left == 0:
            self._graph = None
            super().step(tokens)
            self.cache.cut_blocks()
            return self.logits
        self._replays_left -= 1
        self._tokens.copy_(tokens[:, None])
        self._graph.replay()
        self.cache.count_replayed_step()
        self.cache.cut_blocks()
        self.logits = self._graph.logits
        self._beat()
        return self.logits


class CapturedStep:
    """The step of one decoding in a CUDA graph, with all that it reads and writes: its user is who goes on in that."""

    logits: Tensor

    def __init__(self, decoding: GraphDecoding) -> None:
        # A copy of it, so that the decoding itself ends with its batch, which tells that nobody uses this any more.
        self._decoding, self._user = copy.copy(decoding), ref(decoding)
        self.cache, self.tokens, self.position = decoding.cache, decoding._tokens, decoding._position
        self._graph = captured(self._keep_logits, self.tokens.device)
        self.buffers = self.cache.step_buffers()

    def _keep_logits(self) -> None:
        self.logits = self._decoding._forward()

    def replay(self) -> None:
        """Run the step; `logits` are then those of the next token."""
        self._graph.replay()

    @property
    def is_free(self) -> bool:
        """Whether no decoding that goes on in these buffers is alive."""
        return self._user() is None

    def take(self, decoding: GraphDecoding) -> bool:
        """Let `decoding`, of the same setting, go on here and return True, if it is of the same shape."""
        given, mine = decoding.cache.step_buffers(), self.buffers
        if given is None or mine is None or not (self.is_free and mine.is_where_it_was):
            return False
        if self.tokens.shape != decoding._tokens.shape or self.position.shape != decoding._position.shape:
            return False
        if not mine.take(given):
            return False
        self.tokens.copy_(decoding._tokens)
        self.position.copy_(decoding._position)
        decoding.cache.move_into(mine)
        self._user = ref(decoding)
        return True


class CapturedSteps:
    """Steps captured for the batches of one model, kept for those to come while they take little of the memory.

    A capture takes as long as many steps. One serves all batches of a shape under a setting, one after the other; two
    that are decoded at the same time get one each. most_bytes: keys and values that are kept, of all settings; a share
    of the device's free memory if not given. What came first stays: cells take turns, so that of what was used least
    lately nothing would ever be met again.
    """

    def __init__(self, *, most_bytes: int | None = None) -> None:
        self._most_bytes = most_bytes
        self._kept: list[tuple[CacheSetting, CapturedStep]] = []

    def take(self, setting: CacheSetting, decoding: GraphDecoding) -> CapturedStep | None:
        """Return a step of `setting` in whose buffers `decoding` goes on from now on, None if there is none for it."""
        return next((step for other, step in self._kept if other == setting and step.take(decoding)), None)

    def keep(self, setting: CacheSetting, step: CapturedStep) -> None:
        """Keep a step that was captured, unless all would take too much."""
        if step.buffers is None:
            return
        kept = sum(one.buffers.num_bytes for _, one in self._kept if one.buffers is not None)
        most = self._most_bytes
        if most is None:
            most = int(_KEPT_FRACTION * (free_bytes(step.tokens.device) + kept))
        if kept + step.buffers.num_bytes <= most:
            self._kept.append((setting, step))

    def clear(self) -> None:
        """Let all go."""
        self._kept.clear()


def check_rotary(model: Any) -> None:
    """Raise ModelSupportError for rotary positions that follow the length so far: models look at it on the host."""
    kinds = getattr(getattr(model.get_decoder(), "rotary_emb", None), "rope_type", None)
    for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
        if kind in MOVING_ROTATIONS:
            raise ModelSupportError(
                f"engine=graph does not capture rotary positions of kind {kind!r}, whose angles follow the length so "
                "far; use engine=eager"
            )


def captured(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Return the graph of `work`, which `warm_up` has run before.

    Raises: what `work` raises; RuntimeError if it cannot be captured. Then the stream is the one from
    before and the graph's memory is given back, which torch does not do.
    """
    graph, pool, side = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), _side_stream(device)
    stream = torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=side), decisions_beside(device):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # the capture was ended properly: the graph gives its memory back
            torch._C._cuda_endAllocateToPool(side.device_index, pool)
            torch._C._cuda_releasePool(side.device_index, pool)
        first = error.__context__  # ending a capture that ran out of memory raises another error over it
        if first is not None and ran_out_of_memory(first):
            raise first from error
        raise
    return graph


def warm_up(work: Callable[[], object], device: torch.device, *, undo: Callable[[], None] = lambda: None) -> None:
    """Run `work` twice on the side stream, undone each time: what is set up once, then as a capture runs it.

    Raises: PolicyError if it still waits for the device the second time.
    """
    side, stream = _side_stream(device), torch.cuda.current_stream(device)
    for waiting in (contextlib.nullcontext, _forbidden):
        side.wait_stream(stream)
        with torch.cuda.stream(side), waiting(), decisions_beside(device):
            work()
        stream.wait_stream(side)
        undo()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _forbidden() -> Iterator[None]:
    """Inside, waiting for the device is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch says, once, that its mode does not find every wait
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if _WAITS not in str(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise PolicyError(
            f"a decode step waits for the device ({place.line} in {place.name}), so it cannot be captured in a CUDA "
            "graph; keep what the policy computes on the device, or use engine=eager"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
