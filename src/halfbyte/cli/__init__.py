"""``halfbyte COMMAND …``: finds the command, runs it, and says what went wrong in one message.

Each command is a module of this package, imported only when it is called, so that ``--help`` and
mistakes are answered without torch. Exit codes: 0 done; 2 wrong use or bad input, with a
message; 1 anything else, with a traceback where it is a bug of ours; 130 interrupted.
"""

import importlib
import os
import sys
import traceback

from halfbyte.cli import startup
from halfbyte.errors import ConfigError, HalfbyteError, UserError
from halfbyte.version import __version__

COMMANDS = {
    "plan": "bytes and seconds of a run, before anything is downloaded; LoRA or QLoRA",
    "train": "fine-tune a model on your data",
    "eval": "loss, perplexity and exact-match accuracy on a data file",
    "generate": "answer one prompt",
    "chat": "talk to a model",
    "compare": "LoRA or QLoRA: train both on your data, and see memory, speed and quality",
    "report": "a page about a run, or about several side by side",
    "quantize": "write a 4-bit checkpoint that transformers, PEFT and vLLM load",
    "merge": "write a model with an adapter merged into it",
    "export": "write a GGUF file for llama.cpp and Ollama",
    "demo": "see a small model learn a task in minutes, on a CPU",
    "doctor": "what this machine can do, and whether the kernels compute rightly",
}

_CLOSED_PIPE = 141  # 128 + SIGPIPE, what a shell shows for a program that dies of it


def overview() -> str:
    """What ``halfbyte --help`` prints."""
    return "\n".join(
        [
            "usage: halfbyte COMMAND [options]",
            "",
            "Fine-tune large language models in half a byte per weight.",
            "",
            *(f"  {command:<10}{summary}" for command, summary in COMMANDS.items()),
            "",
            "halfbyte COMMAND --help lists its options; halfbyte --version prints the version.",
        ]
    )


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
    elif argv[0] in ("-V", "--version"):
        print(f"halfbyte {__version__}")
    elif argv[0] in COMMANDS:
        importlib.import_module(f"halfbyte.cli.{argv[0]}").main(argv[1:])
    else:
        from halfbyte.config.aliases import nearest

        raise ConfigError(
            f"unknown command `{argv[0]}`{nearest(argv[0], COMMANDS) or ';'} expected one of "
            + ", ".join(COMMANDS)
        )
    sys.stdout.flush()


def _memory_problem(error: Exception) -> str | None:
    """What to say if an error is that the GPU's memory does not suffice; None if it is another."""
    if "torch" not in sys.modules:
        return None
    from halfbyte.runtime.device import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    said = str(error).partition(". Process ")[0].partition("\n")[0]  # without torch's own advice
    return (
        f"the GPU's memory does not suffice: {said}. End other programs on the GPU, or take a "
        "smaller model; `halfbyte plan MODEL` says what it takes, and --device cpu uses none of it"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The words after ``halfbyte``; those of this process if None.

    Returns:
        The exit code.
    """
    if argv is None:
        startup.claim_process()
        argv = sys.argv[1:]
    name = f"halfbyte {argv[0]}" if argv and argv[0] in COMMANDS else "halfbyte"
    try:
        _run(argv)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except HalfbyteError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does. Python would complain once more when
        # it flushes at exit, hence the other end for standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except Exception as error:  # the one place that may: it tells bugs from mistakes, hides nothing
        if (problem := _memory_problem(error)) is not None:
            print(f"{name}: {problem}", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(
            f"{name}: this is a bug in halfbyte; please report it with the lines above and what "
            "`halfbyte doctor` prints",
            file=sys.stderr,
        )
        return 1
    return 0
