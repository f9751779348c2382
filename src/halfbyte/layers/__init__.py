"""What a decoder layer is made of: norms, attention, MLP, loss, vocabulary, the KV cache."""
