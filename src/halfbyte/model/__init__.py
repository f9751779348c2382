"""The model: built from transformers' architectures, its linears frozen and packed."""
