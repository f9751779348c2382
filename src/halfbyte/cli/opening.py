"""Options of commands that read a model, with or without an adapter, and opening it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from halfbyte.checkpoint.output_lock import output_lock
from halfbyte.config.schema import CHAT_TEMPLATE, BaseOptions, ModelOptions
from halfbyte.errors import OutputError
from halfbyte.foreign_text import shorten
from halfbyte.input_files import open_file, read_file
from halfbyte.version import VERSION_KEY

if TYPE_CHECKING:
    from halfbyte.report import RunReport

RECIPE_FIELDS = (
    "quant",
    "double_quant",
    "block_size",
    "quantize_head",
    "quantize_embeddings",
    "quant_search",
)


_TEMPLATE = CHAT_TEMPLATE.replace("the tokenizer's)", "that of the adapter's training)")


class ReadModelOptions(ModelOptions):
    """A base model, and an adapter trained on it."""

    adapter: str | None = Field(
        None,
        min_length=1,
        description="directory of an adapter; the base model is quantised as in its training, "
        "unless set otherwise",
    )
    allow_mismatch: bool = Field(
        False, description="use an adapter with a base model, tokenizer or template not its own"
    )

    chat_template: str | None = Field(None, min_length=1, description=_TEMPLATE)

    sections: ClassVar[dict[str, str]] = {"model": "the model"}


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
    """Open the model with its adapter, and its tokenizer.

    Raises:
        UserError: One of them is missing or damaged, or the adapter belongs to another base model.
    """
    from halfbyte.train.loading import open_model

    model, tokenizer, _ = open_model(
        options.model,
        adapter=options.adapter,
        **as_trained(options, options.adapter),
        compute_dtype=options.compute_dtype,
        device=options.device,
        revision=options.revision,
        cache_quantized=options.cache_quantized,
        allow_mismatch=options.allow_mismatch,
        chat_template=options.chat_template,
        report=report,
    )
    return model, tokenizer
