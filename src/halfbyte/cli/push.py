"""``halfbyte push ADAPTER OWNER/NAME``: uploads an adapter to the Hugging Face hub."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from halfbyte.config.command_line import Command, results
from halfbyte.config.options import Options, Repository


class PushOptions(Options):
    """The adapter, and where to upload it."""

    adapter: Path = Field(description="directory of an adapter")
    repository: Repository = Field(description="repository on the hub: owner/name")
    private: bool = Field(True, description="create the repository private, if there is none")

    sections: ClassVar[dict[str, str]] = {"adapter": "the upload"}


COMMAND = Command(
    "push",
    PushOptions,
    about="Upload an adapter to the Hugging Face hub, with its tokenizer and a model card. "
    "Checkpoints, journal and data stay here. README.md is written if there is none, and uploaded "
    "as it is if it is yours. The login is that of `hf auth login`, or HF_TOKEN.",
    example="halfbyte push out owner/name",
    positional=("adapter", "repository"),
)


def main(argv: list[str]) -> None:
    """Run the command."""
    options, notes, as_json = COMMAND.read(argv)

    from halfbyte.report import open_report, show
    from halfbyte.train.hub import HubRepository, describe, require_adapter

    with results(as_json=as_json) as result, open_report() as report:
        for note in notes:
            report.note(note)
        require_adapter(options.adapter)
        repository = HubRepository(options.repository, options.private)
        repository.require_access()
        describe(options.adapter, options.repository, online=True)
        url = repository.push(options.adapter, report)
        show.paragraph(url)
        result |= {"repository": options.repository, "url": url}
