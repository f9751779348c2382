"""``halfbyte import-config FILE``: converts the configuration of another trainer."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from halfbyte.cli.config_file import ConfigFileOptions
from halfbyte.config.command_line import Command, invocation, results


class ImportOptions(ConfigFileOptions):
    """The file to convert, and the file to write."""

    file: Path = Field(
        description="axolotl's or LLaMA-Factory's YAML, or a script or notebook that uses Unsloth"
    )

    sections: ClassVar[dict[str, str]] = {"output": "files"}


COMMAND = Command(
    "import-config",
    ImportOptions,
    about="Convert the configuration of axolotl, LLaMA-Factory or Unsloth. Every key is accounted "
    "for: converted, not needed, or without a counterpart, with what to do about it. What the "
    "other trainer does by default is written out where halfbyte does something else.",
    example="halfbyte import-config axolotl.yaml --output halfbyte.yaml",
    positional=("file", "output"),
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, _, as_json = COMMAND.read(argv)

    from halfbyte.config.importing import import_config
    from halfbyte.config.importing.writing import missing_options, to_yaml
    from halfbyte.report import show

    options.require_new()
    imported = import_config(options.file)
    options.write(to_yaml(imported, str(options.file)))
    left = missing_options(imported)
    with results(as_json=as_json) as result:
        show.paragraph(
            f"{options.output}: {len(imported.values)} options from {imported.trainer}'s "
            f"{options.file.name}; {len(imported.unneeded)} settings need none."
        )
        if imported.missing:
            show.paragraph("Without a counterpart:")
            show.table(dict(imported.missing))
        if left:
            show.paragraph(f"To be set before training: {', '.join(left)}.")
        else:
            show.paragraph("To train with it:")
            show.command(invocation("train", str(options.output)))
        result |= _as_json(imported) | {"output": str(options.output), "to_be_set": left}


def _as_json(imported: Any) -> dict[str, Any]:
    return {
        "trainer": imported.trainer,
        "options": imported.values,
        "without_counterpart": dict(imported.missing),
        "not_needed": dict(imported.unneeded),
    }
