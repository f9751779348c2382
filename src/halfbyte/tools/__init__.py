"""What is made of whole runs: comparison, merging measured, self-test, the demo."""
