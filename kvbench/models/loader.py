"""Load a checkpoint, or build a model of random weights, and put kvbench's attention on its text part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvbench.errors import ModelSupportError
from kvbench.models.families import FAMILIES, VISION_FAMILIES
from kvbench.models.fused import fuse
from kvbench.models.own_code import check_hub_code
from kvbench.models.prompts import LLAVA_V1, PROMPTS
from kvbench.models.random_weights import architecture, random_model
from kvbench.models.spec import ModelSpec


def nobody_watches() -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run: `processor` is the full processor or the tokenizer alone.

    Random weights come without either: both are None. beat: called after every pass of the model by what runs it,
    for a watchdog; it costs next to nothing.
    """

    model: Any
    processor: Any
    tokenizer: Any
    device: torch.device
    image_token_id: int | None
    beat: Callable[[], None] = nobody_watches

    @property
    def takes_images(self) -> bool:
        """Whether a picture can be part of the prompt."""
        return self.image_token_id is not None

    @property
    def eos_token_id(self) -> int:
        """The token that ends an answer; of a model without tokenizer, what its config says.

        Raises: ModelSupportError if neither names one.
        """
        if self.tokenizer is not None:
            return int(self.tokenizer.eos_token_id)
        end = self.model.config.get_text_config().eos_token_id
        first = end[0] if isinstance(end, list) else end
        if first is None:
            raise ModelSupportError("neither a tokenizer nor the config names an end token")
        return int(first)


def load_model(spec: ModelSpec, device: str) -> LoadedModel:
    """Load `spec` onto `device`, which becomes the current one.

    Raises: ModelSupportError for a family that is not supported.
    """
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:  # what names no device, such as a kernel's launch, uses this
        torch.cuda.set_device(where)
    return _random(spec, device) if spec.weights == "random" else _checkpoint(spec, device)


def _random(spec: ModelSpec, device: str) -> LoadedModel:
    config = architecture(spec.known_config() or {})
    vision = config.model_type in VISION_FAMILIES
    where = torch.device(device)
    model = random_model(config, vision=vision, dtype=getattr(torch, spec.dtype), device=where, seed=spec.weights_seed)
    _attach(model)
    _fuse_on_gpu(model, spec, where)
    return LoadedModel(
        model=model.eval(),
        processor=None,
        tokenizer=None,
        device=where,
        image_token_id=config.image_token_id if vision else None,
    )


def _attach(model: Any) -> None:
    from kvbench.cache import attach  # needs transformers

    attach(model)


def _fuse_on_gpu(model: Any, spec: ModelSpec, device: torch.device) -> None:
    if spec.fused and device.type == "cuda":
        fuse(model)


def _checkpoint(spec: ModelSpec, device: str) -> LoadedModel:
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()  # the sweep has its own
    importlib.import_module("kvbench.models.qwen_vl")  # registers the family that transformers does not have
    source = str(spec.folder or spec.checkpoint)
    options = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    if spec.trust_remote_code and spec.folder is None:
        check_hub_code(source, spec.revision)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
    except ValueError as error:  # an unknown family, or one whose code is not trusted
        raise ModelSupportError(
            f"{source} is of a family that transformers does not know; supported: {', '.join(FAMILIES)}, others "
            "only with model.trust_remote_code=true, which runs code of the checkpoint"
        ) from error
    family = config.model_type
    if family not in FAMILIES and not spec.trust_remote_code:
        raise ModelSupportError(f"{source} is of family {family!r}; supported: {', '.join(FAMILIES)}")
    vision = family in VISION_FAMILIES
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(source, dtype=getattr(torch, spec.dtype), use_safetensors=True, **options)
    processor = _processor(source, model, spec.prompt, options)
    _attach(model)
    _fuse_on_gpu(model, spec, torch.device(device))
    return LoadedModel(
        model=model.to(device).eval(),
        processor=processor,
        tokenizer=processor.tokenizer if vision else processor,
        device=torch.device(device),
        image_token_id=config.image_token_id if vision else None,
    )


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
    if prompt is not None:
        processor.chat_template = PROMPTS[prompt]
    elif model.config.model_type == "llava" and not processor.chat_template:
        processor.chat_template = LLAVA_V1
    return processor
