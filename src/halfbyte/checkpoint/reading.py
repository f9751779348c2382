"""Plain reads of regular files, with errors that name the file.

Nothing is mapped into memory: pages of a mapped file count as memory of the process, and a file
that shrinks while mapped kills it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import CheckpointError
from halfbyte.foreign_text import shorten
from halfbyte.input_files import open_file, read_file

_MAX_JSON = 100_000_000  # bytes; the index of a model of 60 layers and 256 experts takes 2**22


def read_into(path: Path, start: int, target: memoryview) -> None:
    """Fill ``target`` with the bytes of a file from ``start`` on.

    Raises:
        CheckpointError: If the file cannot be read or ends before.
    """
    done = 0
    try:
        with open_file(path) as file:
            file.seek(start)
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise CheckpointError(
                        f"{path} ends at byte {start + done}, {len(target) - done} bytes early; "
                        "download or copy it again"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Path, why: str) -> dict[str, Any]:
    """Return the JSON object a file holds; ``why`` says what the file is for.

    Raises:
        CheckpointError: If it is missing, unreadable or something else.
    """
    try:
        fields = json.loads(read_file(path, _MAX_JSON))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {why}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not JSON ({shorten(str(error))}); copy the directory again"
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not a {type(fields).__name__}")
    return fields


def rope_scaling_in(card: Mapping[str, Any]) -> str | None:
    """Return ``rope_scaling`` in the content of a ``halfbyte.json``, if there is one."""
    found = card.get("rope_scaling")
    return found if isinstance(found, str) else None
