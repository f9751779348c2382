"""AdamW with 32- or 8-bit state that can be paged to host memory; see docs/optimizers.md."""

from halfbyte.optim.adamw import AdamW

__all__ = ["AdamW"]
