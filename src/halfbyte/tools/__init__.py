"""Tools built on whole runs: comparison, merge evaluation, self-test, the demo."""
