"""The bundled tiny LLaVA: transformers' own classes at a size that a laptop runs at once.

A CLIP tower (576 patches of a 144-pixel picture, as many as LLaVA-1.5 has), the LLaVA projector and a Llama decoder
with grouped-query attention, with a real processor and chat template, so that the bundled model goes through exactly
the code that LLaVA-1.5-7B goes through.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from kvbench.datasets.scenes import IMAGE_PIXELS

PATCH_PIXELS = 6
HEAD_SIZE = 32
MAX_VOCAB_TOKENS = 640
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most 640 entries; any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_TOKENS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos, image = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens={"image_token": image},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor that turns pictures and chats into the tiny LLaVA's inputs."""
    from transformers import CLIPImageProcessorPil  # training, on a machine with another release, does without

    edge = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PIXELS}, crop_size=edge, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llava(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 192, num_layers: int = 4, num_kv_heads: int = 2
) -> LlavaForConditionalGeneration:
    """Return the untrained model for `tokenizer`, weights from torch's global generator.

    width, num_layers, num_kv_heads are the decoder's, whose heads have size 32; three query heads share a KV head.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=3 * num_kv_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_PIXELS // PATCH_PIXELS) ** 2,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)
