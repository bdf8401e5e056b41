"""The original Qwen-VL and Qwen-VL-Chat (arXiv 2308.12966), as model classes that transformers 5 does not have.

Tensor and configuration names are those of the published checkpoints, so that their files load as they are.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForImageTextToText

from kvbench.models.qwen_vl.config import QwenVLConfig
from kvbench.models.qwen_vl.model import QwenVLForConditionalGeneration

AutoConfig.register(QwenVLConfig.model_type, QwenVLConfig, exist_ok=True)
AutoModelForImageTextToText.register(QwenVLConfig, QwenVLForConditionalGeneration, exist_ok=True)

__all__ = ["QwenVLConfig", "QwenVLForConditionalGeneration"]
