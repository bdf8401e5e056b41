"""What a policy reads and what it answers: its `View` of one layer, the statistics it `Needs`, and its `Plan`.

Tensor letters: B rows of the batch, H KV heads, T entries in the order of storage, W window queries, D head size.
After the first eviction the order of storage is not the order of tokens: read `position`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Flag, IntEnum, auto
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from kvbench.errors import PolicyError

if TYPE_CHECKING:
    from kvbench.cache.positions import Rotation

_T = TypeVar("_T")


class Needs(Flag):
    """Attention statistics that a policy declares; what is not declared is not computed."""

    NOTHING = 0
    MASS = auto()  # attention received so far, summed over all queries
    WINDOW = auto()  # attention rows of the last queries: of the prompt, and where a block of tokens is cut
    PROBS = auto()  # attention row of the newest query
    HEAD_ROWS = auto()  # as WINDOW, of each query head by itself
    MOMENTS = auto()  # mean and covariance of the prompt's queries before rotation
    OUTPUT = auto()  # the weight of the layer's output projection
    FUTURE = auto()  # attention from tokens that are still to come, told by a task that scores tokens it knows
    PICTURE = auto()  # which entries are of a picture: only for prompts that have one
    QUESTION = auto()  # which entries are of the question: only for prompts of which it is known
    ARTEFACT = auto()  # what `kvbench calibrate` wrote for the model
    REPEATED = auto()  # attention received while the prompt is repeated, in a second pass over it
    HIDDEN = auto()  # what enters the layer's attention, of the tokens that arrive: only where `note` is asked


class Kind(IntEnum):
    """What a token is."""

    TEXT = 0
    IMAGE = 1
    SPECIAL = 2


class Doubts:
    """What must not be true of numbers on a device, noted as it comes up and looked at in one wait for all of it."""

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Callable[[], Exception]]] = []

    def note(self, flag: Tensor, error: Callable[[], Exception]) -> None:
        """Remember to raise what `error` returns if `flag`, a bool of no dimensions, is True."""
        self._noted.append((flag, error))

    def clear(self) -> None:
        """Forget what was noted."""
        self._noted.clear()

    def look(self) -> None:
        """Raise the first error noted whose flag is True, and forget all."""
        noted, self._noted = self._noted, []
        true = {
            device: torch.stack([flag for flag, _ in noted if flag.device == device]).tolist()
            for device in dict.fromkeys(flag.device for flag, _ in noted)
        }
        for flag, error in noted:
            if true[flag.device].pop(0):
                raise error()


class _MadeOnRead:
    """A slot of a dataclass for a tensor, or for what makes it, which whoever reads it first calls."""

    def __init__(self, slot: Any) -> None:
        self.slot = slot

    def __get__(self, holder: Any, owner: Any = None) -> Any:
        if holder is None:
            return self
        held = self.slot.__get__(holder)
        if not isinstance(held, Tensor):
            held = held()
            self.slot.__set__(holder, held)
        return held

    def __set__(self, holder: Any, held: Any) -> None:
        self.slot.__set__(holder, held)


def made_on_read(*names: str) -> Callable[[type[_T]], type[_T]]:
    """Let the fields `names` of a dataclass with slots be given as what makes them: few policies read all they could.

    Where heads hold different numbers, what a policy sees of keys and values is a copy, larger than what is stored.
    """

    def changed(kind: type[_T]) -> type[_T]:
        for name in names:
            setattr(kind, name, _MadeOnRead(getattr(kind, name)))
        return kind

    return changed


def unread(holder: Any, name: str) -> Any:
    """Return the tensor or what makes it, as it was given, of a field that is `made_on_read`."""
    return getattr(type(holder), name).slot.__get__(holder)


@made_on_read("keys", "values")
@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One layer's cache, read-only, with the newest tokens included; keys and values are there when they are read.

    keys, values (B, H, T, D), keys rotated where their tokens stood when they came; position (B, H, T) int64,
    the token's index in its own row (pads not counted), -1 where the slot holds nothing; kind
    (B, H, T) int8, a `Kind`; prompt, seen, budget (B,) int64: tokens of the prompt, tokens seen so
    far, entries allowed now; prompt_budget (B,) int64, entries allowed after the first prompt; row_seed
    (B,) int64, a number of the sequence for policies that draw, the same alone and in a batch.
    `new_tokens` is how many tokens came with this step (1 = decode). memory_or_none (B, H, M): what the
    policy's last plan left beside the slots. spread_or_none (B, H): where a block of generated tokens is cut and heads
    hold different numbers, what each was given beside the budget when the prompt was cut. handed: what the policy's
    `hand_over` returned in an earlier layer of this prompt, None before that and at decode. doubts: where `refuse_if`
    notes what is looked at later, None where it looks at once.
    """

    layer: int
    num_layers: int
    new_tokens: int
    prefill: bool
    prompt: Tensor
    seen: Tensor
    budget: Tensor
    prompt_budget: Tensor
    row_seed: Tensor
    keys: Tensor
    values: Tensor
    position: Tensor
    kind: Tensor
    mass_or_none: Tensor | None = None
    window_or_none: Tensor | None = None
    probs_or_none: Tensor | None = None
    memory_or_none: Tensor | None = None
    spread_or_none: Tensor | None = None
    head_rows_or_none: Tensor | None = None
    query_mean_or_none: Tensor | None = None
    query_covariance_or_none: Tensor | None = None
    rotation_or_none: Rotation | None = None
    output_weight_or_none: Tensor | None = None
    future_or_none: Tensor | None = None
    picture_or_none: Tensor | None = None
    question_or_none: Tensor | None = None
    handed: Tensor | None = None
    artefact_or_none: Mapping[str, Tensor] | None = None
    repeated_or_none: Tensor | None = None
    hidden_or_none: Tensor | None = None
    noted_or_none: Tensor | None = None
    doubts: Doubts | None = None

    def refuse_if(self, flag: Tensor, error: Callable[[], Exception]) -> None:
        """Raise what `error` returns if `flag`, a bool of no dimensions, is True: at the end of the pass, or now."""
        if self.doubts is not None:
            self.doubts.note(flag, error)
        elif bool(flag):
            raise error()

    @property
    def valid(self) -> Tensor:
        """(B, H, T) bool: the slot holds a token."""
        return self.position >= 0

    @property
    def mass(self) -> Tensor:
        """(B, H, T) float32: attention received from every query so far, reduced to KV heads."""
        return _declared(self.mass_or_none, "MASS")

    @property
    def window(self) -> Tensor:
        """(B, H, W, T) float32: attention rows of the last W queries, where a prompt or a block of tokens is cut."""
        return _declared(self.window_or_none, "WINDOW")

    @property
    def head_rows(self) -> Tensor:
        """(B, H, G, W, T) float32: attention rows of the last W queries, of each of a KV head's G query heads."""
        return _declared(self.head_rows_or_none, "HEAD_ROWS")

    @property
    def query_mean(self) -> Tensor:
        """(B, H, G, D) float32: mean of the prompt's queries before rotation, without the first `moments_from`."""
        return _declared(self.query_mean_or_none, "MOMENTS")

    @property
    def query_covariance(self) -> Tensor:
        """(B, H, G, D, D) float32: covariance of the same queries, over their number."""
        return _declared(self.query_covariance_or_none, "MOMENTS")

    @property
    def rotation(self) -> Rotation:
        """How the model rotates queries and keys, by which means can be turned to a place."""
        return _declared(self.rotation_or_none, "MOMENTS")

    @property
    def output_weight(self) -> Tensor:
        """(H, G, D, E): the output projection of each query head, from its D numbers to the model's E; a view of it."""
        return _declared(self.output_weight_or_none, "OUTPUT")

    @property
    def future(self) -> Tensor:
        """(B, H, T) float32: attention that entries will receive in the full cache from the tokens that are scored."""
        return _declared(self.future_or_none, "FUTURE")

    @property
    def picture(self) -> Tensor:
        """(B, H, T) bool: the entry is a token of a picture."""
        return _declared(self.picture_or_none, "PICTURE")

    @property
    def question(self) -> Tensor:
        """(B, H, T) bool: the entry is of the question, or of what the chat template writes after it.

        Once a further chunk has come (a question that was hidden, a later turn), it is that chunk.
        """
        return _declared(self.question_or_none, "QUESTION")

    @property
    def text(self) -> Tensor:
        """(B, H, T) bool: the entry is of the prompt's text, its question included."""
        return self.valid & (self.position < self.prompt[:, None, None]) & ~self.picture

    @property
    def artefact(self) -> Mapping[str, Tensor]:
        """The tensors by name that the policy learnt of this layer offline."""
        return _declared(self.artefact_or_none, "ARTEFACT")

    @property
    def repeated(self) -> Tensor:
        """(B, H, T) float32: the largest attention received, of any query head, while the prompt is repeated."""
        return _declared(self.repeated_or_none, "REPEATED")

    @property
    def hidden(self) -> Tensor:
        """(B, T, E): what the layer's attention is given, and its projections see, of the tokens that arrive.

        That is after the layer's norm, in the model's dtype. Only the view that `note` gets has it.
        """
        return _declared(self.hidden_or_none, "HIDDEN")

    @property
    def noted(self) -> Tensor:
        """(B, H, T) float32: what the policy's `note` made of each entry when it came."""
        if self.noted_or_none is None:
            raise PolicyError("the policy reads view.noted, but its class has no `note` that returns a number an entry")
        return self.noted_or_none

    @property
    def probs(self) -> Tensor:
        """(B, H, T) float32: attention row of the newest query."""
        return _declared(self.probs_or_none, "PROBS")


def _declared(statistic: _T | None, name: str) -> _T:
    if statistic is None:
        raise PolicyError(
            f"the policy reads Needs.{name}, which it did not declare or which this phase does not have. "
            f"Add `needs: ClassVar[Needs] = Needs.{name}` to the class"
        )
    return statistic


class ReadOnly(TorchDispatchMode):
    """Inside, an operation that writes into a tensor of `view` raises PolicyError: it is the memory of the cache.

    It looks at the operations, not at numbers, so nothing waits for the device; each takes some microseconds more.
    """

    def __init__(self, view: View, asked: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        shown = {one.name.removesuffix("_or_none"): getattr(view, one.name) for one in fields(view)}
        self._names = {storage_id(one): name for name, one in shown.items() if isinstance(one, Tensor)}
        self._layer, self._asked = view.layer, asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = func._schema.arguments if isinstance(func, OpOverload) else []
        given = {**dict(zip((one.name for one in arguments), args, strict=False)), **(kwargs or {})}
        for argument in arguments:
            written = given.get(argument.name)
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(written, Tensor) and storage_id(written) in self._names:
                raise PolicyError(
                    f"view.{self._names[storage_id(written)]} is changed in layer {self._layer}: {self._asked} writes "
                    f"into it by {func._schema.name.removeprefix('aten::')}; work on a copy"
                )
        return func(*args, **(kwargs or {}))


def storage_id(tensor: Tensor) -> int:
    """Return what tells a tensor's storage, which views of it share, from others that are alive."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which entries stay after a prompt, and where the others go.

    keep (B, H, T) bool; merge_into (B, H, T) int64, the index of the survivor whose mean each entry
    joins (its own index: none), or None when dropped entries are simply freed. Three more are for code
    whose books do not follow its tokens: merge_source (B, H, T) int64, whose key and value each entry
    brings into its bucket (None: its own); mass (B, H, T), the mass that entries go on with; memory
    (B, H, M), kept beside the slots as it is until a later plan gives another one.

    Without merge_weight a survivor becomes the plain mean of its bucket. With it, (B, H, T) float, it becomes the sum
    of what its bucket brings, each times its weight, its own too. merge_keys, merge_values: False leaves the survivors'
    own. values (B, H, T, D): what entries go on with, for a merge into several; None: their own.
    """

    keep: Tensor
    merge_into: Tensor | None = None
    merge_source: Tensor | None = None
    mass: Tensor | None = None
    memory: Tensor | None = None
    merge_weight: Tensor | None = None
    merge_keys: bool = True
    merge_values: bool = True
    values: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """What the entry that a decode step frees leaves in others.

    into (B, H, M) int64: slots, none twice in a head; weight, own (B, H, M): each becomes `own` times its value and
    `weight` times that of the entry that goes, and its key too if `keys`. One of weight 0 and own 1 stays as it is,
    whatever slot is named. memory (B, H, N) or None: what is remembered from now on in heads that free an entry.
    """

    into: Tensor
    weight: Tensor
    own: Tensor
    keys: bool = True
    memory: Tensor | None = None
