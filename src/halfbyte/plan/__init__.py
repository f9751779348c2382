"""What a run will take, from names and shapes alone: bytes, seconds, and advice."""
