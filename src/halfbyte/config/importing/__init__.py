"""Reads other trainers' configurations: axolotl's and LLaMA-Factory's YAML, Unsloth's scripts.

    rules           what a foreign key becomes: an option, nothing, or something to be done by hand
    axolotl, llama_factory, unsloth     the keys of each trainer
    writing         the result as a YAML file with comments

A file that mentions an option of another trainer is also read by ``halfbyte train`` itself if all
of its options are known (``config/aliases.py``). Here a file is converted once, and *every* key of
it is accounted for: mapped, not needed, or without a counterpart, with what to do about it. What is
decided by code, such as a data set that a script builds, cannot be converted, and is listed too.
"""

from __future__ import annotations

from pathlib import Path

from halfbyte.config.importing import axolotl, llama_factory, unsloth
from halfbyte.config.importing.rules import Imported
from halfbyte.config.reading import read_yaml
from halfbyte.errors import ConfigError

__all__ = ["Imported", "import_config"]


def import_config(path: Path) -> Imported:
    """Convert a configuration of another trainer.

    Args:
        path: A YAML file of axolotl or LLaMA-Factory; or a Python script or a notebook that uses
            Unsloth or TRL.

    Raises:
        ConfigError: It cannot be read, is of none of these, or trains in a way that halfbyte does
            not (full fine-tuning, preferences).
    """
    if path.suffix.lower() in (".py", ".ipynb"):
        return unsloth.read(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ConfigError(
            f"{path}: expected a YAML file of axolotl or LLaMA-Factory, or a .py or .ipynb file "
            "that uses Unsloth"
        )
    given = read_yaml(path)
    if "base_model" in given:
        return axolotl.convert(given)
    if "model_name_or_path" in given and ("stage" in given or "finetuning_type" in given):
        return llama_factory.convert(given, path.parent)
    raise ConfigError(
        f"{path} is neither axolotl's, which has `base_model`, nor LLaMA-Factory's, which has "
        "`model_name_or_path` and `stage`"
    )
