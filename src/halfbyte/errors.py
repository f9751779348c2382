"""All exceptions that halfbyte raises deliberately.

    HalfbyteError              base class of all
    ├── UserError              wrong use or bad input: the command line exits with 2
    │   ├── ConfigError        an option or a configuration file is wrong
    │   ├── DataError          a data file is missing, empty or unusable
    │   ├── CheckpointError    a model, an adapter or a run is missing, damaged, of another kind
    │   ├── WeightError        a weight cannot be quantised (NaN, infinity); names the tensor
    │   ├── OutputError        the output cannot be written: no permission, no space, in use
    │   └── OutOfMemoryError   a step does not fit into GPU memory, after all fallbacks
    ├── EncodingError          a process that encodes data ended before its work was done
    ├── UploadError            an adapter is complete, and could not be uploaded
    ├── NonFiniteLossError     training diverged: the loss or a gradient is NaN or infinite
    ├── ProcessFailed          another process of a run has failed, so this one ends
    └── RunStopped             a run was asked to stop, and has saved its state

    Interrupted                a signal ends the command; a KeyboardInterrupt, not an error

A message says what was expected, what was found, and what to do. Anything that is not a
``HalfbyteError`` is a bug of ours and is shown with its traceback (exit code 1).
"""

from halfbyte.foreign_text import LONGEST_MESSAGE, shorten


class HalfbyteError(Exception):
    """Base class of all exceptions that halfbyte raises deliberately.

    Args:
        message: For the user. Its middle is left out if it is very long: whatever a message quotes,
            it stays one that can be read.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message, LONGEST_MESSAGE))


class UserError(HalfbyteError):
    """Wrong use or bad input; the command line prints the message and exits with 2."""


class ConfigError(UserError):
    """An option, or a configuration file, is wrong."""


class DataError(UserError):
    """A data file is missing, empty, or has nothing to train on."""


class CheckpointError(UserError):
    """A model, an adapter or a run directory is missing, damaged, or of another kind."""


class OutputError(UserError):
    """The output cannot be written."""


class OutOfMemoryError(UserError):
    """A step does not fit into GPU memory, after all fallbacks."""


class WeightError(UserError):
    """A weight cannot be quantised, because it contains NaN or infinity."""


class EncodingError(HalfbyteError):
    """A process that encodes data ended before its work was done."""


class UploadError(HalfbyteError):
    """An adapter is complete, and could not be uploaded; the message says how to try again."""


class NonFiniteLossError(HalfbyteError):
    """The loss or a gradient became NaN or infinite."""


class RunStopped(HalfbyteError):
    """A run was asked to stop, and has saved its state; the message says how to go on.

    Attributes:
        signal: Number of the signal that asked, or None.
    """

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal


class ProcessFailed(HalfbyteError):
    """Another process of a run has failed; the message says which, and why.

    Attributes:
        rank: Its rank.
        exit_code: What the command exits with: 2 if that was wrong use or bad input.
    """

    def __init__(self, message: str, rank: int, exit_code: int = 1) -> None:
        super().__init__(message)
        self.rank, self.exit_code = rank, exit_code

    def after(self, step: int, command: str) -> "ProcessFailed":
        """Return the error of a run that has been saved after ``step``, with how to go on."""
        saved = f"step {step} is saved. To go on" if step else "no step is saved. To start again"
        return ProcessFailed(f"{self}. The run ends: {saved}: {command}", self.rank, self.exit_code)


BETWEEN_STEPS = (OutOfMemoryError, ConfigError, DataError, EncodingError, ProcessFailed)
"""What can end a run while it makes steps, so that those it has made are saved: no memory, a metric
that is not what it should be, data that ends or cannot be encoded any more, another process."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the command.

    Attributes:
        signal: Its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
