"""Options of commands that read a model, with or without an adapter, and opening it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.config.options import one_or_several
from halfbyte.config.schema import CHAT_TEMPLATE, BaseOptions, ModelOptions
from halfbyte.errors import ConfigError, OutputError
from halfbyte.foreign_text import shorten
from halfbyte.input_files import open_file, read_file
from halfbyte.version import VERSION_KEY

if TYPE_CHECKING:
    from halfbyte.report import RunReport
    from halfbyte.train.side_by_side import SideBySide

RECIPE_FIELDS = (
    "quant",
    "double_quant",
    "block_size",
    "quantize_head",
    "quantize_embeddings",
    "quant_search",
)

AdapterName = Annotated[str, Field(min_length=1)]
_TEMPLATE = CHAT_TEMPLATE.replace("the tokenizer's)", "that of the adapter's training)")


class ReadModelOptions(ModelOptions):
    """A base model, and an adapter trained on it."""

    adapter: Annotated[tuple[AdapterName, ...], BeforeValidator(one_or_several)] = Field(
        (),
        description="directory of an adapter; the base model is quantised as in its training, "
        "unless set otherwise. Given several times, they are shown side by side",
    )
    allow_mismatch: bool = Field(
        False, description="use an adapter with a base model, tokenizer or template not its own"
    )
    chat_template: str | None = Field(None, min_length=1, description=_TEMPLATE)

    sections: ClassVar[dict[str, str]] = {"model": "the model"}

    @field_validator("adapter")
    @classmethod
    def _each_once(cls, adapters: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(map(os.path.realpath, adapters))) < len(adapters):
            raise ValueError("expected each adapter once")
        return adapters


def as_trained(options: BaseOptions, adapter: str | Path | None) -> dict[str, Any]:
    """How to quantise the base model: as given by the options, otherwise as in training.

    Returns:
        The fields of ``BaseRecipe`` that describe the quantisation.

    Raises:
        CheckpointError: The adapter is missing or damaged.
    """
    recipe = {name: getattr(options, name) for name in RECIPE_FIELDS}
    if adapter is not None:
        from halfbyte.checkpoint.identity import recorded_packing
        from halfbyte.checkpoint.peft import load_adapter

        trained = recorded_packing(load_adapter(adapter).info, adapter)
        recipe |= {name: trained[name] for name in trained.keys() - options.model_fields_set}
    return recipe


@contextmanager
def claim_directory(
    directory: Path,
    *inputs: str | Path | None,
    overwrite: bool,
    kind: Literal["model", "export"] = "model",
) -> Iterator[None]:
    """Hold the directory that a command writes, and check that it may, before any work is done.

    Args:
        directory: The directory.
        inputs: What the command reads: paths, or names on the hub.
        overwrite: Whether to replace what a command of the same kind has written there.
        kind: What is written.

    Raises:
        OutputError: Another process writes it, the command reads it, or it exists and may not be
            replaced.
    """
    with output_lock(directory):
        place = Path(os.path.realpath(directory))
        for path in (Path(given) for given in inputs if given is not None):
            if path.exists() and place in (path.resolve(), *path.resolve().parents):
                raise OutputError(
                    f"{path} is read, so {directory} is not replaced: give another directory"
                )
        if directory.exists() and any(directory.iterdir()):
            if not overwrite:
                raise OutputError(
                    f"{directory} already exists: use --overwrite to replace it, or give another "
                    "directory"
                )
            if problem := _not_ours(directory, kind):
                raise OutputError(
                    f"{directory} {problem}, so --overwrite does not replace it: give another "
                    "directory"
                )
        yield


_TEMPLATES = "additional_chat_templates"  # a directory of transformers
_KINDS = {
    "model": (
        *("config.json", "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", _TEMPLATES),
    ),
    "export": ("*.gguf", "Modelfile"),
}
"""The files of each kind, first one that is always there."""


def _not_ours(directory: Path, kind: str) -> str:
    """Return why a directory is not what a command of ours wrote, or an empty string."""
    required, *_ = known = _KINDS[kind]
    if not any(directory.glob(required)):
        return "contains no model"
    for entry in sorted(directory.iterdir()):
        if (entry.is_dir() and entry.name != _TEMPLATES) or not any(map(entry.match, known)):
            return f"contains {shorten(entry.name)}, which halfbyte did not write"
    try:
        if kind == "model":
            ours = VERSION_KEY in json.loads(read_file(directory / required, _MOST_CONFIG))
        else:
            ours = all(_is_gguf(file) for file in directory.glob(required))
    except (OSError, ValueError, RecursionError, TypeError):
        ours = False
    return "" if ours else "was not written by halfbyte"


_MOST_CONFIG = 10**7  # bytes


def _is_gguf(path: Path) -> bool:
    with open_file(path) as file:
        return file.read(4) == b"GGUF"


def open_model(options: ReadModelOptions, report: "RunReport") -> tuple[Any, Any]:
    """Open the model with its adapter, if there is one, and its tokenizer.

    Raises:
        UserError: One of them is missing or damaged, or the adapter belongs to another base model.
    """
    from halfbyte.train.loading import open_model

    [adapter] = options.adapter or (None,)
    model, tokenizer, _ = open_model(
        options.model,
        adapter=adapter,
        **as_trained(options, adapter),
        **_how(options),
        report=report,
    )
    return model, tokenizer


def open_side_by_side(options: ReadModelOptions, report: "RunReport") -> "SideBySide":
    """Open the model and all its adapters.

    Raises:
        UserError: One of them is missing or damaged, an adapter belongs to another base model, or
            they were trained on different quantisations of it.
    """
    from halfbyte.train.side_by_side import open_side_by_side

    recipes = {adapter: as_trained(options, adapter) for adapter in options.adapter}
    first, recipe = next(iter(recipes.items()))
    for adapter, other in recipes.items():
        different = [name for name in recipe if recipe[name] != other[name]]
        if different:
            raise ConfigError(
                f"`adapter`: `{different[0]}` was {recipe[different[0]]} in the training of "
                f"{shorten(first)}, and {other[different[0]]} in that of {shorten(adapter)}; use "
                f"them one by one, or set `{different[0]}` for both and `allow_mismatch`"
            )
    return open_side_by_side(
        options.model, options.adapter, **recipe, **_how(options), report=report
    )


def _how(options: ReadModelOptions) -> dict[str, Any]:
    return {
        "compute_dtype": options.compute_dtype,
        "device": options.device,
        "revision": options.revision,
        "cache_quantized": options.cache_quantized,
        "allow_mismatch": options.allow_mismatch,
        "chat_template": options.chat_template,
    }
