"""AdamW whose state may be 8 bits wide and may leave the GPU; see docs/optimizers.md."""

from halfbyte.optim.adamw import AdamW

__all__ = ["AdamW"]
