"""Does a results folder hold together? An independent reading of its records, which needs nothing else."""
