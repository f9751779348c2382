"""Options: what they are, what other programs call them, and how they are read."""
