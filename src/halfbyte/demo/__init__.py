"""The demo: a task that a small model learns in a few minutes, and nothing else."""
