"""Fetches the headers of a model of the Hugging Face hub: config.json and the start of each file.

They are stored like the model's directory: each file of weights with its real header and its real
length, and a hole instead of its tensors. Names, shapes, dtypes and bytes can be read as from the
real files, with a few hundred kilobytes on disk.

Of files packed by bitsandbytes, the small tensors of one weight are fetched too: they describe the
packing.
"""

import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfFileSystem, get_session

from halfbyte.checkpoint.bitsandbytes_keys import STATE
from halfbyte.checkpoint.safetensors_file import INDEX_NAME, SafetensorsFile
from halfbyte.errors import CheckpointError

_WANTED = ("config.json", INDEX_NAME)
_MAX_JSON = 2**25  # bytes; the index of a model of 60 layers and 256 experts takes 2**22
_MAX_HEADER = 100_000_000
_SMALL = 2**16


def fetch_headers(
    name: str, directory: Path, *, revision: str | None = None, files: Any = None
) -> None:
    """Lay out a model of the hub in ``directory``, without its weights.

    Args:
        name: Its id, such as ``org/model``.
        directory: Where to; it must exist.
        revision: Branch, tag or commit.
        files: A file system of fsspec that has the hub's repositories; the hub's own if None.

    Raises:
        CheckpointError: If there is no such model, or it has no safetensors files.
    """
    trouble: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError)
    if files is None:
        files = HfFileSystem()
        # The hub's library hands on what its HTTP client raises, and has changed clients before.
        client = sys.modules[type(get_session()).__module__.partition(".")[0]]
        trouble = (*trouble, client.HTTPError)
    root = f"{name}@{revision}" if revision else name
    try:
        sizes = {
            entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in files.ls(root, detail=True)
        }
        for wanted in _WANTED:
            if 0 < sizes.get(wanted, 0) <= _MAX_JSON:
                (directory / wanted).write_bytes(files.cat_file(f"{root}/{wanted}"))
        shards = sorted(file for file in sizes if file.endswith(".safetensors"))
        if (directory / INDEX_NAME).exists():
            # Some repositories hold the same weights once more, under other names.
            index = json.loads((directory / INDEX_NAME).read_bytes())
            shards = sorted(set(index["weight_map"].values()) & set(shards))
        elif "model.safetensors" in shards:
            shards = ["model.safetensors"]
        if "config.json" not in sizes or not shards:
            lacking = "config.json" if shards else "safetensors files"
            raise CheckpointError(f"{name} on the hub has no {lacking}; give a model that has")
        for shard in shards:
            _fetch_header(files, f"{root}/{shard}", sizes[shard], directory / shard)
        _fetch_one_state(files, root, [directory / shard for shard in shards])
    except trouble as error:
        raise CheckpointError(
            f"{name} is no local directory or file, and its headers are not available on the "
            f"Hugging Face hub: {error}"
        ) from error


def _fetch_header(files: Any, remote: str, size: int, path: Path) -> None:
    length = int.from_bytes(files.cat_file(remote, start=0, end=8), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(f"{remote} is no safetensors file: its header would take {length} B")
    with open(path, "wb") as file:
        file.write(files.cat_file(remote, start=0, end=8 + length))
        file.truncate(size)


def _fetch_one_state(files: Any, root: str, paths: list[Path]) -> None:
    for path in paths:
        entries = SafetensorsFile(path).entries
        owner = next((key.partition(STATE)[0] for key in entries if STATE in key), None)
        if owner is None:
            continue
        for key, entry in entries.items():
            if key.startswith(f"{owner}.") and entry.nbytes <= _SMALL:
                end = entry.start + entry.nbytes
                raw = files.cat_file(f"{root}/{path.name}", start=entry.start, end=end)
                with open(path, "r+b") as file:
                    file.seek(entry.start)
                    file.write(raw)
        return
