"""transformers' models, built with frozen linears, and text generation."""
