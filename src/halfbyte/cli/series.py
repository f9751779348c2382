"""Runs several command lines in one process, so that imports and compiled kernels are shared.

    python -m halfbyte.cli.series '[["train", "run.yaml"], ["eval", "--model", "m", "--json"]]'

``halfbyte compare`` trains and evaluates a variant this way. Importing torch and transformers,
starting CUDA and compiling kernels takes ten seconds, and is done once. Only the last command
prints to standard output, the others to standard error. The first command that fails ends the
series with its exit code.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Sequence

from halfbyte import cli
from halfbyte.cli import startup
from halfbyte.cli.streams import prepare_streams


def run(commands: Sequence[list[str]]) -> int:
    """Run command lines until one fails; return the last exit code."""
    for command in commands[:-1]:
        with contextlib.redirect_stdout(sys.stderr):
            code = cli.main(command)
        if code:
            return code
        gc.collect()  # models have reference cycles; free this one before the next is loaded
    return cli.main(commands[-1])


if __name__ == "__main__":
    startup.claim_process()
    prepare_streams()
    sys.exit(run(json.loads(sys.argv[1])))
