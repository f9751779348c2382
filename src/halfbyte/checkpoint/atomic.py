"""The former place of `halfbyte.atomic`, kept for the imports of what is above it."""

from halfbyte.atomic import (
    lock,
    new_directory,
    new_file,
    output_errors,
    remove_directory,
    remove_partial,
    require_writable,
)

__all__ = [
    "lock",
    "new_directory",
    "new_file",
    "output_errors",
    "remove_directory",
    "remove_partial",
    "require_writable",
]
