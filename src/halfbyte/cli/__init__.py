"""``halfbyte COMMAND …``: finds the command, runs it, and reports errors in one message.

Each command is a module of this package, imported only when it is called, so that ``--help`` and
errors in options need no torch. Exit codes: 0 success; 2 wrong use or bad input, with a message;
1 anything else, with a traceback if it is a bug of ours; 128 and the number of the signal that
ended it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
"""

import errno
import importlib
import os
import signal
import sys
import traceback

from halfbyte.cli import startup
from halfbyte.cli.streams import prepare_streams
from halfbyte.errors import (
    ConfigError,
    HalfbyteError,
    Interrupted,
    ProcessFailed,
    RunStopped,
    UserError,
)
from halfbyte.foreign_text import as_message, printable, shorten
from halfbyte.runtime.distributed import rank_of_process
from halfbyte.runtime.signals import first_signal, interrupt
from halfbyte.version import __version__

COMMANDS = {
    "init": "write a commented configuration for this machine, a model and data",
    "plan": "predict memory and time of LoRA and QLoRA, before any download",
    "check": "check data: what is supervised, cut off, duplicate or damaged; no weight is read",
    "train": "fine-tune a model on your data",
    "eval": "measure loss, perplexity and exact-match accuracy on a data file",
    "generate": "answer one prompt",
    "chat": "chat with a model",
    "compare": "train LoRA and QLoRA on your data and compare memory, speed and quality",
    "report": "write an HTML page about one or more runs",
    "watch": "serve that page live while runs are made",
    "quantize": "write a 4-bit checkpoint that transformers, PEFT and vLLM load",
    "merge": "merge an adapter into its base model",
    "export": "write a GGUF file for llama.cpp and Ollama",
    "push": "upload an adapter to the Hugging Face hub, with a model card",
    "import-config": "convert a configuration of axolotl, LLaMA-Factory or Unsloth",
    "demo": "fine-tune a small model on an example task, in minutes on a CPU",
    "completion": "print a script that completes commands and options in a shell",
    "doctor": "show what this machine has and test the kernels",
}

_LONGEST_TRACEBACK = 20_000  # characters; its exception may quote anything
_CLOSED_PIPE = 141  # 128 + SIGPIPE, what a shell shows for a program that dies of it


def overview() -> str:
    """The output of ``halfbyte --help``."""
    return "\n".join(
        [
            "usage: halfbyte COMMAND [options]",
            "",
            "Fine-tune large language models in half a byte per weight.",
            "",
            *(f"  {command:<15}{summary}" for command, summary in COMMANDS.items()),
            "",
            "halfbyte COMMAND --help lists its options; halfbyte --version prints the version.",
        ]
    )


def module_of(command: str) -> str:
    """The name of the module of a command."""
    return f"halfbyte.cli.{command.replace('-', '_')}"


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
    elif argv[0] in ("-V", "--version"):
        print(f"halfbyte {__version__}")
    elif argv[0] in COMMANDS:
        importlib.import_module(module_of(argv[0])).main(argv[1:])
    else:
        from halfbyte.config.aliases import nearest

        raise ConfigError(
            f"unknown command `{shorten(argv[0])}`{nearest(argv[0], COMMANDS) or ';'} expected one "
            "of " + ", ".join(COMMANDS)
        )
    sys.stdout.flush()


def _memory_problem(error: Exception) -> str | None:
    """The message for an error if the GPU is out of memory; None for other errors."""
    if "torch" not in sys.modules:
        return None
    from halfbyte.runtime.device import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    said = str(error).partition(". Process ")[0].partition("\n")[0]  # without torch's own advice
    return (
        f"out of GPU memory: {said}. End other programs on the GPU or use a smaller model; "
        "`halfbyte plan MODEL` predicts the memory needed, and --device cpu uses no GPU memory"
    )


def _path_problem(error: Exception) -> str | None:
    """The message for a path that cannot exist; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
        return None
    name = shorten(str(error.filename))
    return f"{name}: {error.strerror}; expected the path of a file or a directory"


def _complain(text: str) -> None:
    if rank_of_process()[0] > 0:  # the first process of a run says it, this one's log has it, too
        return
    print(as_message(text), file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The arguments after ``halfbyte``; those of this process if None.

    Returns:
        The exit code.
    """
    if argv is None:
        startup.claim_process()
        prepare_streams()
        argv = sys.argv[1:]
    name = f"halfbyte {argv[0]}" if argv and argv[0] in COMMANDS else "halfbyte"
    try:
        with first_signal(interrupt):
            _run(argv)
    except RunStopped as stopped:
        _complain(f"{name}: {stopped}")
        return 1 if stopped.signal is None else 128 + stopped.signal
    except UserError as error:
        _complain(f"{name}: {error}")
        return 2
    except HalfbyteError as error:
        _complain(f"{name}: {error}")
        return error.exit_code if isinstance(error, ProcessFailed) else 1
    except KeyboardInterrupt as error:
        number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        _complain(f"\n{name}: interrupted{by}")
        return 128 + number
    except BrokenPipeError:
        # The reader of our output has exited, as `head` does. Python would report it again when it
        # flushes standard output at exit, so that is redirected.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except Exception as error:  # the only place that catches all: it hides nothing
        if (problem := _path_problem(error) or _memory_problem(error)) is not None:
            _complain(f"{name}: {problem}")
            return 2
        said = shorten(traceback.format_exc(), _LONGEST_TRACEBACK)
        print(printable(said), end="", file=sys.stderr)
        _complain(
            f"{name}: this is a bug in halfbyte; please report it with the lines above and what "
            "`halfbyte doctor` prints"
        )
        return 1
    return 0
