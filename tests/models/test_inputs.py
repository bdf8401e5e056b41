from __future__ import annotations

import re
import shutil
from datetime import date
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from kvbench.datasets.base import Example
from kvbench.errors import ConfigError
from kvbench.models.inputs import answer_tokens, prompt_batch, prompt_text
from kvbench.models.loader import LoadedModel, load_model
from kvbench.models.spec import BUNDLED_FOLDER, PROMPTS, ModelSpec, image_tokens
from tests.models.checkpoints import save_checkpoint

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
YAMLS = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))
NAMED = [path for path in YAMLS if path.stem not in ("local", "smollm2-135m", "tiny-llava")]
PICTURE = Image.new("RGB", (20, 20))


def example(text: str = "What is it?", *, picture: bool = True) -> Example:
    load = (lambda: PICTURE) if picture else None
    return Example(id="0", cluster="0", question=text, reference="A red dot.", load_image=load)


def without_template(folder: Path) -> Path:
    for file in ("chat_template.jinja", "chat_template.json"):
        (folder / file).unlink(missing_ok=True)
    return folder


def loaded_with(folder: Path, prompt: str | None = None) -> LoadedModel:
    return load_model(ModelSpec(checkpoint=str(folder), prompt=prompt), "cpu")


def test_llava_v1_5_speaks_as_it_was_trained(tmp_path: Path) -> None:
    ours = loaded_with(save_checkpoint("llava", tmp_path), "llava_v1")
    assert prompt_text(ours, example()) == f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT:"
    assert prompt_text(ours, example(picture=False)) == f"{SYSTEM} USER: What is it? ASSISTANT:"
    ids = prompt_batch(ours, [example()]).tensors["input_ids"][0].tolist()
    assert ids.count(ours.image_token_id) == 4
    assert ours.tokenizer.decode(answer_tokens(ours, example())) == " A red dot.</s>"


def test_turns_of_llava_v1_5_end_with_the_end_token(tmp_path: Path) -> None:
    ours = loaded_with(save_checkpoint("llava", tmp_path), "llava_v1")
    turns = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    text = ours.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == f"{SYSTEM} USER: One? ASSISTANT: Yes.</s> USER: Two? ASSISTANT:"


def test_a_llava_without_a_template_speaks_as_llava_v1_5(tmp_path: Path) -> None:
    ours = loaded_with(without_template(save_checkpoint("llava", tmp_path)))
    assert prompt_text(ours, example()).startswith(SYSTEM)


def test_a_template_of_the_checkpoint_is_used_unless_another_is_chosen(tmp_path: Path) -> None:
    ours = loaded_with(save_checkpoint("llava", tmp_path))
    assert prompt_text(ours, example()) == "<s>USER: <image>\nWhat is it? ASSISTANT:"


def test_prompts_are_the_same_every_day_and_ask_for_no_reasoning(tmp_path: Path) -> None:
    """As Llama 3's and Qwen3's templates ask: a date unless one is given, and whether to reason first."""
    template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}"
        "{% if enable_thinking is defined and enable_thinking is false %} no reasoning{% endif %}"
        "{% for message in messages %} {{ message['content'] }}{% endfor %}"
    )
    save_checkpoint("llama", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    text = prompt_text(loaded_with(tmp_path), example(picture=False))
    assert text == "26 Jul 2024 no reasoning What is it?"
    assert date.today().strftime("%d %b %Y") not in text


def test_an_unknown_prompt_format_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"model\.prompt is 'llava_v2'; did you mean 'llava_v1'"):
        ModelSpec(checkpoint="bundled", prompt="llava_v2")


@pytest.mark.parametrize("path", NAMED, ids=lambda path: path.stem)
def test_a_model_file_takes_a_folder_in_place_of_its_hub_name(path: Path) -> None:
    config = OmegaConf.load(path)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", config.checkpoint)
    assert config.prompt is None or config.prompt in PROMPTS
    told = r"model\.revision is None; a hub checkpoint must be pinned"
    with pytest.raises((ConfigError, InstantiationException), match=told):  # Hydra 1.4 leaves our error as it is
        instantiate(config)
    config.checkpoint = str(BUNDLED_FOLDER)
    assert instantiate(config).folder == BUNDLED_FOLDER


def test_the_vocabulary_of_qwen_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    save_checkpoint("qwen", tmp_path / "one")
    other = shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = ModelSpec(checkpoint=str(tmp_path / "one")).fingerprint()
    assert ModelSpec(checkpoint=str(other)).fingerprint() == first
    with (other / "qwen.tiktoken").open("ab") as file:
        file.write(b"\n")
    assert ModelSpec(checkpoint=str(other)).fingerprint() != first


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "qwen"])
def test_random_weights_and_pictures_are_refused_where_they_are_not_drawn(family: str) -> None:
    with pytest.raises(ConfigError, match="random pictures are not drawn"):
        image_tokens({"model_type": family})
    with pytest.raises(ConfigError, match=r"supported: llava, llama, .* with random weights"):
        ModelSpec(checkpoint="x", weights="random", config={"model_type": family})
