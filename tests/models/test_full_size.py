"""Published checkpoints at full size, without weights: tensor names and bytes of the public index files.

LLaVA-1.5-7B: 686 names and total_size of its model.safetensors.index.json. Qwen-VL: the names of the
4-bit checkpoint's public index, quantisation tensors and the biases that it adds left out.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from kvbench.models.loader import load_model
from kvbench.models.qwen_vl import QwenVLConfig, QwenVLForConditionalGeneration
from kvbench.models.spec import ModelSpec
from tests.models.checkpoints import save_checkpoint

LLAVA_BYTES, LLAVA_LAYERS, CLIP_LAYERS = 14_126_854_144, 32, 24
LLAVA_LAYER = "language_model.model.layers.N."
LLAVA_IN_A_LAYER = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
CLIP_LAYER = "vision_tower.vision_model.encoder.layers.N."
CLIP_IN_A_LAYER = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
CLIP_NORMS = ("layer_norm1", "layer_norm2")
LLAVA_ONCE = (
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.norm.weight",
    *(f"multi_modal_projector.linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")),
    "vision_tower.vision_model.embeddings.class_embedding",
    "vision_tower.vision_model.embeddings.patch_embedding.weight",
    "vision_tower.vision_model.embeddings.position_embedding.weight",
    *(
        f"vision_tower.vision_model.{k}.{kind}"
        for k in ("pre_layrnorm", "post_layernorm")
        for kind in ("weight", "bias")
    ),
)
QWEN_LAYER = "transformer.h.N."
QWEN_IN_A_LAYER = (
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "ln_1.weight",
    "ln_2.weight",
    "mlp.w1.weight",
    "mlp.w2.weight",
    "mlp.c_proj.weight",
)
TOWER_LAYER = "transformer.visual.transformer.resblocks.N."
TOWER_IN_A_LAYER = ("ln_1", "ln_2", "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
QWEN_ONCE = (
    "lm_head.weight",
    "transformer.wte.weight",
    "transformer.ln_f.weight",
    *(f"transformer.visual.{name}" for name in ("conv1.weight", "positional_embedding", "proj")),
    *(f"transformer.visual.{k}.{kind}" for k in ("ln_pre", "ln_post") for kind in ("weight", "bias")),
    *(
        f"transformer.visual.attn_pool.{k}.{kind}"
        for k in ("ln_q", "ln_kv", "attn.out_proj")
        for kind in ("weight", "bias")
    ),
    *(f"transformer.visual.attn_pool.{k}" for k in ("query", "pos_embed", "kv_proj.weight")),
    *(f"transformer.visual.attn_pool.attn.in_proj_{kind}" for kind in ("weight", "bias")),
)


def both(names: Iterable[str]) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def patterns(names: Iterable[str]) -> Counter[str]:
    return Counter(re.sub(r"\.\d+\.", ".N.", name, count=1) for name in names)


def llava_patterns(layers: int, tower_layers: int) -> Counter[str]:
    counts = Counter(LLAVA_ONCE)
    counts.update({LLAVA_LAYER + name: layers for name in LLAVA_IN_A_LAYER})
    counts.update({CLIP_LAYER + name: tower_layers for name in both((*CLIP_IN_A_LAYER, *CLIP_NORMS))})
    return counts


def test_llava_7b_has_the_tensors_and_bytes_of_the_published_index() -> None:
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5),
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            image_size=336,
            intermediate_size=4096,
            num_attention_heads=16,
            num_hidden_layers=CLIP_LAYERS,
            patch_size=14,
            projection_dim=768,
        ),
    )
    with torch.device("meta"):
        tensors = LlavaForConditionalGeneration(config).half().state_dict()
    assert len(tensors) == sum(llava_patterns(LLAVA_LAYERS, CLIP_LAYERS).values()) == 686
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == LLAVA_BYTES


def test_a_llava_folder_with_the_published_names_loads_every_tensor(tmp_path: Path) -> None:
    """transformers 5 names modules otherwise inside, and writes the tower's names shorter than they were published."""
    written, published = tmp_path / "written", tmp_path / "published"
    save_checkpoint("llava", written)
    shutil.copytree(written, published)
    stored = load_file(written / "model.safetensors")
    longer = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in stored.items()}
    assert patterns(longer) == llava_patterns(2, 2)
    save_file(longer, published / "model.safetensors", metadata={"format": "pt"})
    ours, expected = (load_model(ModelSpec(checkpoint=str(folder)), "cpu").model for folder in (published, written))
    assert len(ours.state_dict()) == len(longer)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_qwen_vl_has_the_published_names_at_full_size() -> None:
    with torch.device("meta"):
        tensors = QwenVLForConditionalGeneration(QwenVLConfig()).state_dict()
    expected = Counter(QWEN_ONCE)
    expected.update({QWEN_LAYER + name: 32 for name in QWEN_IN_A_LAYER})
    expected.update({TOWER_LAYER + name: 48 for name in both(TOWER_IN_A_LAYER)})
    assert patterns(tensors) == expected
    assert len(tensors) == 853
    assert sum(tensor.numel() for tensor in tensors.values()) == 9_656_935_168
