"""Offline artefacts: what a policy learnt of a model from calibration data, in one safetensors file.

A policy that needs one derives from `Calibrated` and says three things: which tensors there are of a layer (`shapes`),
what of calibration data is summed up (`gather`), and what is made of the sums (`learn`). `kvbench calibrate` writes the
file; where a policy decides it reads `view.artefact`. Nothing is unpickled. By whom, of which model and from which data
a file was made stands in its header, as one JSON text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvbench.cache.policy import Policy, needs_of
from kvbench.cache.positions import Rotation
from kvbench.cache.view import Needs
from kvbench.errors import ConfigError, ModelSupportError, PolicyError

SUFFIX = ".safetensors"
_ABOUT = "kvbench_artefact"
_VERSION = 1
_LENGTH_BYTES = 8
_T = TypeVar("_T")
_AGAIN = "write it again with kvbench calibrate"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Layers of a model, and in each: KV heads, query heads that share one, numbers of a key, and of a hidden state."""

    num_layers: int
    num_heads: int
    group: int
    width: int
    hidden: int = 0

    @classmethod
    def of(cls, model: Any) -> Layout:
        """Return the layout of a transformers model."""
        config = model.config.get_text_config()
        queries, heads = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // queries
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            group=queries // heads,
            width=width,
            hidden=config.hidden_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One layer of a batch of calibration data.

    query (B, Hq, T, D) and keys (B, H, T, D), as the model rotated them; position (B, T) int64, -1 at pads. rotation:
    None where it cannot be taken back. hidden (B, T, E) and repeated (B, H, T), as in a `View`: for policies whose
    `learns_from` names HIDDEN, REPEATED.
    """

    query: Tensor
    keys: Tensor
    position: Tensor
    rotation: Rotation | None
    hidden_or_none: Tensor | None = None
    repeated_or_none: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """(B, T, E): what the layer's attention is given."""
        return _learnt_from(self.hidden_or_none, "HIDDEN")

    @property
    def repeated(self) -> Tensor:
        """(B, H, T) float32: the largest attention that tokens receive while the prompt is repeated."""
        return _learnt_from(self.repeated_or_none, "REPEATED")

    @property
    def real(self) -> Tensor:
        """(B, T) bool: no pad."""
        return self.position >= 0

    def unrotated(self, states: Tensor) -> Tensor:
        """Return query or keys before rotation, float32. Raises: ModelSupportError where that is not to be had."""
        if self.rotation is None:
            raise ModelSupportError(
                "the policy learns from queries and keys before rotation, and the model does not rotate by one fixed "
                "embedding that could be taken back; choose another policy or model"
            )
        by = -self.position.clamp(min=0)[:, None]
        return self.rotation.turn(states.float(), by.expand(states.shape[:3]))


def _learnt_from(given: Tensor | None, name: str) -> Tensor:
    if given is None:
        raise PolicyError(f"the policy learns from {name}, which it did not declare; add Needs.{name} to `learns_from`")
    return given


@dataclass(frozen=True, kw_only=True)
class Calibrated(Policy):
    """A policy that reads an artefact. artefact: its file; None for the one in the user's cache folder.

    learns_from: what it is told in calibration beyond queries and keys: HIDDEN, and REPEATED, for which each prompt is
    repeated in a second pass, in the way of the class flags `repeat_tokens` and `repeated_as`.
    """

    needs: ClassVar[Needs] = Needs.ARTEFACT
    learns_from: ClassVar[Needs] = Needs.NOTHING

    artefact: str | None = None

    def shapes(self, layout: Layout) -> Mapping[str, tuple[int, ...]]:
        """Return the tensors of a layer by name, each with its shape."""
        raise NotImplementedError(f"{type(self).__name__} must define shapes(layout)")

    def gather(self, sample: Sample) -> Mapping[str, Tensor]:
        """Return what of a batch is added up over all batches, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define gather(sample)")

    def together(self, before: Tensor, more: Tensor) -> Tensor:
        """Return what two batches' tensors of one name make: their sum, unless a policy keeps its examples apart."""
        return before + more

    def learn(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors of a layer, float32, from what `gather` gave in all."""
        raise NotImplementedError(f"{type(self).__name__} must define learn(sums)")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What a policy reads: tensors by name of each layer; on a device they are copied to it once."""

    layers: Sequence[Mapping[str, Tensor]]
    _elsewhere: dict[tuple[int, torch.device], Mapping[str, Tensor]] = field(default_factory=dict, init=False)

    def of_layer(self, layer: int, device: torch.device) -> Mapping[str, Tensor]:
        """Return the tensors of a layer on `device`; a captured step copies nothing, as its prompt came before."""
        if device.type == "cpu":
            return self.layers[layer]
        if (layer, device) not in self._elsewhere:
            self._elsewhere[layer, device] = {name: one.to(device) for name, one in self.layers[layer].items()}
        return self._elsewhere[layer, device]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtefactFile:
    """A file as it was read: what it says of itself, its tensors by `layers.N.NAME`, the SHA-256 of its bytes."""

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    sha256: str


def artefact_bytes(layers: Sequence[Mapping[str, Tensor]], about: Mapping[str, Any]) -> bytes:
    """Return the content of a file; the same for the same tensors and the same `about`, which JSON must hold."""
    text = json.dumps({"version": _VERSION, **about}, sort_keys=True)
    tensors = {name: one.detach().cpu().clone() for name, one in named_tensors(layers).items()}
    return save(tensors, metadata={_ABOUT: text})


def named_tensors(layers: Sequence[Mapping[str, _T]]) -> dict[str, _T]:
    """Return what each layer has by the names that a file gives it, `layers.N.NAME`."""
    return {f"layers.{number}.{name}": one for number, layer in enumerate(layers) for name, one in layer.items()}


def read_artefact(path: Path) -> ArtefactFile:
    """Return what a file holds, read once while it does not change. Raises: ConfigError, one line."""
    try:
        state = path.stat()
        return _read(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise ConfigError(f"the artefact {path} cannot be read ({error.strerror}); {_AGAIN}") from error


@lru_cache(maxsize=16)
def _read(path: Path, size_bytes: int, changed_ns: int) -> ArtefactFile:
    raw = path.read_bytes()
    try:
        tensors = load(raw)
        end = _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")
        about = json.loads(json.loads(raw[_LENGTH_BYTES:end])["__metadata__"][_ABOUT])
        version = about["version"]
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"the artefact {path} is not a whole file of kvbench calibrate ({size_bytes} bytes; "
            f"{type(error).__name__}: {' '.join(str(error).split())[:80]}); {_AGAIN}"
        ) from error
    if version != _VERSION:
        raise ConfigError(f"the artefact {path} is of version {version!r:.20}; this kvbench reads {_VERSION}; {_AGAIN}")
    return ArtefactFile(about=about, tensors=tensors, sha256=hashlib.sha256(raw).hexdigest())


def checked_layers(policy: Calibrated, tensors: Mapping[str, Tensor], layout: Layout, told: str) -> Artefact:
    """Return the tensors layer by layer. Raises: ConfigError unless each is there, of its shape, and finite."""
    shapes = policy.shapes(layout)
    wanted = named_tensors([shapes] * layout.num_layers)
    for name in (*wanted, *tensors):
        shape, asked = tuple(tensors[name].shape) if name in tensors else None, wanted.get(name)
        if shape != asked:
            raise ConfigError(
                f"{told} has {name} of shape {shape}, and {type(policy).__name__} reads {asked} of this model (None: "
                f"not there); {_AGAIN} for this model"
            )
        if not bool(tensors[name].isfinite().all()):
            raise ConfigError(f"{told} has numbers in {name} that are not finite; {_AGAIN}")
    numbered = range(layout.num_layers)
    return Artefact(layers=[{name: tensors[f"layers.{n}.{name}"] for name in shapes} for n in numbered])


def artefact_of(model: Any, policy: Policy) -> Artefact | None:
    """Return what `policy` reads of its file for `model`; None for a policy that needs nothing of the kind.

    Raises: ConfigError for a file that is missing, torn, or of another shape than the model's.
    """
    if Needs.ARTEFACT not in needs_of(policy):
        return None
    kind = type(policy).__name__
    if not isinstance(policy, Calibrated):
        raise ConfigError(f"{kind} declares Needs.ARTEFACT, but does not derive from Calibrated; let it do so")
    if policy.artefact is None:
        raise ConfigError(
            f"{kind} needs an artefact and policy.artefact is not given; give the file that kvbench calibrate wrote"
        )
    return _read_by(policy, Layout.of(model), read_artefact(Path(policy.artefact)).sha256)


@lru_cache(maxsize=16)
def _read_by(policy: Calibrated, layout: Layout, sha256: str) -> Artefact:
    """Return the one artefact of all caches, so that it is copied to a device once."""
    path = Path(policy.artefact or "")
    return checked_layers(policy, read_artefact(path).tensors, layout, f"the artefact {path}")
