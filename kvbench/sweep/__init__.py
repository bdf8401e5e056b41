"""A sweep: cells grouped by model, each group in a worker process that a supervisor watches."""
