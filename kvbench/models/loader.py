"""Load a checkpoint, or build a model of random weights, and put kvbench's attention on its text part.

What a decode step costs in time and memory does not depend on the values of the weights, so speed and memory of an
architecture can be measured without downloading it: a model of a written configuration has no checkpoint, no
tokenizer and no copy on the CPU. Of a checkpoint every tensor must be that of its config, told by name, since what
lacks would be random numbers.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError

from kvbench.errors import ConfigError, ModelSupportError, close_matches
from kvbench.models.chat import TextTokens, default_template, end_token_written
from kvbench.models.devices import chosen_devices, free_bytes, gathered, place_of, placement, spread
from kvbench.models.gguf import SUFFIX as GGUF_SUFFIX
from kvbench.models.gguf import dense_tensors, in_halves, parsed_once, read_gguf, tensor_names
from kvbench.models.spec import (
    FAMILIES,
    LLAVA_V1,
    PORTED_FAMILIES,
    PROMPTS,
    TEXT_FAMILIES,
    VISION_FAMILIES,
    ModelSpec,
    check_hub_code,
    check_weight_files,
    some_names,
)

_STANDARD_DEVIATION = 0.02
_MOST_UNPACKED = 8  # tensors of a GGUF file at once; more threads wait for each other
# Computed from the config, never learned; older checkpoints carry them, of the port's family too.
_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "logn_tensor", "masked_bias")


def nobody_watches() -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run: `processor` is the full processor or the tokenizer alone.

    Random weights come without either: both are None. declared_ends: the end tokens that generation_config.json and
    config.json of the checkpoint name. beat: called after every pass of the model by what runs it, for a watchdog; it
    costs next to nothing. spread_over: the devices that the layers lie on, where there are several; `device` is the
    first of them, which inputs are given to and logits come from.
    """

    model: Any
    processor: Any
    tokenizer: Any
    device: torch.device
    image_token_id: int | None
    beat: Callable[[], None] = nobody_watches
    declared_ends: tuple[int, ...] = ()
    spread_over: tuple[torch.device, ...] = ()

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device that the model lies on."""
        return self.spread_over or (self.device,)

    @property
    def takes_images(self) -> bool:
        """Whether a picture can be part of the prompt."""
        return self.image_token_id is not None

    @property
    def chat_template(self) -> str | None:
        """The template of every chat; None where the checkpoint has none."""
        return getattr(self.processor, "chat_template", None) or None

    @cached_property
    def text(self) -> TextTokens:
        """How text becomes tokens. Those that the model has no embedding of are refused: ModelSupportError."""
        return TextTokens(self.tokenizer, self.chat_template, self._check_known)

    def _check_known(self, tokens: Sequence[int]) -> None:
        size = self.model.config.get_text_config().vocab_size
        if max(tokens, default=0) < size:
            return
        wrong = next((token for token in tokens if token >= size and token != self.image_token_id), None)
        if wrong is not None:
            word = self.tokenizer.convert_ids_to_tokens(wrong)
            raise ModelSupportError(
                f"the tokenizer writes token {wrong} ({word!r}), but the model knows {size} tokens; give the tokenizer "
                "files that belong to the weights, or download them again"
            )

    @cached_property
    def eos_token_id(self) -> int:
        """The token that ends a reference answer: what the chat template writes there, else the tokenizer's end token.

        Of a model without tokenizer, what its config says. Raises: ModelSupportError if neither names one.
        """
        if self.tokenizer is not None:
            written = end_token_written(self)
            chosen = int(self.tokenizer.eos_token_id) if written is None else written
            self._check_known([chosen])
            return chosen
        end = self.model.config.get_text_config().eos_token_id
        first = end[0] if isinstance(end, list) else end
        if first is None:
            raise ModelSupportError("neither a tokenizer nor the config names an end token")
        return int(first)

    @cached_property
    def end_token_ids(self) -> frozenset[int]:
        """Every token that ends a generated answer: the declared ones, the tokenizer's, the template's.

        Raises: ModelSupportError if there is none.
        """
        tokenizer_end = set() if self.tokenizer is None else {int(self.tokenizer.eos_token_id)}
        return frozenset({*self.declared_ends, *tokenizer_end, self.eos_token_id})


def load_model(spec: ModelSpec, device: str) -> LoadedModel:
    """Load `spec` onto `device`, which becomes the current one, or over its `devices`, of which that is the first.

    Raises: ModelSupportError for a family that is not supported, or weights that fit no split.
    """
    if spec.devices == "auto":
        spec = replace(spec, devices=chosen_devices("auto", torch.cuda.device_count()))
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:  # what names no device, such as a kernel's launch, uses this
        torch.cuda.set_device(where)
    if spec.is_random:
        return _random(spec, where)
    return _checkpoint(spec, where) if spec.gguf is None else _gguf(spec, spec.gguf, where)


def _ready(model: Any, spec: ModelSpec, device: torch.device, places: Mapping[str, int] | None) -> Any:
    from kvbench.cache import attach  # needs transformers' models, as the next does: seconds, for who checks cells too

    attach(model)
    if spec.fused and device.type == "cuda":
        from kvbench.models.fused import fuse

        fuse(model)
    return model.to(device).eval() if places is None else spread(model.eval(), places, device.index)


def _devices(spec: ModelSpec) -> tuple[torch.device, ...]:
    return tuple(torch.device("cuda", number) for number in spec.devices or () if isinstance(number, int))


def _places(spec: ModelSpec, config: Any, *, vision: bool, **options: Any) -> dict[str, int] | None:
    """Return where the blocks of the model of `config` go, told from its sizes alone; None for a single device."""
    devices = _devices(spec)
    if not devices:
        return None
    shape = empty_model(config, vision=vision, dtype=getattr(torch, spec.dtype), **options)
    return _placed(shape, devices, told=spec.checkpoint)


def _placed(model: Any, devices: Sequence[torch.device], *, told: object) -> dict[str, int]:
    return placement(model, {one.index: free_bytes(one) for one in devices}, told=f"model.checkpoint {told}")


def _random(spec: ModelSpec, device: torch.device) -> LoadedModel:
    config = architecture(spec.known_config() or {})
    vision = config.model_type in VISION_FAMILIES
    places = _places(spec, config, vision=vision)
    of = {"vision": vision, "dtype": getattr(torch, spec.dtype), "seed": spec.weights_seed}
    model = random_model(config, **of, device=device, places=places)
    return LoadedModel(
        model=_ready(model, spec, device, places),
        processor=None,
        tokenizer=None,
        device=device,
        image_token_id=config.image_token_id if vision else None,
        spread_over=_devices(spec),
    )


def architecture(config: Mapping[str, Any]) -> Any:
    """Return the transformers config of `config`, its fields by name, `model_type` among them.

    Raises: ConfigError for a field that the family does not have, which transformers would keep unread.
    """
    transformers = importlib.import_module("transformers")
    fields = dict(config)
    try:
        made = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    except Exception as error:  # transformers and its validators raise many kinds
        raise ConfigError(f"model.config makes no model: {' '.join(str(error).split())}") from error
    _check_fields(made, fields, "model.config")
    return made


def _check_fields(made: Any, fields: Mapping[str, Any], path: str) -> None:
    default = type(made)()
    for name, value in fields.items():
        if not hasattr(default, name):
            raise ConfigError(
                f"{path}.{name} is no field of {type(made).__name__}; {close_matches(name, vars(default))}"
            )
        if isinstance(value, Mapping) and name.endswith("_config"):
            _check_fields(getattr(made, name), value, f"{path}.{name}")


def empty_model(config: Any, *, vision: bool, dtype: torch.dtype, **options: Any) -> Any:
    """Return the model of a transformers config with its weights on "meta" and real buffers; needs accelerate."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _auto(vision).from_config(config, dtype=dtype, **options)
    model.tie_weights()  # what was tied inside was made anew
    return model


def _auto(vision: bool) -> Any:
    transformers = importlib.import_module("transformers")
    return transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM


def random_model(
    config: Any,
    *,
    vision: bool,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    places: Mapping[str, int] | None = None,
) -> Any:
    """Return the model of a transformers config, built on `device` in `dtype` and filled there.

    Norms are the identity, everything else is normal with deviation 0.02, drawn from `seed`: the same
    device gives the same weights, another kind of device others. Buffers (rotary frequencies) are real.
    On the device "meta" nothing is allocated, which serves to count parameters. places: the device number of each
    block where they lie on several of the kind of `device`; every weight is made where it stays, the same as on one.
    """
    if places is None:
        with device:
            model = _auto(vision).from_config(config, dtype=dtype)
    else:
        model = empty_model(config, vision=vision, dtype=dtype)
    if device.type == "meta":
        return model
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    identity = {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, torch.nn.Parameter] = {}
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):  # a tied one is met once
            if places is None:
                where, filled = device, parameter
            else:
                where = torch.device(device.type, place_of(name, places))
                filled = torch.nn.Parameter(torch.empty_like(parameter, device=where))
            made[id(parameter)] = filled
            if id(parameter) in identity:
                filled.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            if where != generator.device:  # another device goes on in the same stream of numbers
                generator = torch.Generator(where).set_state(generator.get_state())
            filled.normal_(std=_STANDARD_DEVIATION, generator=generator)
    for module in model.modules() if places is not None else ():
        module._parameters |= {name: made[id(old)] for name, old in module._parameters.items() if old is not None}
    return model


def _checkpoint(spec: ModelSpec, device: torch.device) -> LoadedModel:
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()  # the sweep has its own
    source = str(spec.folder or spec.checkpoint)
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    if spec.trust_remote_code and spec.folder is None:
        check_hub_code(source, spec.revision)
    try:
        fields, _ = transformers.PretrainedConfig.get_config_dict(source, **options)
        if fields.get("model_type") in PORTED_FAMILIES:  # only then, because it takes seconds
            importlib.import_module("kvbench.models.qwen_vl")  # registers the family that transformers does not have
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except ValueError as error:  # an unknown family, or one whose code is not trusted
        raise ModelSupportError(
            f"{source} is of a family that transformers does not know; supported: {', '.join(FAMILIES)}, others "
            "only with model.trust_remote_code=true, which runs code of the checkpoint"
        ) from error
    except OSError as error:  # no such checkpoint on the hub, no network, or no config.json in it
        raise _not_loaded(source, error) from error
    family = config.model_type
    if family not in FAMILIES and not spec.trust_remote_code:
        raise ModelSupportError(f"{source} is of family {family!r}; supported: {', '.join(FAMILIES)}")
    vision = family in VISION_FAMILIES
    if spec.folder is not None:
        check_weight_files(spec.folder)
    trusted = {"trust_remote_code": True} if spec.trust_remote_code else {}
    places = _places(spec, config, vision=vision, **trusted)
    placed = {} if places is None else {"device_map": places}
    model = _whole_model(_auto(vision), source, getattr(torch, spec.dtype), {**options, **placed}, told=source)
    model = model if places is None else gathered(model)
    try:
        processor = _processor(source, model, spec.prompt, options)
    except (OSError, ValueError) as error:  # a file of tokenizer or processor that is missing or of another form
        raise _not_loaded(source, error) from error
    return LoadedModel(
        model=_ready(model, spec, device, places),
        processor=processor,
        tokenizer=processor.tokenizer if vision else processor,
        device=device,
        image_token_id=config.image_token_id if vision else None,
        declared_ends=tuple(sorted(set(_declared_ends(source, options)))),
        spread_over=_devices(spec),
    )


def _gguf(spec: ModelSpec, path: Path, device: torch.device) -> LoadedModel:
    """Load all of a GGUF file, dequantised; nothing that lies beside it is read for a part of the model."""
    transformers = importlib.import_module("transformers")
    options = {"gguf_file": "model.gguf"}
    with TemporaryDirectory() as alone:
        (Path(alone) / options["gguf_file"]).symlink_to(path.resolve())
        try:
            with parsed_once(path):
                config = transformers.AutoConfig.from_pretrained(alone, **options)
                model = _dense_model(path, config, getattr(torch, spec.dtype))
                tokenizer = _processor(alone, model, spec.prompt, options)
        except (OSError, ValueError, LookupError, NotImplementedError) as error:  # what transformers makes of the file
            raise _not_loaded(str(path), error) from error
    devices = _devices(spec)
    places = _placed(model, devices, told=path) if devices else None  # dequantised on the host
    return LoadedModel(
        model=_ready(model, spec, device, places),
        processor=tokenizer,
        tokenizer=tokenizer,
        device=device,
        image_token_id=None,
        spread_over=devices,
        declared_ends=read_gguf(path, TEXT_FAMILIES).end_tokens,
    )


def _dense_model(path: Path, config: Any, dtype: torch.dtype) -> Any:
    """Return the model of a GGUF file's `config` with the file's tensors.

    transformers would unpack one after the other, and copy each: two thirds of what loading took.
    """
    model = empty_model(config, vision=False, dtype=dtype)
    asked = dict(model.named_parameters())  # a tied one once, by its first name
    family = read_gguf(path, TEXT_FAMILIES).family
    names = tensor_names(family, config.num_hidden_layers, asked)
    of_heads = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}

    def take(name: str, dense: Any) -> tuple[str, torch.Tensor]:
        whole = in_halves(name, dense, **of_heads) if family == "llama" else dense
        return names.get(name, name), torch.from_numpy(whole).to(dtype)

    found = dict(dense_tensors(path, take, num_threads=min(torch.get_num_threads(), _MOST_UNPACKED)))
    shapes = {name: (tensor.shape, asked[name].shape) for name, tensor in found.items() if name in asked}
    info = {
        "missing_keys": asked.keys() - found.keys(),
        "unexpected_keys": found.keys() - asked.keys(),
        "mismatched_keys": [(name, *both) for name, both in shapes.items() if both[0] != both[1]],
    }
    check_loaded(str(path), info)
    model.load_state_dict(found, strict=False, assign=True)  # not strict: a tied tensor has a second name
    model.tie_weights()
    return model


def _whole_model(auto: Any, source: str, dtype: torch.dtype, options: Mapping[str, Any], *, told: str) -> Any:
    """Return the model of `source`, every tensor of it from the checkpoint, which messages call `told`.

    Shapes that differ are let through, so that they are told by name and in one line with all the rest.
    """
    log = importlib.import_module("transformers").utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()  # its table of the same names
    try:
        model, info = auto.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    # A file of a hub's checkpoint that is missing or broken, or a quantisation that is unknown or not installed.
    except (OSError, SafetensorError, ImportError, ValueError) as error:
        raise _not_loaded(told, error) from error
    finally:
        log.set_verbosity(level)
    check_loaded(told, info)
    return model


def check_loaded(source: str, info: Mapping[str, Any]) -> None:
    """Raise ModelSupportError if a tensor was missing, left over or of another shape when `source` was loaded.

    info: transformers' loading info; it leaves tied weights out by itself.
    """
    asks, remedy = "config.json", "give the config.json that belongs to the weights, or download it again"
    if source.lower().endswith(GGUF_SUFFIX):
        asks, remedy = "header", "download it again"
    mismatched = {name: (found, asked) for name, found, asked in info["mismatched_keys"]}
    missing = _learned(name for name in info["missing_keys"] if name not in mismatched)
    left_over = _learned(info["unexpected_keys"])
    problems = []
    if mismatched:
        told = [
            f"{name} is {_shape(found)}, not {_shape(asked)}" for name, (found, asked) in sorted(mismatched.items())
        ]
        problems.append(f"holds {_tensors(told)} of other shapes than its {asks} asks for ({some_names(told)})")
    if missing:
        problems.append(f"lacks {_tensors(missing)} that its {asks} asks for ({some_names(missing)})")
    if left_over:
        names = some_names(left_over)
        problems.append(f"holds {_tensors(left_over)} that the model of its {asks} does not have ({names})")
    if problems:
        raise ModelSupportError(
            f"model.checkpoint {source} {', and '.join(problems)}, so a part of the model would be random numbers; "
            f"{remedy}"
        )


def _learned(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.endswith(_BUFFERS))


def _tensors(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _not_loaded(source: str, error: Exception) -> ModelSupportError:
    return ModelSupportError(f"model.checkpoint {source} cannot be loaded ({' '.join(str(error).split())})")


def _declared_ends(source: str, options: Mapping[str, Any]) -> Iterator[int]:
    """Yield the end tokens that the files of a checkpoint name. Raises: ModelSupportError for what is no number.

    From the files, not from what was loaded: a family's config class has an end token of its own (2 for Llama), which
    means nothing in another vocabulary.
    """
    transformers = importlib.import_module("transformers")
    config, _ = transformers.PretrainedConfig.get_config_dict(source, **options)
    path = transformers.utils.cached_file(
        source,
        "generation_config.json",
        revision=options["revision"],
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    generation = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    text = config.get("text_config")
    for part in (generation, config, text if isinstance(text, dict) else {}):
        ends = part.get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            if end is not None and type(end) is not int:
                raise ModelSupportError(
                    f"model.checkpoint {source} names eos_token_id {end!r:.60} in its files; it must be a number, or a "
                    "list of numbers"
                )
            if end is not None and end >= 0:
                yield end


def _processor(source: str, model: Any, prompt: str | None, options: dict[str, Any]) -> Any:
    vision = model.config.model_type in VISION_FAMILIES
    if vision:
        processor = importlib.import_module("kvbench.models.processors").vision_processor(source, model, options)
    else:
        processor = importlib.import_module("transformers").AutoTokenizer.from_pretrained(source, **options)
    tokenizer = processor.tokenizer if vision else processor
    if tokenizer.eos_token_id is None:
        raise ModelSupportError("the tokenizer has no end token; kvbench cannot tell where an answer ends")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = PROMPTS[prompt] if prompt is not None else default_template(processor.chat_template)
    if template is None and model.config.model_type == "llava":
        template = LLAVA_V1
    processor.chat_template = template
    return processor
