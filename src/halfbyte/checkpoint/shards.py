"""The safetensors files of a model's directory: one, or the shards that its index names.

Only headers are read. What the index says is compared with them: each key is in one file, in the
one that the index names.
"""

from pathlib import Path

from halfbyte.checkpoint.reading import read_json
from halfbyte.checkpoint.safetensors_file import INDEX_NAME, SafetensorsFile
from halfbyte.errors import CheckpointError


def open_shards(directory: Path) -> tuple[list[SafetensorsFile], dict[str, SafetensorsFile]]:
    """Return the files of weights, and the file of each key.

    Raises:
        CheckpointError: If there are none, a key is in two, or they are not those of the index.
    """
    weight_map: dict[str, str] = {}
    if (directory / INDEX_NAME).exists():
        index = read_json(directory / INDEX_NAME, "it names the shards").get("weight_map")
        if not isinstance(index, dict) or not all(
            isinstance(name, str) and name.isprintable() and Path(name).name == name
            for name in index.values()
        ):
            raise CheckpointError(f"{directory / INDEX_NAME} has no weight_map of file names")
        weight_map = index
        paths = [directory / name for name in sorted(set(weight_map.values()))]
    elif (directory / "model.safetensors").exists():
        paths = [directory / "model.safetensors"]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        raise CheckpointError(
            f"{directory} has no safetensors files"
            + (
                f", only pickles ({', '.join(pickles[:3])}), which can run code and are not read; "
                "convert them with transformers: save_pretrained(…)"
                if pickles
                else ""
            )
        )
    shards = [SafetensorsFile(path) for path in paths]
    homes: dict[str, SafetensorsFile] = {}
    for shard in shards:
        for key in shard.entries:
            if key in homes:
                raise CheckpointError(f"{key} is in {homes[key].path} and in {shard.path}")
            homes[key] = shard
    for key, name in weight_map.items():
        if key not in homes or homes[key].path.name != name:
            raise CheckpointError(
                f"{directory / name} lacks {key}, which {INDEX_NAME} says it has; "
                "download or copy the directory again"
            )
    return shards, homes
