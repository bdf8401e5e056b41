from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kvbench.datasets.base import Example
from kvbench.errors import ModelSupportError
from kvbench.models.inputs import answer_tokens, prompt_batch, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.qwen_vl import QwenVLConfig
from kvbench.models.spec import ModelSpec
from tests.models.checkpoints import save_checkpoint
from tests.models.qwen_vl.golden_model import CONFIG

PICTURE = Image.linear_gradient("L").resize((90, 41)).convert("RGB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("qwen", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def chat(folder: Path) -> LoadedModel:
    return load_model(ModelSpec(checkpoint=str(folder)), "cpu")


def question(text: str, picture: Image.Image | None = PICTURE) -> Example:
    load = None if picture is None else lambda: picture
    return Example(id="0", cluster="0", question=text, reference="A red dot.", load_image=load)


def test_the_chat_model_is_asked_in_chatml_with_numbered_pictures(chat: LoadedModel) -> None:
    assert prompt_text(chat, question("What is it?")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1:<img><imgpad></img>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "Picture" not in prompt_text(chat, question("What is it?", None))


def test_a_conversation_numbers_its_pictures_and_ends_every_turn(chat: LoadedModel) -> None:
    picture = {"type": "image"}
    turns = [("user", "One?", [picture]), ("assistant", "Yes.", []), ("user", "Two?", [picture, picture])]
    messages = [{"role": r, "content": [*p, {"type": "text", "text": t}]} for r, t, p in turns]
    text = chat.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.endswith(
        "<|im_start|>user\nPicture 1:<img><imgpad></img>\nOne?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nPicture 2:<img><imgpad></img>\nPicture 3:<img><imgpad></img>\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_an_answer_of_the_chat_model_ends_with_its_turn(chat: LoadedModel) -> None:
    tokens = answer_tokens(chat, question("What is it?"))
    assert chat.tokenizer.decode(tokens) == "A red dot.<|im_end|>"


def test_the_base_model_gets_pictures_and_text_and_ends_with_the_text(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"chat_format": "raw"}))
    base = load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    assert prompt_text(base, question("What is it?")) == "Picture 1:<img><imgpad></img>\nWhat is it?"
    assert base.tokenizer.decode(answer_tokens(base, question("What is it?"))) == " A red dot.<|endoftext|>"


def test_a_picture_is_stretched_to_a_square_and_normalised_as_clip_does(chat: LoadedModel) -> None:
    batch = prompt_batch(chat, [question("What is it?")])
    edge = chat.model.config.visual["image_size"]
    values = np.asarray(PICTURE.resize((edge, edge), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = np.float32([0.48145466, 0.4578275, 0.40821073]), np.float32([0.26862954, 0.26130258, 0.27577711])
    expected = torch.from_numpy((values - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(batch.tensors["pixel_values"][0], expected, rtol=0, atol=1e-5)
    ids, image = batch.tensors["input_ids"][0].tolist(), chat.image_token_id
    first = ids.index(image)
    assert ids[first - 1 : first + 5] == [image - 2, *[image] * 4, image - 1]


def test_as_many_image_tokens_as_vectors_are_needed(chat: LoadedModel) -> None:
    batch = prompt_batch(chat, [question("What is it?")])
    with pytest.raises(ModelSupportError, match="2 pictures give 8 vectors, but the prompt has 4 image tokens"):
        chat.model(**{**batch.tensors, "pixel_values": batch.tensors["pixel_values"].repeat(2, 1, 1, 1)})


@pytest.mark.parametrize("name", ["qwen.tiktoken", "generation_config.json"])
def test_a_folder_without_one_of_its_files_is_told_which(folder: Path, tmp_path: Path, name: str) -> None:
    for file in folder.iterdir():
        if file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ModelSupportError, match=f"has no {name}; copy it"):
        load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")


@pytest.mark.parametrize("changes", [{"rotary_pct": 0.5}, {"kv_channels": 16}])
def test_variants_that_the_port_does_not_cover_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelSupportError, match="covers rotary_pct=1 and heads that fill"):
        QwenVLConfig(**{**CONFIG, **changes})


def test_the_published_configuration_file_needs_no_remote_code(folder: Path, tmp_path: Path) -> None:
    """It names python files of its own and lacks what transformers would add; ours is used all the same."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for added in ("num_key_value_heads", "head_dim", "dtype"):
        config.pop(added, None)
    config |= {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "bf16": False,
        "fp16": True,
        "fp32": False,
        "onnx_safe": None,
        "scale_attn_weights": True,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": "float16",
        "use_flash_attn": "auto",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    loaded = load_model(ModelSpec(checkpoint=str(tmp_path)), "cpu")
    reference = load_model(ModelSpec(checkpoint=str(folder)), "cpu")
    batch = prompt_batch(loaded, [question("What is it?")])
    with torch.inference_mode():
        assert torch.equal(loaded.model(**batch.tensors).logits, reference.model(**batch.tensors).logits)
