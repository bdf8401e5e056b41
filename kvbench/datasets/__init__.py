"""Data sets: what is asked, about which picture, and what the right answer is."""
