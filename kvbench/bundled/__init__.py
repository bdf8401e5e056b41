"""What ships with kvbench: the picture model, its score, and how it was trained."""
