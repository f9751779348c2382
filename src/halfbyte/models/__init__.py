"""Models of transformers, built with frozen linears, and their answers."""
