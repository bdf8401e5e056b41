"""Where finished cells go: the store is the truth, every other sink is a mirror of it."""
