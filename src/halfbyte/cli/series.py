"""Command lines one after the other in one process: what one has imported serves the next.

    python -m halfbyte.cli.series '[["train", "run.yaml"], ["eval", "--model", "m", "--json"]]'

``halfbyte compare`` trains a variant and evaluates it so. Importing torch and transformers,
starting CUDA and compiling kernels takes ten seconds, and is done once. Standard output is the last
command's, what the others print goes to standard error. The first command that fails ends it, with
its exit code.
"""

import contextlib
import gc
import json
import sys
from collections.abc import Sequence

from halfbyte import cli
from halfbyte.cli import startup


def run(commands: Sequence[list[str]]) -> int:
    """Run command lines until one fails; return the last exit code."""
    for command in commands[:-1]:
        with contextlib.redirect_stdout(sys.stderr):
            code = cli.main(command)
        if code:
            return code
        gc.collect()  # a model is full of circles; the next command's must not lie beside it
    return cli.main(commands[-1])


if __name__ == "__main__":
    startup.claim_process()
    sys.exit(run(json.loads(sys.argv[1])))
