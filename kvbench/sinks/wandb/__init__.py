"""Weights & Biases: `run` is one run, `content` what runs show, `sync` what is sent when, `report` the W&B Report."""
