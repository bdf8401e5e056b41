"""kvbench: compare KV-cache policies under one definition of everything."""
