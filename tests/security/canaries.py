"""Secrets that are none, and a policy that puts all of them into an error."""

from __future__ import annotations

PUBLIC = "public-7d793037a0"
CANARIES = {
    "WANDB_API_KEY": "c0ffee00" * 5,
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanary1",
    "AWS_SECRET_ACCESS_KEY": "canary/wJalrXUtnFEMI+K7MDENG=bPx",
    "MY_DB_PASSWORD": "canary p&ss 'quoted' w0rd",
    "SLACK_BOT_TOKEN": "xoxb-canary-1234567890123456",
    "a proxy": "canary-proxy-pa55",
    "a netrc file": "canary-netrc-4cf1",
    "nowhere but in an error": "canary-unknown-99aa",
}
LEAKY_POLICY = f"""
import base64
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from kvbench import ScorePolicy


@dataclass(frozen=True, kw_only=True)
class Leaky(ScorePolicy):
    def score(self, view):
        values = list(os.environ.values()) + [(Path.home() / ".netrc").read_text()]
        texts = values + [quote(v, safe="") for v in values] + [base64.b64encode(v.encode()).decode() for v in values]
        try:
            raise ConnectionError("Leaky: GET https://me:{CANARIES["nowhere but in an error"]}@host/ {PUBLIC}")
        except ConnectionError as error:
            raise ValueError("Leaky {PUBLIC}: " + " ".join(texts)) from error
"""
