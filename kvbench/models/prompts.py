"""Prompt formats that checkpoints do not carry, or carry in another form than a paper used."""

from __future__ import annotations

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
