"""Checkpoints, their inputs, and the tiny LLaVA that comes with the package."""
