"""Options of commands that read a model, with or without an adapter, and opening it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from halfbyte.config.schema import BaseOptions, ModelOptions, check
from halfbyte.errors import CheckpointError, ConfigError, OutputError

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
        from halfbyte.checkpoint.peft import load_adapter

        recorded = load_adapter(adapter).info.get("recipe", {})
        known = {name: recorded[name] for name in RECIPE_FIELDS if name in recorded}
        try:
            trained = check(BaseOptions, {"model": str(adapter)} | known)
        except ConfigError as error:
            raise CheckpointError(f"{adapter}: the recipe in halfbyte.json: {error}") from error
        for name in known.keys() - options.model_fields_set:
            recipe[name] = getattr(trained, name)
    return recipe


def require_free(
    directory: Path,
    *inputs: str | Path | None,
    overwrite: bool,
    sign: str = "config.json",
) -> None:
    """Check that a model may be written to ``directory``, before any work is done.

    A directory is replaced only if it contains a file that matches ``sign``, and none of the
    ``inputs``.

    Raises:
        OutputError: It exists and may not be replaced, or contains no model.
    """
    place = directory.resolve()
    for path in (Path(given) for given in inputs if given is not None):
        if path.exists() and place in (path.resolve(), *path.resolve().parents):
            raise OutputError(
                f"{path} is read, so {directory} is not replaced: give another directory"
            )
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not overwrite:
        raise OutputError(
            f"{directory} already exists: use --overwrite to replace it, or give another directory"
        )
    if not any(directory.glob(sign)):
        raise OutputError(
            f"{directory} contains no model, so --overwrite does not replace it: give another "
            "directory"
        )


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
        report=report,
    )
    return model, tokenizer
