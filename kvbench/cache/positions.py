"""Position modes: where a new token stands relative to what is left in the cache.

`original`: every token at its true position. `in_cache`: positions are ranks inside the cache, as StreamingLLM defines
them (arXiv 2309.17453, Sec. 3.2). Stored keys stay as the model rotated them; each step turns a temporary copy in
float32 by (wanted - original), because stepwise rotation in place diverges (relative error 6.7 after 2000 steps in
bfloat16). `released`: as Elastic Cache's code has it. Prompt tokens stand where they are; a later token stands at the
number of entries that the first layer held when it came, for query and key alike and for good. So after an eviction
it stands before much of the context, and several tokens share a place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kvbench.cache.selection import age_rank
from kvbench.errors import ModelSupportError
from kvbench.kernels.dispatch import Chunk

PositionMode = Literal["original", "in_cache", "released"]
POSITION_MODES: tuple[str, ...] = get_args(PositionMode)
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_HALF_SPLIT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # others may rotate neighbouring pairs
_GRID_FAMILIES = ("qwen2_5_vl_text", "qwen3_vl_text")  # time, row and column of a picture's token


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """Rotary embedding of the half-split kind (Llama, Qwen, Mistral); frequencies (D / 2,).

    most_tokens: up to how many tokens of a row the frequencies hold, None for any number.
    """

    frequencies: Tensor
    most_tokens: int | None = None
    _elsewhere: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> Tensor:
        """Return the frequencies on `device`, copied there once: a step that copied would break a capture."""
        if device == self.frequencies.device:
            return self.frequencies
        if device not in self._elsewhere:
            self._elsewhere[device] = self.frequencies.to(device)
        return self._elsewhere[device]

    def turn(self, states: Tensor, by: Tensor) -> Tensor:
        """Return `states` (..., T, D) turned by `by` (..., T) positions, in the dtype of `states`."""
        angles = by[..., None].float() * self.on(by.device)
        cos, sin = angles.cos(), angles.sin()
        half = self.frequencies.shape[0]
        first, second, rest = states.float().tensor_split((half, 2 * half), dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
        return turned.to(states.dtype)

    def tables(self, num_positions: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (num_positions, D / 2) float32 on `device` of turning by 0, 1, ... positions."""
        frequencies = self.frequencies if device is None else self.on(device)
        by = torch.arange(num_positions, device=frequencies.device)
        angles = by[:, None].float() * frequencies
        return angles.cos(), angles.sin()


def rotation_of(decoder: Any, mode: str = "in_cache") -> Rotation:
    """Return the rotation of a transformers decoder, for the position mode `mode`.

    One that is fixed up to its training length says so itself (`fixed_rotation`, the original Qwen-VL).
    Raises: ModelSupportError where positions are not one fixed rotation (M-RoPE, dynamic NTK, LongRoPE,
    rotary frequencies per layer type), or pairs may not be half-split.
    """
    rotary = getattr(decoder, "rotary_emb", None)
    fixed_rotation = getattr(rotary, "fixed_rotation", None)
    if fixed_rotation is not None:
        frequencies, most_tokens = fixed_rotation()
        return Rotation(frequencies=frequencies, most_tokens=most_tokens)
    config = decoder.config
    rope = getattr(config, "rope_parameters", None) or {}
    kind = getattr(rotary, "rope_type", None)
    if config.model_type in _GRID_FAMILIES:
        raise ModelSupportError(
            f"positions=in_cache is not defined for {config.model_type!r}: a picture's token stands at a time, a row "
            "and a column, and ranks in the cache have one axis. Use positions=original"
        )
    if rotary is None or not hasattr(rotary, "inv_freq") or kind not in FIXED_ROPE_TYPES or "mrope_section" in rope:
        raise ModelSupportError(
            f"positions={mode} needs one fixed rotary embedding; {type(decoder).__name__} has rope type {kind!r}. "
            "Use positions=original"
        )
    if config.model_type not in _HALF_SPLIT_FAMILIES:
        raise ModelSupportError(
            f"positions={mode} is implemented for {', '.join(_HALF_SPLIT_FAMILIES)}; the decoder is of family "
            f"{config.model_type!r}. Use positions=original"
        )
    return Rotation(frequencies=rotary.inv_freq.detach().float())


@dataclass(kw_only=True, slots=True)
class Places:
    """Where the tokens of a pass stand in positions=released; one object for the layers of a cache.

    transformers 4.31, which that code ran on, takes the length of the first layer's cache for the
    position of a new token in every layer. `by` (B,) is that length minus the true position, on the first
    layer's device, and copied to the others once a pass.
    """

    rotation: Rotation
    by: Tensor | None = None
    _elsewhere: dict[torch.device, Tensor] = field(default_factory=dict)

    def arrive(self, keys: Tensor, layer: int, length: Tensor, seen: Tensor) -> Tensor:
        """Return new keys (B, H, Q, D) where they stand from now on.

        length (B, H) is what the layer holds and seen (B,) what came, both before these tokens.
        """
        if layer == 0 or self.by is None:
            self.by = length.amax(dim=-1) - seen
            self._elsewhere.clear()
        return self.turned(keys)

    def turned(self, states: Tensor) -> Tensor:
        """Return the states (B, H, Q, D) of the tokens that arrived last where these stand."""
        assert self.by is not None
        by = self.by
        if states.device != by.device:
            if states.device not in self._elsewhere:
                self._elsewhere[states.device] = by.to(states.device)
            by = self._elsewhere[states.device]
        return self.rotation.turn(states, by[:, None, None].expand(states.shape[:3]))


def shifted_step(query: Tensor, keys: Tensor, position: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
    """Return query (B, Hq, 1, D) and keys (B, H, C, D) at their ranks; as they are without a rotation."""
    if rotation is None:
        return query, keys
    last_rank = (position >= 0).sum(dim=-1) - 1
    batch, heads, _, width = keys.shape
    grouped = query.reshape(batch, heads, -1, width)
    turned = rotation.turn(grouped, (last_rank - position.amax(dim=-1))[..., None])
    return turned.reshape(query.shape), rotation.turn(keys, age_rank(position) - position)


def shifted_chunk(chunk: Chunk, rotation: Rotation | None) -> Chunk:
    """Return a chunk whose stored and new tokens stand at their ranks; as it is without a rotation."""
    if rotation is None or chunk.stored == 0:
        return chunk
    by = age_rank(chunk.key_position) - chunk.key_position
    query_by = by[..., chunk.stored :].repeat_interleave(chunk.group, dim=1)
    return replace(chunk, query=rotation.turn(chunk.query, query_by), keys=rotation.turn(chunk.keys, by))
