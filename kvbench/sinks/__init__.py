"""Where finished cells are shown: the store is the truth, every sink (console, W&B) is a mirror of it and may fail."""
