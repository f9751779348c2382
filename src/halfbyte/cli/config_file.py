"""What the commands that write a configuration have in common: the file, which must be new."""

from pathlib import Path

from pydantic import Field

from halfbyte.config.options import Options
from halfbyte.errors import OutputError


class ConfigFileOptions(Options):
    """The configuration to write."""

    output: Path = Field(Path("halfbyte.yaml"), description="configuration to write")
    overwrite: bool = Field(False, description="replace an existing file")

    def require_new(self) -> None:
        """Check that nothing is replaced unasked.

        Raises:
            OutputError: The file exists, and ``overwrite`` is not set.
        """
        if self.output.exists() and not self.overwrite:
            raise OutputError(
                f"{self.output} exists; give another --output, or --overwrite to replace it"
            )

    def write(self, text: str) -> None:
        """Write the file.

        Raises:
            OutputError: It cannot be written.
        """
        from halfbyte.atomic import new_file

        with new_file(self.output) as file:
            file.write(text.encode())
