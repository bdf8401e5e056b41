"""Weights & Biases: a run a cell, its content, what is sent when, and the Report."""
